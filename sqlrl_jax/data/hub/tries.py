"""Files of a Hugging Face hub over HTTP: what the hub says about one, its bytes from any place on, tries until it works.

The hub's client finds and describes files, and gives the session with its headers. The xet protocol is left out: plain
HTTP gives every file too, and can be continued at any byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import httpx2
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers

from sqlrl_jax.data.hub.errors import DownloadError, Passing, Source, explain

GAIN = 1 << 20
"""Bytes that make a try fruitful though it failed."""
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to go on when the hub or the way to it is in trouble. Seconds."""

    attempts: int = 6
    """Tries in a row that brought nothing; a new megabyte starts the count afresh."""
    first_contact: int = 3
    """Tries before the hub has answered at all: a wrong address should be known soon."""
    longest_wait: float = 60.0
    """Waits between tries double up to this, or are what the hub asks for when that is shorter."""
    stall: float = 30.0
    """A connection without a byte for so long is given up."""
    deadline: float = 24 * 3600.0
    """For the whole file."""


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it. `etag` is its SHA-256, or git's SHA-1 of a small file."""

    commit: str
    etag: str
    size: int | None


def find(repo: str, filename: str, kind: str, revision: str | None, endpoint: str | None) -> Source:
    """The file's place; `endpoint` or else the environment's HF_ENDPOINT says which hub."""
    return Source(repo, filename, kind, revision, (endpoint or os.environ.get("HF_ENDPOINT") or "").rstrip("/"))


def describe(source: Source, timeout: float) -> Remote:
    """Asks the hub for commit, hash and length."""
    url = _url(source, source.revision)
    found = get_hf_file_metadata(url, timeout=timeout, endpoint=source.endpoint or None)
    if not found.commit_hash or not found.etag:
        raise DownloadError(
            f"{source}: {source.host} answers, but not as a Hugging Face hub does (no commit or ETag); "
            "set HF_ENDPOINT to a hub or unset it, and check for a proxy or login page on the way"
        )
    return Remote(found.commit_hash, found.etag, found.size)


@contextmanager
def stream(source: Source, remote: Remote, first: int, last: int | None, timeout: float) -> Iterator[httpx2.Response]:
    """The hub's answer to a request for bytes `first` to `last` (to the end if None); the caller checks its status.

    The commit instead of the branch: all parts come from one version. The hub's address instead of the storage's that it
    redirects to: that one's signature expires within the hour.
    """
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if first or last is not None:
        headers["Range"] = f"bytes={first}-" + ("" if last is None else str(last))
    url = _url(source, remote.commit)
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        yield response


def continues(response: httpx2.Response, first: int) -> bool:
    """Whether the answer is the asked-for part of the file, and not the whole or another part."""
    return response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {first}-")


def _url(source: Source, revision: str | None) -> str:
    return hf_hub_url(
        source.repo, source.filename, repo_type=source.kind, revision=revision, endpoint=source.endpoint or None
    )


class Tries:
    """Counts and spaces out the tries of one file."""

    def __init__(self, source: Source, patience: Patience) -> None:
        self.patience = patience
        self._source = source
        self._end = time.monotonic() + patience.deadline
        self._heard = False

    def until_it_works(self, action: Callable[[], T], file: BinaryIO | None = None) -> T:
        """Calls `action` until it returns; what `file` gained in a failed try counts as progress. Raises DownloadError."""
        fruitless = 0
        while True:
            before = _length(file)
            try:
                result = action()
                self._heard = True
                return result
            except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError, Passing, ConnectionError) as error:
                sentence, passing, asked = explain(error, self._source)
                if not passing:
                    raise DownloadError(sentence) from None
                self._heard = self._heard or not isinstance(error, httpx2.ConnectError)
                fruitless = 0 if _length(file) - before >= GAIN else fruitless + 1
                allowed = self.patience.attempts if self._heard else self.patience.first_contact
                if fruitless >= allowed:
                    raise DownloadError(f"{sentence} (gave up after {fruitless} tries)") from None
                self._wait(2.0 ** min(fruitless, 10) / 2 if asked is None else asked)

    def check_deadline(self) -> None:
        """Raises DownloadError when the time for the whole file is over."""
        if time.monotonic() > self._end:
            raise DownloadError(
                f"{self._source}: not finished within {self.patience.deadline / 3600:g} hours; what has come is kept, "
                "run again to continue"
            )

    def _wait(self, seconds: float) -> None:
        seconds = min(seconds, self.patience.longest_wait)
        if time.monotonic() + seconds > self._end:
            self._end = 0.0
            self.check_deadline()
        time.sleep(seconds)


def _length(file: BinaryIO | None) -> int:
    return file.seek(0, os.SEEK_END) if file else 0
