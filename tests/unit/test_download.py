"""Downloads against a hub in miniature: everything comes, nothing comes twice, and every failure is one clear sentence."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_standin import Fault, Hub, etag, running
from rich.console import Console

from rollout.errors import UserError
from sqlrl_jax.data import archive as archive_module
from sqlrl_jax.data import disk
from sqlrl_jax.data.download import DownloadError, Patience, fetch, unpack
from sqlrl_jax.data.progress import bars, size

REPO = "seeklhy/OmniSQL-datasets"
BIG = bytes(range(256)) * 12_000  # 3 MB: several chunks
QUICK = Patience(longest_wait=0.01, stall=5.0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
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


class Usage(NamedTuple):
    total: int
    used: int
    free: int


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


# ---------------------------------------------------------------------------------------------------------- unpacking

MEMBERS = {
    "data/spider/database/pets/pets.sqlite": b"p" * 3_000_000,
    "data/spider/dev.json": b"[]",
    "data/bird/dev.json": b"[1]",
    "data/empty.txt": b"",
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("data/spider")
        for name, content in MEMBERS.items():
            file.writestr(name, content)
        file.writestr("__MACOSX/data/._x", b"junk")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_everything_or_the_wanted_part_is_unpacked(packed: Path, tmp_path: Path) -> None:
    done = unpack(packed, tmp_path / "all")
    assert (done.written, done.kept, done.size) == (4, 0, sum(map(len, MEMBERS.values())))
    assert tree(tmp_path / "all") == MEMBERS
    unpack(packed, tmp_path / "some", ["data/spider/", "data/empty"])
    assert sorted(tree(tmp_path / "some")) == [
        "data/empty.txt",
        "data/spider/database/pets/pets.sqlite",
        "data/spider/dev.json",
    ]
    with pytest.raises(UserError, match=r"nothing in it begins with data/wiki; it holds .*data/bird.*data/spider"):
        unpack(packed, tmp_path / "none", ["data/wiki"])
    assert not (tmp_path / "none").exists()


def test_a_second_call_writes_nothing_and_mends_what_differs(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack(packed, out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert unpack(packed, out).kept == 4
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps
    (out / "data/bird/dev.json").write_bytes(b"[2]")  # the same length
    (out / "data/spider/dev.json").write_bytes(b"[")
    done = unpack(packed, out)
    assert (done.written, done.replaced, done.kept) == (0, 2, 2)
    assert tree(out) == MEMBERS


def test_an_interrupted_unpacking_leaves_no_half_file_and_goes_on(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(label: str, done: int, total: int) -> None:
        if label.startswith("unpacking") and done >= 2 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(packed, out, progress=interrupt)
    assert tree(out) == {}
    unpack(packed, out, ["data/bird"])
    done = unpack(packed, out)
    assert (done.written, done.kept) == (3, 1)
    assert tree(out) == MEMBERS


def archive_of(path: Path, info: zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("good.txt", b"good")
        file.writestr(info, b"/etc/passwd")
    return path


@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "/evil.txt", "a/../../evil.txt", "C:/evil.txt", "..\\evil.txt", "a\\b.txt", "a\0/../evil.txt"],
)
def test_members_that_lead_out_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    info = zipfile.ZipInfo("x" * len(name))
    info.filename = name
    path = archive_of(tmp_path / "evil.zip", info)
    with pytest.raises(UserError, match="leads out of the folder"):
        unpack(path, tmp_path / "deep" / "out")
    assert {p.name for p in tmp_path.rglob("*")} == {"evil.zip"}


def test_links_and_encrypted_members_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.create_system = 3
    link.external_attr = 0o120777 << 16
    with pytest.raises(UserError, match="is a link"):
        unpack(archive_of(tmp_path / "link.zip", link), tmp_path / "out")
    path = archive_of(tmp_path / "locked.zip", zipfile.ZipInfo("locked"))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.rindex(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is encrypted"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_named(packed: Path, tmp_path: Path) -> None:
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(tmp_path / "stored.zip", "w") as file:
        file.writestr("a.json", b"[1]")
    stored = tmp_path / "stored.zip"
    stored.write_bytes(stored.read_bytes().replace(b"[1]", b"[7]", 1))
    with pytest.raises(UserError, match=r"stored\.zip: damaged .*a\.json.*download it again"):
        unpack(stored, tmp_path / "out")
    assert tree(tmp_path / "out") == {}
    content[content.index(b"pets.sqlite") + 50] ^= 0xFF
    (tmp_path / "bad.zip").write_bytes(content)
    (tmp_path / "cut.zip").write_bytes(packed.read_bytes()[:-100])
    for name in ("bad.zip", "cut.zip"):
        with pytest.raises(UserError, match="damaged"):
            unpack(tmp_path / name, tmp_path / "out2")
    with pytest.raises(UserError, match="no such archive"):
        unpack(tmp_path / "none.zip", tmp_path / "out2")


def test_room_for_what_is_missing(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 3_000_000
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    with pytest.raises(UserError, match=r"unpacking data\.zip needs"):
        unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    free = 3_100_000
    unpack(packed, tmp_path / "out")
    free = 0
    assert unpack(packed, tmp_path / "out").kept == 4


def test_a_full_disk_while_unpacking(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive_module.os, "replace", full)
    with pytest.raises(UserError, match="the disk is full"):
        unpack(packed, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


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
