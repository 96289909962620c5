"""Downloads against a hub in miniature: everything comes, nothing comes twice, and every failure is one clear sentence."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_standin import Fault, Hub, Usage, clean_environment, etag, running
from rich.console import Console

from rollout.errors import UserError
from sqlrl_jax.data.hub.download import DownloadError, Patience, fetch
from sqlrl_jax.data.progress import bars, size

REPO = "seeklhy/OmniSQL-datasets"
BIG = bytes(range(256)) * 12_000  # 3 MB: several chunks
QUICK = Patience(longest_wait=0.01, stall=5.0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    clean_environment(monkeypatch)
    with running() as hub:
        hub.put(REPO, "data.zip", BIG)
        hub.put(REPO, "sub/readme.md", b"hello\n", large=False)
        yield hub


def get(hub: Hub, folder: Path, name: str = "data.zip", **options: Any) -> Path:
    return fetch(REPO, name, folder, **{"endpoint": hub.endpoint, "patience": QUICK, **options})


def refused(hub: Hub, folder: Path, **options: Any) -> str:
    """The sentence; it names repository and file and is one line."""
    with pytest.raises(DownloadError) as caught:
        get(hub, folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert options.get("name", "data.zip") in text
    assert REPO in text or "owner/name" in text
    return text


def test_a_whole_file_arrives_and_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = get(hub, tmp_path, sha256=etag(BIG, True), progress=lambda *step: seen.append(step))
    assert path == tmp_path / "data.zip"
    assert path.read_bytes() == BIG
    assert seen[-1] == ("checking data.zip", len(BIG), len(BIG))
    assert ("data.zip", len(BIG), len(BIG)) in seen
    before = len(hub.requests)
    assert get(hub, tmp_path) == path
    assert get(hub, tmp_path, sha256=etag(BIG, True)) == path
    assert len(hub.requests) == before, "a finished file needs no network"
    assert {p.name for p in tmp_path.iterdir()} == {"data.zip", ".data.zip.fetched.json"}


def test_small_files_and_folders_in_names(hub: Hub, tmp_path: Path) -> None:
    assert get(hub, tmp_path, "sub/readme.md") == tmp_path / "sub/readme.md"
    assert (tmp_path / "sub/readme.md").read_bytes() == b"hello\n"
    hub.put(REPO, "empty.txt", b"", large=False)
    assert get(hub, tmp_path, "empty.txt").read_bytes() == b""


def test_the_endpoint_and_the_token_come_from_the_environment(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.gated.add(REPO)
    assert fetch(REPO, "data.zip", tmp_path, patience=QUICK).read_bytes() == BIG
    at_storage = [headers for _, path, headers in hub.requests if "signature" in path]
    assert at_storage
    assert not any("Authorization" in headers for headers in at_storage), "the token stays at the hub"


def test_after_a_cut_only_the_rest_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.faults_at_storage = [Fault(cut_after=1_500_000), Fault(cut_after=500_000)]
    assert get(hub, tmp_path).read_bytes() == BIG
    assert hub.served == len(BIG)
    ranges = [headers.get("Range") for _, path, headers in hub.requests if "signature" in path]
    assert ranges == [None, "bytes=1500000-", "bytes=2000000-"]


def test_an_interrupted_download_goes_on_in_the_next_call(hub: Hub, tmp_path: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if done >= 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(hub, tmp_path, progress=interrupt)
    part = next(tmp_path.glob(".data.zip.*.part"))
    have = part.stat().st_size
    assert have >= 1 << 20
    assert not (tmp_path / "data.zip").exists()
    assert get(hub, tmp_path).read_bytes() == BIG
    assert hub.requests[-1][2]["Range"] == f"bytes={have}-"
    assert not list(tmp_path.glob(".*.part"))


def test_a_part_of_an_older_version_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / ".data.zip.0123456789abcdef.part").write_bytes(b"old")
    assert get(hub, tmp_path).read_bytes() == BIG
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("fault", [Fault(ignore_range=True), Fault(shift=7), Fault(status=416)])
def test_a_server_that_cannot_continue_makes_it_start_over(hub: Hub, tmp_path: Path, fault: Fault) -> None:
    hub.faults_at_storage = [Fault(cut_after=1_500_000), fault]
    assert get(hub, tmp_path).read_bytes() == BIG


def test_wrong_bytes_are_deleted_and_named(hub: Hub, tmp_path: Path) -> None:
    hub.faults_at_storage = [Fault(flip=True)]
    text = refused(hub, tmp_path)
    assert "SHA-256" in text
    assert "deleted" in text
    assert list(tmp_path.iterdir()) == []
    hub.faults_at_hub = [Fault(), Fault(flip=True)]
    assert "git's SHA-1" in refused(hub, tmp_path, name="sub/readme.md")
    assert get(hub, tmp_path).read_bytes() == BIG


def test_another_version_than_the_expected_one_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    assert "another version" in refused(hub, tmp_path, sha256="0" * 64)
    assert hub.served == 0
    small = refused(hub, tmp_path, name="sub/readme.md", sha256="0" * 64)
    assert "SHA-256" in small


def test_a_file_of_ones_own_is_adopted_or_kept(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(BIG)
    assert get(hub, tmp_path).read_bytes() == BIG
    assert hub.served == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.zip").write_bytes(b"mine")
    assert "move it away" in refused(hub, other)
    assert (other / "data.zip").read_bytes() == b"mine"


def test_a_finished_file_that_was_changed_is_noticed(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path).write_bytes(b"broken")
    assert "move it away" in refused(hub, tmp_path)


def test_room_is_made_sure_of_before_the_first_byte(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = len(BIG) + 999
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    with pytest.raises(UserError, match=r"needs 3\.1 MB, and the disk has 3\.1 MB free") as caught:
        get(hub, tmp_path / "new", room_for=1000)
    assert "data.zip" in str(caught.value)
    assert hub.served == 0
    hub.faults_at_storage = [Fault(cut_after=1_000_000)]
    with pytest.raises(DownloadError):
        get(hub, tmp_path, room_for=999, patience=Patience(attempts=1))
    free = len(BIG) - 1_000_000
    assert get(hub, tmp_path).read_bytes() == BIG, "what has come already needs no more room"


def test_a_disk_that_fills_up_is_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(label: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DownloadError, match="the disk is full; free some space and run again"):
        get(hub, tmp_path, progress=full)
    assert list(tmp_path.glob(".data.zip.*.part"))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_hub_is_tried_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults_at_hub = [Fault(status=status), Fault(), Fault(status=status, headers={"Retry-After": "0"})]
    hub.faults_at_storage = [Fault(status=status)]
    assert get(hub, tmp_path).read_bytes() == BIG


def test_tries_are_bounded(hub: Hub, tmp_path: Path) -> None:
    hub.faults_at_hub = [Fault(status=503)] * 50
    text = refused(hub, tmp_path)
    assert "HTTP 503" in text
    assert "gave up after 6 tries" in text
    assert len(hub.requests) == 6
    hub.faults_at_hub = [Fault(status=429)] * 50
    assert "slow down" in refused(hub, tmp_path)


def test_a_wait_never_goes_past_the_deadline(hub: Hub, tmp_path: Path) -> None:
    hub.faults_at_hub = [Fault(status=429, headers={"Retry-After": "3600"})] * 2
    text = refused(hub, tmp_path, patience=Patience(longest_wait=7200, deadline=10))
    assert "not finished within" in text
    assert len(hub.requests) == 1


def test_a_silent_connection_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.faults_at_hub = [Fault(pause=0.6)] * 2
    text = refused(hub, tmp_path, patience=Patience(attempts=2, longest_wait=0.01, stall=0.1))
    assert "does not answer" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "nothing.zip"}, "no such file"),
        ({"revision": "v9"}, "no such revision"),
        ({"repo_type": "model"}, "HF_TOKEN"),
        ({"endpoint": "http://127.0.0.1:1"}, "HF_ENDPOINT"),
        ({"endpoint": "http://no-such-host.invalid"}, "check the network"),
        ({"endpoint": "huggingface.co"}, "https://huggingface.co"),
        ({"endpoint": "http://127.0.0.1:port"}, "https://huggingface.co"),
    ],
)
def test_wrong_names_and_addresses(hub: Hub, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    assert said in refused(hub, tmp_path, **options)


def test_refusals(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(REPO)
    text = refused(hub, tmp_path)
    assert f"accept the terms at {hub.endpoint}/datasets/{REPO}" in text
    assert "HF_TOKEN" in text
    hub.gated.clear()
    hub.faults_at_hub = [Fault(status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})]
    assert "does not accept the token" in refused(hub, tmp_path)
    hub.faults_at_hub = [Fault(status=403)]
    assert "HTTP 403" in refused(hub, tmp_path)
    hub.faults_at_hub = [Fault(status=418)]
    assert "HTTP 418" in refused(hub, tmp_path)
    hub.plain = True
    assert "not as a Hugging Face hub does" in refused(hub, tmp_path)
    with pytest.raises(DownloadError, match="owner/name"):
        fetch("a/b/c", "data.zip", tmp_path, endpoint=hub.endpoint)
    with pytest.raises(DownloadError, match="inside"):
        get(hub, tmp_path, "../data.zip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(hub, tmp_path)


def test_an_expired_signature_is_renewed(hub: Hub, tmp_path: Path) -> None:
    hub.faults_at_storage = [Fault(cut_after=2_000_000), Fault(status=403)]
    assert get(hub, tmp_path).read_bytes() == BIG
    assert hub.served == len(BIG)


def test_two_processes_do_not_write_the_same_file(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        get(hub, tmp_path, progress=lambda *step: (_ for _ in ()).throw(KeyboardInterrupt))
    with next(tmp_path.glob(".data.zip.*.part")).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refused(hub, tmp_path)


def test_progress_without_a_terminal_is_a_line_a_tenth_of_what_takes_long() -> None:
    out = io.StringIO()
    now = 0.0
    with bars(Console(file=out), clock=lambda: now) as progress:
        progress("at once", 1, 2)
        progress("at once", 2, 2)
        for done in range(0, 1_000_001, 1000):
            now = done / 100_000
            progress("data.zip", done, 1_000_000)
    lines = out.getvalue().splitlines()
    assert lines[0] == "data.zip: 200.0 kB of 1.0 MB (20%)"
    assert len(lines) == 9
    with bars(Console(file=io.StringIO(), force_terminal=True)) as progress:
        progress("data.zip", 1, 2)
    with bars(Console(file=out), unit="items", clock=lambda: now) as progress:
        progress("rows", 0, 2000)
        now += 5
        progress("rows", 1000, 2000)
    assert out.getvalue().splitlines()[-1] == "rows: 1,000 of 2,000 (50%)"
    assert size(22.2e9) == "22.2 GB"
    assert size(12) == "12 bytes"
