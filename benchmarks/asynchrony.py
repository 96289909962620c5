"""What asynchronous training gains: the quickstart's task with the learner on one core and the rollout service on another.

    python benchmarks/asynchrony.py --steps 32 --seeds 0 1 2 --out runs/asynchrony
    python benchmarks/asynchrony.py --simulate runs/asynchrony/0-0

The first prints wall-clock, idle shares and accuracy of synchronous, one-step-off and asynchronous runs. All have the same
steps, and play few enough episodes at one time (ROLLOUT) that they cost about what the update does. Times are those of the
first seed, accuracies of all. A run that is there is not repeated. The second takes the lengths of a run's episodes and
prints, from the simulation in idle_simulation.py, how the idle shares go with the number of services.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from idle_simulation import Cluster, simulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rollout.supervisor import ServiceProcess

ROOT = Path(__file__).resolve().parents[1]

NAMES = {0: "synchronous", 1: "one step off"}
SETTINGS = [
    "trainer.policy.rows_per_micro_batch=24",
    "trainer.policy_mini_batch_size=32",
    "trainer.policy.optimizer_config.lr=6e-5",
    "trainer.eval_before_train=false",
    "trainer.eval_interval=0",
    "trainer.ckpt_interval=0",
    "trainer.keep_best_ckpt=false",
]
ROLLOUT = ["generator.inference_engine.max_sequences=16"]
WARM = 4
"""Steps left out of the times: what they compile the others find compiled."""


def pinned(core: int, *command: str) -> list[str]:
    return ["taskset", "--cpu-list", str(core), sys.executable, str(ROOT / "launch.py"), *command]


def run(staleness: int, seed: int, out: Path, settings: list[str]) -> list[dict[str, Any]]:
    """The metrics of one run, which is made unless it is there."""
    folder = out / f"{staleness}-{seed}"
    if not (folder / "report.html").exists():
        shutil.rmtree(folder, ignore_errors=True)
        varied = [f"trainer.max_staleness={staleness}", f"trainer.seed={seed}"]
        config = ["--config", str(ROOT / "configs/quickstart.yaml"), *SETTINGS, *ROLLOUT, *varied]
        service = ServiceProcess(pinned(1, "serve", *config, *settings), out / f"service{staleness}-{seed}.log")
        try:
            address = service.start()
            more = [f"trainer.run_dir={folder}", f"generator.services=[{address}]", *settings]
            subprocess.run(pinned(0, *config, *more), cwd=ROOT, check=True)
        finally:
            service.stop()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(staleness: int, seeds: list[list[dict[str, Any]]], reference: float) -> tuple[str, float]:
    """A line of the table and the mean seconds of a step, from the metrics of runs with several seeds."""
    every = [[m for m in metrics if m["kind"] == "train"] for metrics in seeds]
    steps = every[0][WARM:]
    accuracy = [[m for m in ms if m["kind"] == "eval" and m["max_turns"] > 1][-1]["eval/all/avg_score"] for ms in seeds]
    reward = mean(m["reward/avg_raw_reward"] for train in every for m in train[-5:])
    seconds = mean(m["timing/step"] for m in steps)

    def average(name: str) -> float:
        return mean(m.get(name, 0.0) for m in steps)

    cells = [
        NAMES.get(staleness, f"up to {staleness} steps off"),
        f"{average('timing/update'):.2f} s",
        f"{seconds:.2f} s",
        f"{seconds / (reference or seconds):.2f}",
        f"{average('async/learner_idle'):.0%}",
        f"{average('async/rollout_idle'):.0%}",
        f"{average('async/staleness_mean'):.2f}",
        f"{sum(m.get('async/staleness_dropped', 0) for m in steps):.0f}",
        f"{reward:.2f}",
        f"{100 * mean(accuracy):.1f} ({100 * min(accuracy):.0f}–{100 * max(accuracy):.0f})",
    ]
    return "| " + " | ".join(cells) + " |", seconds


def compare(versions: list[int], seeds: list[int], out: Path, settings: list[str]) -> None:
    lines, reference = [], 0.0
    for staleness in versions:
        line, seconds = row(staleness, [run(staleness, seed, out, settings) for seed in seeds], reference)
        reference = reference or seconds
        lines.append(line)
    print("| training | its update | a step | of synchronous | learner idle | rollout idle | ", end="")
    print("versions behind | dropped | reward | accuracy after, % |")
    print("|---" * 10 + "|")
    print("\n".join(lines))


def lengths(folder: Path) -> list[float]:
    """Sampled tokens of each training episode of a run."""
    files = sorted((folder / "trajectories").glob("train_*.jsonl"))
    return [float(sum(json.loads(line)["loss_mask"])) for file in files for line in file.read_text().splitlines()]


def table(tokens: list[float]) -> None:
    print("| services | max_staleness | learner idle | rollout idle | dropped groups | time of synchronous |")
    print("|---|---|---|---|---|---|")
    for services in (8, 64, 512):
        reference = 0.0
        for staleness in (0, 1, 2, 4):
            result = simulate(Cluster(services), tokens, staleness)
            reference = reference or result.seconds
            print(
                f"| {services} | {staleness} | {result.learner_idle:.0%} | {result.rollout_idle:.0%} | {result.dropped:.1%} "
                f"| {result.seconds / reference:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/asynchrony"))
    parser.add_argument("--simulate", type=Path, metavar="RUN_DIR")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.simulate:
        table(lengths(args.simulate))
    else:
        config = ["--config", "configs/quickstart.yaml", *args.settings]
        subprocess.run([sys.executable, "launch.py", "demo", *config], cwd=ROOT, check=True)
        args.out.mkdir(parents=True, exist_ok=True)
        compare(args.staleness, args.seeds, args.out.absolute(), [f"trainer.max_steps={args.steps}", *args.settings])


if __name__ == "__main__":
    main()
