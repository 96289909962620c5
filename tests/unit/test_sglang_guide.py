"""The commands of docs/sglang.md: settings that exist, arguments that SGLang's engine is given, and what CI runs of them."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import launch
from rollout.engine.sglang_arguments import model_arguments

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "sglang.md").read_text(encoding="utf-8")
LINES = [line.strip() for line in re.findall(r"^    (\S.*)$", GUIDE, re.MULTILINE)]
LAUNCHED = [line for line in LINES if "python launch.py" in line]


def arguments(line: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index("launch.py") + 1 :]


@pytest.mark.parametrize("line", LAUNCHED)
def test_a_command_of_the_guide_has_settings_that_exist(line):
    args = launch._parse(arguments(line))
    if hasattr(args, "settings"):
        config = launch._config(args)
        assert model_arguments(config)["tp_size"] == config.generator.inference_engine.tensor_parallel_size


def test_certificate_and_token_are_made(tmp_path):
    for line in LINES:
        if line.startswith("openssl "):
            subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert len((tmp_path / "token").read_text().strip()) == 64
    assert "BEGIN CERTIFICATE" in (tmp_path / "gpu.pem").read_text()
    assert "PRIVATE KEY" in (tmp_path / "gpu.key").read_text()


def test_ci_runs_what_needs_no_gpu():
    section = GUIDE.partition("## Without a GPU")[2].partition("\n## ")[0]
    commands = re.findall(r"^    (\S.*)$", section, re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert len(commands) == 3
    for command in commands[:2]:
        assert command in ci
    variable, _, rest = commands[2].partition(" ")
    assert variable.replace("=$PWD/", '="$PWD/') + '" python -m pytest' in ci  # the whole suite, with that file in it
    assert (ROOT / rest.split()[-1]).exists()


def test_the_environment_on_a_cpu_has_what_a_service_needs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lock = (ROOT / "tests/sglang_cpu/requirements.txt").read_text().lower().replace("_", "-").splitlines()
    wanted = [pin.lower().replace("_", "-") for extra in ("service", "common") for pin in extras[extra] if "==" in pin]
    assert len(wanted) > 10
    assert set(wanted) <= set(lock)


def test_the_guide_shows_what_it_must():
    assert len(LAUNCHED) >= 9
    assert "python -m pytest -m gpu tests/sglang" in LINES
