"""Unpacking archives, whole and by parts over the network: only what is wanted, nothing twice, nothing dangerous."""

from __future__ import annotations

import errno
import io
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_standin import Fault, Hub, Usage, clean_environment, running, tree

from rollout.errors import UserError
from sqlrl_jax.data import disk
from sqlrl_jax.data.hub import archive as archive_module
from sqlrl_jax.data.hub.download import Patience, Unpacked, unpack
from sqlrl_jax.data.hub.remote_archive import fetch_members

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


# ------------------------------------------------------------------------------------------- parts of remote archives

REPO = "seeklhy/OmniSQL-datasets"
QUICK = Patience(longest_wait=0.01, stall=5.0)
NOISE = random.Random(0).randbytes
REMOTE = {
    **{f"data/synsql/db{i}/db{i}.sqlite": NOISE(300_000) for i in range(20)},
    "data/spider/dev.json": NOISE(2_000),
    "data/spider/database/pets/pets.sqlite": NOISE(700_000),
    "data/spider/database/zoo/zoo.sqlite": b"z" * 900_000,
    **{f"data/synsql/db{i}/db{i}.sqlite": NOISE(300_000) for i in range(20, 30)},
    "data/bird/dev.json": NOISE(400_000),
}
SPIDER = {name: content for name, content in REMOTE.items() if name.startswith("data/spider/")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    clean_environment(monkeypatch)
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def omnisql() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in REMOTE.items():
            file.writestr(name, content)
    return out.getvalue()


def part(hub: Hub, folder: Path, *prefixes: str, **options: Any) -> Unpacked:
    return fetch_members(REPO, "data.zip", folder, prefixes, **{"endpoint": hub.endpoint, "patience": QUICK, **options})


def unpacked(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name.startswith("data/")}


def ranges(hub: Hub) -> list[str | None]:
    return [headers.get("Range") for method, path, headers in hub.requests if method == "GET" and "signature" in path]


def test_only_the_wanted_members_are_downloaded(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    hub.put(REPO, "data.zip", omnisql)
    done = part(hub, tmp_path, "data/spider/")
    assert (done.written, done.kept) == (3, 0)
    assert unpacked(tmp_path) == SPIDER
    assert hub.served < 900_000 < len(omnisql) // 10
    assert len(ranges(hub)) == 2, "the table of contents, and what lies together"
    before = len(hub.requests)
    assert part(hub, tmp_path, "data/spider/").kept == 3
    assert len(hub.requests) == before, "what is there needs no network"
    assert part(hub, tmp_path, "data/bird/").written == 1
    assert len(hub.requests) == before + 2, "the table of contents is known: one request, redirected"


def test_every_member_of_a_remote_archive(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    hub.put(REPO, "data.zip", omnisql)
    part(hub, tmp_path)
    assert unpacked(tmp_path) == REMOTE
    assert len(ranges(hub)) <= 3


def test_a_part_goes_on_after_cuts_and_interruptions(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    hub.put(REPO, "data.zip", omnisql)
    hub.faults_at_storage = [Fault(), Fault(cut_after=300_000), Fault(shift=5), Fault(status=503), Fault(cut_after=0)]
    part(hub, tmp_path / "a", "data/spider/")
    assert unpacked(tmp_path / "a") == SPIDER

    def interrupt(label: str, done: int, total: int) -> None:
        if label.startswith("unpacking") and done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part(hub, tmp_path / "b", "data/spider/", progress=interrupt)
    assert list(unpacked(tmp_path / "b")) == ["data/spider/dev.json"]
    assert part(hub, tmp_path / "b", "data/spider/").kept == 1
    assert unpacked(tmp_path / "b") == SPIDER


def test_a_kept_table_of_contents_that_does_not_help_is_thrown_away(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    hub.put(REPO, "data.zip", omnisql)
    part(hub, tmp_path, "data/bird/")
    contents = tmp_path / ".data.zip.contents"
    contents.write_bytes(contents.read_bytes().replace(b"c0ffee", b"deadbe"))  # a commit that is gone
    with pytest.raises(UserError, match="no such revision"):
        part(hub, tmp_path, "data/spider/")
    assert part(hub, tmp_path, "data/spider/").written == 3
    for broken in (b"", b"[]\n", contents.read_bytes().replace(b"seeklhy", b"another")):
        contents.write_bytes(broken)
        assert part(hub, tmp_path, "data/spider/").kept == 3


def test_members_that_lie_apart_are_asked_for_apart(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    hub.put(REPO, "data.zip", omnisql)
    part(hub, tmp_path, "data/synsql/db0/", "data/synsql/db1/", "data/synsql/db25/")
    assert sorted(unpacked(tmp_path)) == [f"data/synsql/db{i}/db{i}.sqlite" for i in (0, 1, 25)]
    assert len(ranges(hub)) == 3
    assert hub.served < 1_100_000


def test_without_ranges_the_whole_archive_is_downloaded(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    hub.put(REPO, "data.zip", omnisql)
    hub.faults_at_storage = [Fault(ignore_range=True)] * 9
    part(hub, tmp_path, "data/spider/")
    assert unpacked(tmp_path) == SPIDER
    assert (tmp_path / "data.zip").read_bytes() == omnisql


def test_an_archive_that_is_there_is_used(hub: Hub, omnisql: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(omnisql)
    assert part(hub, tmp_path, "data/spider/").written == 3
    assert hub.requests == []


def test_failures_with_remote_archives(
    hub: Hub, omnisql: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPO, "data.zip", b"no archive at all" * 9000)
    with pytest.raises(UserError, match=r"data\.zip of dataset .*: damaged"):
        part(hub, tmp_path)
    place = omnisql.index(b"data/spider/dev.json") + 500
    hub.put(REPO, "data.zip", omnisql[:place] + bytes([omnisql[place] ^ 1]) + omnisql[place + 1 :])
    with pytest.raises(UserError, match="damaged"):
        part(hub, tmp_path, "data/spider/dev.json")
    assert unpacked(tmp_path) == {}
    hub.put(REPO, "data.zip", omnisql)
    with pytest.raises(UserError, match="nothing in it begins with data/wiki"):
        part(hub, tmp_path, "data/wiki")
    hub.faults_at_storage = [Fault(status=500)] * 20
    with pytest.raises(UserError, match="gave up after 6 tries"):
        part(hub, tmp_path, "data/spider/")
    hub.faults_at_storage = []
    hub.gated.add(REPO)
    with pytest.raises(UserError, match="accept the terms"):
        part(hub, tmp_path)
    hub.gated.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 1_000_000))
    served = hub.served
    with pytest.raises(UserError, match=r"unpacking data\.zip needs 1\.6 MB"):
        part(hub, tmp_path, "data/spider/")
    assert hub.served - served < 140_000
