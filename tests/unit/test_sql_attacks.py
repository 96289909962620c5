"""Runs the corpus of attacks: each in a worker process of its own, and nothing may come of any."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks import ATTACKS, databases
from attacks.run import wrongs


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    databases.make(folder, "plain")
    return folder / "plain"


@pytest.mark.parametrize("name", ATTACKS)
def test_contained(name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TMPDIR", "SQLITE_TMPDIR", "TMP", "TEMP"):
        monkeypatch.setenv(variable, str(tmp_path / "temp"))
    assert wrongs(ATTACKS[name], tmp_path, plain) == []


def test_the_corpus_is_large_and_of_many_kinds() -> None:
    assert sum(len(attack.statements) for attack in ATTACKS.values()) > 1000
    assert len({name.rpartition("-")[0] for name in ATTACKS}) > 40
