"""The wanted part of a ZIP archive on a hub, without downloading the rest of it.

OmniSQL's archive has 22 GB, of which Spider or BIRD is a small part. Its table of contents is read first, by ranges; then
room is made sure of, and the wanted members are streamed and unpacked one by one, those that lie together by one request.
Every member's CRC is checked. The archive's own SHA-256 can't be, because it is never seen whole; `download.fetch` does
that. The table of contents is kept beside, so that a second call asks for nothing that is there.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path, PurePosixPath

from huggingface_hub.utils import hf_raise_for_status

from sqlrl_jax.data.disk import disk_errors
from sqlrl_jax.data.hub.archive import ArchiveError, Unpacked, unpack, unpack_members
from sqlrl_jax.data.hub.download import fetch
from sqlrl_jax.data.hub.errors import DownloadError, Passing, Source
from sqlrl_jax.data.hub.tries import Patience, Remote, Tries, continues, describe, find, stream
from sqlrl_jax.data.progress import Progress, silent

GAP = 1 << 20
"""Bytes read and thrown away rather than asking anew."""
TAIL = 1 << 17
"""The end of an archive, where its table of contents begins to be found, comes with one request."""


def fetch_members(
    repo_id: str,
    filename: str,
    folder: str | Path,
    prefixes: Sequence[str] = (),
    *,
    repo_type: str = "dataset",
    revision: str | None = None,
    endpoint: str | None = None,
    progress: Progress = silent,
    patience: Patience | None = None,
) -> Unpacked:
    """Brings the members whose names begin with one of `prefixes` to `folder`; what is there already stays.

    An archive that lies whole at `<folder>/<filename>` is used instead of the network. A hub that does not serve ranges has
    it downloaded whole. Raises DownloadError or ArchiveError, one sentence.
    """
    whole, contents = Path(folder, filename), Path(folder, f".{PurePosixPath(filename).name}.contents")
    if whole.is_file():
        return unpack(whole, folder, prefixes, progress=progress)
    source = find(repo_id, filename, repo_type, revision, endpoint)
    try:
        return _from_remote(source, Path(folder), contents, prefixes, Tries(source, patience or Patience()), progress)
    except _NoRanges:
        fetch(
            repo_id,
            filename,
            folder,
            repo_type=repo_type,
            revision=revision,
            endpoint=endpoint,
            progress=progress,
            patience=patience,
        )
        return unpack(whole, folder, prefixes, progress=progress)
    except DownloadError:
        contents.unlink(missing_ok=True)  # it may be why: look anew the next time
        raise
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        contents.unlink(missing_ok=True)
        raise ArchiveError(f"{source}: damaged ({error}); look whether the hub has a newer version") from None
    except NotImplementedError as error:
        raise ArchiveError(f"{source}: packed in a way that Python can't read ({error})") from None


class _NoRanges(Exception):
    """The hub sends whole files only."""


def _from_remote(
    source: Source, folder: Path, contents: Path, prefixes: Sequence[str], tries: Tries, progress: Progress
) -> Unpacked:
    with (
        disk_errors(folder, ArchiveError),
        _open(source, tries, contents) as file,
        zipfile.ZipFile(file) as opened,
    ):
        file.keep(opened.start_dir)
        name = PurePosixPath(source.filename).name
        return unpack_members(
            opened, name, folder, prefixes, progress, lambda missing: file.plan(runs_of(missing, opened))
        )


def _open(source: Source, tries: Tries, contents: Path) -> RemoteFile:
    """The archive, with its table of contents where `contents` has it from an earlier call."""
    known = _known(source, contents)
    if known:
        return RemoteFile(source, known[0], tries, contents, known[1])
    remote = tries.until_it_works(lambda: describe(source, tries.patience.stall))
    return RemoteFile(source, remote, tries, contents, b"")


def _known(source: Source, contents: Path) -> tuple[Remote, bytes] | None:
    """What RemoteFile.keep wrote, if it is of this archive."""
    try:
        first, _, end = contents.read_bytes().partition(b"\n")
        name, revision, commit, etag, length = json.loads(first)
    except (OSError, ValueError, TypeError):
        return None
    return (Remote(commit, etag, length), end) if (name, revision) == (source.name, source.revision) else None


class RemoteFile(io.RawIOBase):
    """A file on a hub that can be read at any place; a connection that breaks is opened again where it broke."""

    def __init__(self, source: Source, remote: Remote, tries: Tries, contents: Path, end: bytes) -> None:
        """`end` are the file's last bytes, if they are known; `contents` is where they are kept."""
        super().__init__()
        if remote.size is None:
            raise _NoRanges
        self._source, self._remote, self._tries, self._contents = source, remote, tries, contents
        self._size = remote.size
        self._at = 0
        self._tail = end
        self._runs: list[tuple[int, int]] = []
        self._open = ExitStack()
        self._chunks: Iterator[bytes] = iter(())
        self._buffer = b""
        # Where the connection's next byte lies in the file, and where it ends; -1 without one.
        self._next = self._end = -1

    def keep(self, begin: int) -> None:
        """Remembers the file from `begin` on, here and for the next call."""
        if len(self._tail) == self._size - begin:
            return
        self.seek(begin)
        self._tail = self.read()
        remote, source = self._remote, self._source
        first = json.dumps([source.name, source.revision, remote.commit, remote.etag, remote.size])
        self._contents.parent.mkdir(parents=True, exist_ok=True)
        part = self._contents.with_name(self._contents.name + ".part")
        part.write_bytes(first.encode() + b"\n" + self._tail)
        os.replace(part, self._contents)

    def plan(self, runs: Sequence[tuple[int, int]]) -> None:
        """Says which (begin, end) will be read from begin to end, so that each is one request."""
        self._runs = sorted(runs)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        """Exactly `count` bytes, fewer only at the end of the file."""
        left = max(0, self._size - self._at)
        count = left if count is None or count < 0 else min(count, left)
        if not self._tail and self._at >= self._size - TAIL:
            # Looking for the table of contents jumps about near the end.
            length = min(TAIL, self._size)
            self._tail = self._tries.until_it_works(lambda: self._read(self._size - length, length))
        into = self._at - (self._size - len(self._tail))
        here = into >= 0
        data = self._tail[into:][:count] if here else self._tries.until_it_works(lambda: self._read(self._at, count))
        self._tries.check_deadline()
        self._at += len(data)
        return data

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _read(self, at: int, count: int) -> bytes:
        """One try."""
        try:
            if not 0 <= at - self._next <= GAP or at + count > self._end:
                self._connect(at, count)
            self._take(at - self._next)
            return self._take(count)
        except BaseException:
            self._disconnect()
            raise

    def _take(self, count: int) -> bytes:
        """The next bytes of the connection."""
        pieces: list[bytes] = []
        left = count
        while left:
            self._buffer = self._buffer or next(self._chunks, b"")
            if not self._buffer:
                raise Passing("the connection ended early")
            pieces.append(self._buffer[:left])
            self._buffer = self._buffer[left:]
            left -= len(pieces[-1])
        self._next += count
        return b"".join(pieces)

    def _connect(self, at: int, count: int) -> None:
        """Asks for what is read now and, where it is planned, for what is read after it."""
        self._disconnect()
        end = max([at + count, *(end for begin, end in self._runs if begin <= at < end)])
        response = self._open.enter_context(stream(self._source, self._remote, at, end - 1, self._tries.patience.stall))
        hf_raise_for_status(response)
        if response.status_code == 200:
            raise _NoRanges
        if not continues(response, at):
            raise Passing("the hub sent another part than was asked for")
        self._chunks = response.iter_bytes()
        self._next, self._end = at, end

    def _disconnect(self) -> None:
        self._open.close()
        self._chunks, self._buffer = iter(()), b""
        self._next = self._end = -1


def runs_of(wanted: Sequence[zipfile.ZipInfo], opened: zipfile.ZipFile) -> list[tuple[int, int]]:
    """The stretches of an archive that hold the wanted members; small gaps are bridged."""
    begins = sorted({member.header_offset for member in opened.infolist()} | {opened.start_dir})
    following = dict(pairwise(begins))
    runs: list[tuple[int, int]] = []
    for begin in sorted(member.header_offset for member in wanted):
        end = following[begin]
        if runs and begin - runs[-1][1] <= GAP:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs
