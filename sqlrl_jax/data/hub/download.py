"""One file of a Hugging Face repository to one folder: resumed where it broke off, checked, with room made sure of first.

The hub's client says where a file is, how long, and what its hash is; the bytes are fetched here. Its own
`hf_hub_download` is not used because it throws away what it has when it is interrupted, which does not do for 22 GB, and
because it only warns about a full disk. Left out: its cache (one copy is enough at this size).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from huggingface_hub.utils import hf_raise_for_status

from sqlrl_jax.data.disk import check_space, disk_errors
from sqlrl_jax.data.hub.archive import Unpacked, unpack
from sqlrl_jax.data.hub.errors import DownloadError, Passing, Source
from sqlrl_jax.data.hub.tries import Patience, Remote, Tries, continues, describe, find, stream
from sqlrl_jax.data.progress import Progress, silent, size

__all__ = ["DownloadError", "Patience", "Unpacked", "fetch", "unpack"]

CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Record:
    """Written beside a finished file, so that asking for it again needs neither the network nor its hash."""

    repo: str
    revision: str
    commit: str
    sha256: str
    size: int
    mtime_ns: int


def fetch(
    repo_id: str,
    filename: str,
    folder: str | Path,
    *,
    repo_type: str = "dataset",
    revision: str | None = None,
    sha256: str | None = None,
    room_for: int = 0,
    endpoint: str | None = None,
    progress: Progress = silent,
    patience: Patience | None = None,
) -> Path:
    """Downloads `filename` to `<folder>/<filename>` and returns that path; at once when it is there already.

    Whole files are compared with the hub's hash (SHA-256 of large files, git's SHA-1 of small ones) and with `sha256` where
    it is given. `room_for` bytes must be free beside the file itself, such as for unpacking it. What was asked for before
    is not looked up again: delete the file to get a newer one. Raises DownloadError, one sentence.
    """
    parts = PurePosixPath(filename).parts
    if not parts or filename.startswith("/") or ".." in parts:
        raise DownloadError(f"{filename!r}: expected the name of a file inside {repo_id}")
    source = find(repo_id, filename, repo_type, revision, endpoint)
    target = Path(folder, *parts)
    if _finished(target, source, sha256):
        return target
    tries = Tries(source, patience or Patience())
    remote = tries.until_it_works(lambda: describe(source, tries.patience.stall))
    if sha256 and _SHA256.fullmatch(remote.etag) and remote.etag != sha256.lower():
        raise DownloadError(
            f"{source}: the hub has another version (SHA-256 {remote.etag}) than the expected {sha256}; "
            "name the revision that has it"
        )
    with disk_errors(target, DownloadError):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            _adopt(target, source, remote, sha256, progress)
            return target
        _get(target, source, remote, sha256, room_for, progress, tries)
    return target


def _get(
    target: Path,
    source: Source,
    remote: Remote,
    sha256: str | None,
    room_for: int,
    progress: Progress,
    tries: Tries,
) -> None:
    """Fetches, checks and names the file; a part stays for the next time unless its content is wrong."""
    part = target.with_name(f".{target.name}.{re.sub(r'[^0-9A-Za-z]', '', remote.etag)[:16]}.part")
    for stale in target.parent.glob(f".{target.name}.*.part"):
        if stale != part:
            stale.unlink()
    have = part.stat().st_size if part.exists() else 0
    check_space(target.parent, max(0, (remote.size or 0) - have) + room_for, f"downloading {source}")
    with _locked(part, source) as file:
        tries.until_it_works(lambda: _append(file, source, remote, progress, tries), file)
        digests = _digests(part, target.name, progress)
        wrong = _mismatch(digests, remote, sha256)
        if wrong:
            part.unlink()
            raise DownloadError(
                f"{source}: what came is not what the hub has ({wrong}); it was deleted. Run again; if that "
                "does not help, a proxy or mirror on the way changes the file"
            )
        os.replace(part, target)
    _write_record(target, source, remote, digests["sha256"])


def _adopt(target: Path, source: Source, remote: Remote, sha256: str | None, progress: Progress) -> None:
    """Takes a file that somebody put there, if it is the right one. Others' files are never deleted."""
    digests = _digests(target, target.name, progress)
    wrong = _mismatch(digests, remote, sha256)
    if wrong:
        raise DownloadError(f"{target}: is there, but is not {source} ({wrong}); move it away and run again")
    _write_record(target, source, remote, digests["sha256"])


