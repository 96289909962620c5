"""The comparison of algorithms: its variants are settings that exist, its tables and plots say what the runs' files say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sqlrl_jax import config_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import algorithm_figures as figures  # noqa: E402
import algorithms  # noqa: E402


def store(folder: Path, variant: str, seed: int, scores: list[float], **more) -> None:
    evals = [
        {"step": 4 * n, "accuracy": score, "turns": 2.5, "sql_error": 0.0} for n, score in enumerate(scores)
    ]  # fmt: skip
    algorithms.store(folder / f"{variant}-{seed}.json", {"variant": variant, "seed": seed, "evals": evals, **more})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for seed, end in ((0, 0.8), (1, 0.9)):
        votes = {"mean": 0.5, "majority": 0.75, "any": 1.0}
        store(tmp_path, "grpo", seed, [0.3, 0.5 + 0.1 * seed, end], votes=votes)
    store(tmp_path, "rloo", 0, [0.3, 0.4, 0.95])
    store(tmp_path, "partial", 1, [0.3, 0.7, 0.85])
    return tmp_path


@pytest.mark.parametrize("name", algorithms.VARIANTS)
def test_every_variant_is_a_valid_configuration(name):
    variant = algorithms.VARIANTS[name]
    config = config_file.load(ROOT / algorithms.CONFIG, [*algorithms.COMMON, *variant.settings])
    assert config.trainer.eval_interval == 4
    assert name in {*figures.LABELS, *(variant for _, *pair in figures.PAIRS for variant in pair)}


def test_tables_show_mean_and_range_of_the_seeds_there_are(results, capsys):
    figures.write_figures(results, results / "out")
    lines = capsys.readouterr().out.splitlines()
    assert "| GRPO | 2 | 30.0 (30–30) | 55.0 (50–60) | 85.0 (80–90) |" in lines
    assert "| RLOO | 1 | 30.0 | 40.0 | 95.0 |" in lines
    paired = [line for line in lines if "found rows earn 0.1" in line]
    assert [line.split(" | ")[1:5] for line in paired] == [
        ["without", "1", "60.0", "90.0"],
        ["with", "1", "70.0", "85.0"],
    ]
    assert "| 2 | 85.0 (80–90) | 50.0 (50–50) | 75.0 (75–75) | 100.0 (100–100) |" in lines
    assert any(line.startswith("not run: ") and "gspo" in line and "rloo" not in line for line in lines)


def test_the_same_results_give_the_same_plot(results, capsys):
    figures.write_figures(results, results / "a")
    figures.write_figures(results, results / "b")
    one, other = (results / name / "algorithms.svg" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert not (results / "a" / "losses.svg").exists()  # none of it was run


def test_what_is_kept_of_a_run():
    train = {"kind": "train", "step": 1, "reward/avg_raw_reward": 0.123456, "outcome/correct": 0.1}
    train |= {"reward/groups_with_spread": 0.0, "generate/turns": 2.0}  # nothing was trained on: no policy/*
    held_out = {"kind": "eval", "step": 0, "eval/all/avg_score": 0.3, "eval/turns": 1.5, "eval/outcome/sql_error": 0.1}
    kept = algorithms.collect([held_out | {"max_turns": 5}, held_out | {"max_turns": 1}, train])
    assert [e["accuracy"] for e in kept["evals"]] == [0.3]
    assert kept["train"]["reward"] == [0.12346]
    assert kept["train"]["entropy"] == [None]
    json.dumps(kept, allow_nan=False)


@pytest.mark.parametrize(
    ("cores", "parts", "expected"),
    [
        ([0, 1, 2, 3], 2, [{0, 2}, {1, 3}]),
        ([4, 5, 6], 2, [{4, 6}, {5}]),
        ([0, 1], 2, [{0}, {1}]),
        ([0, 1], 3, [{0}, {1}, {0}]),
    ],
)
def test_cores_are_shared_out(cores, parts, expected):
    assert algorithms.split_cores(cores, parts) == expected
