"""Unpacks the wanted part of a ZIP archive, member by member, so that it can be stopped and continued at any time.

A member appears under its name only when it is whole and its CRC is right; what is there already with the right size and
CRC is left alone. Names that lead out of the folder, links and encrypted members are refused. Other formats than ZIP are
left out: the published databases come as one ZIP.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from rollout.errors import UserError
from sqlrl_jax.data.disk import check_space, disk_errors
from sqlrl_jax.data.progress import Progress, silent

CHUNK = 1 << 20
BLOCK = 4096
_CREATED_ON_UNIX = 3
_ENCRYPTED = 0x1


class ArchiveError(UserError):
    """An archive can't be unpacked; the message names archive and member."""


@dataclass(frozen=True)
class Unpacked:
    """What a call did: files written new, left as they were, and replaced because they differed; bytes written."""

    written: int
    kept: int
    replaced: int
    size: int


def unpack(
    archive: str | Path, folder: str | Path, prefixes: Sequence[str] = (), *, progress: Progress = silent
) -> Unpacked:
    """Writes the members whose names begin with one of `prefixes` (all, if there are none) under `folder`.

    Raises ArchiveError for a damaged archive, a dangerous member, or prefixes that nothing begins with, and UserError
    when the disk has no room for what is missing; nothing is written in these cases but for damage found on the way.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with zipfile.ZipFile(archive) as opened, disk_errors(folder, ArchiveError):
            return unpack_members(opened, archive.name, folder, prefixes, progress)
    except FileNotFoundError:
        raise ArchiveError(f"{archive}: no such archive") from None
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ArchiveError(f"{archive}: damaged ({error}); delete it and download it again") from None
    except NotImplementedError as error:
        raise ArchiveError(f"{archive}: packed in a way that Python can't read ({error})") from None


def unpack_members(
    opened: zipfile.ZipFile,
    name: str,
    folder: Path,
    prefixes: Sequence[str],
    progress: Progress,
    before: Callable[[Sequence[zipfile.ZipInfo]], None] = lambda missing: None,
) -> Unpacked:
    """The same for an archive that is open already; `name` is what messages call it.

    `before` is told the members that will be read, in the order of the archive's bytes.
    """
    members = choose(opened, name, prefixes)
    total = sum(member.file_size for member in members)
    done = kept = replaced = written = 0
    missing: list[zipfile.ZipInfo] = []
    for member in members:
        target = folder / member.filename
        if _same(target, member):
            kept += 1
        else:
            missing.append(member)
            replaced += target.exists()
        done += member.file_size
        progress(f"looking at {name}", done, total)
    check_space(folder, sum(-(-m.file_size // BLOCK) * BLOCK for m in missing), f"unpacking {name}")
    missing.sort(key=lambda member: member.header_offset)
    before(missing)
    done = 0
    total = sum(member.file_size for member in missing)
    for member in missing:
        done = _write(opened, member, name, folder / member.filename, progress, done, total)
        written += 1
    return Unpacked(written - replaced, kept, replaced, total)


def choose(opened: zipfile.ZipFile, name: str, prefixes: Sequence[str] = ()) -> list[zipfile.ZipInfo]:
    """The wanted files of an archive in its order, each checked to stay inside the folder it is written to."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    for member in opened.infolist():
        if member.is_dir() or member.filename.startswith("__MACOSX/"):
            continue
        if prefixes and not member.filename.startswith(tuple(prefixes)):
            continue
        _check(member, name)
        if member.filename in wanted:
            raise ArchiveError(f"{name}: has two members {member.filename!r}")
        wanted[member.filename] = member
    if not wanted:
        tops = sorted({"/".join(PurePosixPath(n).parts[:2]) for n in opened.namelist()})
        raise ArchiveError(f"{name}: nothing in it begins with {', '.join(prefixes)}; it holds {', '.join(tops[:20])}")
    return list(wanted.values())


def _check(member: zipfile.ZipInfo, archive: str) -> None:
    """Refuses a member that could write elsewhere, or that can't be read."""
    # The original name: zipfile cuts names at a NUL and turns backslashes around on Windows.
    name = member.orig_filename
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or bool(PureWindowsPath(name).drive)
    if outside or "\\" in name or "\0" in name:
        raise ArchiveError(f"{archive}: member {name!r} leads out of the folder; this archive is not to be trusted")
    if member.create_system == _CREATED_ON_UNIX and stat.S_ISLNK(member.external_attr >> 16):
        raise ArchiveError(f"{archive}: member {name!r} is a link; this archive is not to be trusted")
    if member.flag_bits & _ENCRYPTED:
        raise ArchiveError(f"{archive}: member {name!r} is encrypted; unpack it by hand")


def _same(target: Path, member: zipfile.ZipInfo) -> bool:
    """Whether the file is there already, with the member's size and CRC."""
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    crc = 0
    with target.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc == member.CRC


def _write(
    opened: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    archive: str,
    target: Path,
    progress: Progress,
    done: int,
    total: int,
) -> int:
    """Unpacks one member and returns the bytes done so far; zipfile checks the CRC at its end."""
    if target.is_dir():
        raise ArchiveError(f"{target}: is a folder, and {archive} has a file of that name; move the folder away")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with opened.open(member) as source, part.open("wb") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(f"unpacking {archive}", done, total)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return done