def _append(file: BinaryIO, source: Source, remote: Remote, progress: Progress, tries: Tries) -> None:
    """One connection: appends what the part lacks. Raises Passing when it ends early."""
    have = file.seek(0, os.SEEK_END)
    if remote.size is not None and have > remote.size:
        have = file.truncate(file.seek(0))
    if remote.size is not None and have == remote.size:
        return
    with stream(source, remote, have, None, tries.patience.stall) as response:
        if response.status_code == 416:
            file.truncate(file.seek(0))
            raise Passing("the hub can't continue at this byte; starting over")
        hf_raise_for_status(response)
        if have and not continues(response, have):
            have = file.truncate(file.seek(0))
            if response.status_code == 206:
                raise Passing("the hub continued at another byte; starting over")
        length = response.headers.get("Content-Length")
        total = remote.size if remote.size is not None else have + int(length or 0)
        for chunk in response.iter_bytes():  # as they come: a cut loses nothing
            have += file.write(chunk)
            progress(PurePosixPath(source.filename).name, have, total)
            tries.check_deadline()
            if remote.size is not None and have > remote.size:
                break  # wrong bytes, and no need to see how many
    file.flush()
    if have < total:
        raise Passing(f"the connection ended after {size(have)} of {size(total)}")


@contextmanager
def _locked(part: Path, source: Source) -> Iterator[BinaryIO]:
    """The part opened for appending by this process alone."""
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{source}: another process is downloading it to {part.parent}") from None
        yield file


def _digests(path: Path, label: str, progress: Progress) -> dict[str, str]:
    """SHA-256, and SHA-1 as git computes it."""
    total = path.stat().st_size
    plain, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % total, usedforsecurity=False)
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            plain.update(chunk)
            git.update(chunk)
            done += len(chunk)
            progress(f"checking {label}", done, total)
    return {"sha256": plain.hexdigest(), "git": git.hexdigest(), "size": str(total)}


def _mismatch(digests: dict[str, str], remote: Remote, sha256: str | None) -> str:
    """What differs, in words; empty if nothing does."""
    expected = {"size": "" if remote.size is None else str(remote.size)}
    if _SHA256.fullmatch(remote.etag):
        expected["sha256"] = remote.etag
    elif _GIT_SHA1.fullmatch(remote.etag):
        expected["git"] = remote.etag
    if sha256:
        expected["sha256"] = sha256.lower()
    names = {"size": "bytes", "sha256": "SHA-256", "git": "git's SHA-1"}
    for name, value in expected.items():
        if value and digests[name] != value:
            return f"{names[name]}: {digests[name]} instead of {value}"
    return ""


def _record_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.fetched.json")


def _write_record(target: Path, source: Source, remote: Remote, sha256: str) -> None:
    found = target.stat()
    record = _Record(source.name, source.revision or "", remote.commit, sha256, found.st_size, found.st_mtime_ns)
    _record_path(target).write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")


def _finished(target: Path, source: Source, sha256: str | None) -> bool:
    """Whether an earlier call completed this very file and nobody has touched it since."""
    try:
        record = _Record(**json.loads(_record_path(target).read_text(encoding="utf-8")))
        found = target.stat()
    except (OSError, ValueError, TypeError):
        return False
    return (
        (record.repo, record.revision) == (source.name, source.revision or "")
        and (record.size, record.mtime_ns) == (found.st_size, found.st_mtime_ns)
        and sha256 in (None, record.sha256)
    )
