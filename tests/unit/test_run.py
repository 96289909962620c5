"""The run folder: starting, going on, and what survives a kill."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from sqlrl_jax import config_file
from sqlrl_jax.run import Run, RunError, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def make(tmp_path, *settings):
    return config_file.load(None, [f"trainer.run_dir={tmp_path}/run", *settings])


def test_a_start_that_came_to_nothing_is_no_run(tmp_path):
    run = Run(make(tmp_path))
    run.forget_after(-1)
    run.close()
    again = Run(make(tmp_path))
    assert again.epoch == 2
    again.close()
    (again.checkpoints / "0").mkdir(parents=True)  # Ctrl-C before the first step
    with pytest.raises(RunError, match="already holds a run"):
        Run(make(tmp_path))


def test_a_second_start_is_refused_and_says_how_to_go_on(tmp_path):
    run = Run(make(tmp_path))
    run.log_metrics("train", 1, {"a": 1.0})
    run.close()
    with pytest.raises(RunError, match=r"trainer\.resume_mode=latest"):
        Run(make(tmp_path))
    resumed = Run(make(tmp_path, "trainer.resume_mode=latest"))
    assert resumed.epoch == 2
    resumed.close()


def test_two_processes_cannot_share_a_folder(tmp_path):
    run = Run(make(tmp_path))
    with pytest.raises(RunError, match="in use"):
        Run(make(tmp_path, "trainer.resume_mode=latest"))
    run.close()


def test_resuming_forgets_later_steps_and_a_torn_line(tmp_path):
    run = Run(make(tmp_path))
    for step in (1, 2, 3):
        run.log_metrics("train", step, {"a": float(step)})
        run.log_episodes("train", step, [], {}, str)
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [m["step"] for m in read_metrics(run.metrics_file)] == [1, 2, 3]
    run.forget_after(2)
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [1, 2]
    assert sorted(p.name for p in run.trajectories.iterdir()) == ["train_000001.jsonl", "train_000002.jsonl"]
    run.close()


def test_a_bad_metrics_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:2"):
        read_metrics(path)


def test_a_full_disk_is_named(tmp_path):
    run = Run(make(tmp_path))
    run.metrics_file = Path("/dev/full")
    with pytest.raises(RunError, match="No space left on device"):
        run.log_metrics("train", 1, {})
    run.close()


def run_launch(*arguments):
    return subprocess.run(
        [sys.executable, "launch.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evla"], "did you mean 'eval'"),
        (["--config", "nowhere.yaml"], "configuration nowhere.yaml: No such file"),
        (["config", "trainer.epoch=1"], "did you mean 'trainer.epochs'"),
        (["config", "--frobnicate"], "unknown argument '--frobnicate'"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "--config", "x", "--samples", "0"], "--samples: expected a whole number above 0, found '0'"),
        (["eval", "--config", "x", "--turns", "1,five"], "--turns: expected a whole number above 0, found 'five'"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(arguments, expected):
    result = run_launch(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_path_that_the_system_refuses_is_named(monkeypatch, capsys):
    def report(args):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/locked")

    monkeypatch.setitem(launch.VERBS, "report", ("", report))
    assert launch.main(["report", "runs"]) == 2
    assert capsys.readouterr().err == "error: runs/locked: Permission denied\n"


def test_a_full_disk_behind_the_output_is_said():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "launch.py", "config"]
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.stderr == "error: output: No space left on device\n"


def test_a_terminal_without_the_letter_is_no_error():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "launch.py", "prepare", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "SET [SET ?]" in result.stdout


def test_config_prints_meaning_and_changes():
    result = run_launch("config", "generator.max_turns=7")
    assert "generator.max_turns = 7  (default 5)" in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys, launch\ntry: launch.main(['--help'])\nexcept SystemExit: pass\n"
        "print('jax' in sys.modules, 'pydantic' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "False False"
