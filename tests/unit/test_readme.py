"""Every command that the README and the guides show is one that the program accepts."""

import re
import shlex
from pathlib import Path

import pytest

import launch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(program: str) -> list[str]:
    """Lines of code that start `program`, options in [brackets] and what comes after the command left out."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:^    |`|&& )(" + re.escape(program) + r"[^\n`]*)", text, re.MULTILINE):
            plain = re.sub(r"(?<=\s)\[[^\]]*\]", "", line)
            found.append(re.split(r"\s{3,}\S", plain)[0].strip())
    return found


@pytest.mark.parametrize("command", commands("python launch.py"))
def test_launch_accepts(command):
    arguments = shlex.split(command)[2:]
    parsed = launch._parse(arguments)
    config = getattr(parsed, "config", None)
    assert config in (None, "FILE") or (ROOT / config).exists()


@pytest.mark.parametrize("command", commands("python benchmarks/"))
def test_benchmarks_exist(command):
    assert (ROOT / shlex.split(command)[1]).exists()


def test_the_pages_show_commands():
    assert len(commands("python launch.py")) >= 10


def test_the_tests_that_fault_tables_name_exist():
    rows = re.findall(
        r"^\|.*\|([^|]*test_[^|]*)\|([^|]*`[^|]*)\|$", (ROOT / "docs" / "bridge.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 30
    for files, names in rows:
        code = "".join((ROOT / "tests/integration" / f"{file}.py").read_text() for file in files.strip().split(", "))
        for name in re.findall(r"`([^`]*)`", names):
            assert f"def test_{name.rstrip('…')}" in code, (files, name)
