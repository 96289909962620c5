"""Algorithms on the quickstart's task, several seeds each: whole runs side by side, then tables and plots.

    python benchmarks/algorithms.py --out runs/algorithms --parallel 8     the missing runs, then tables and plots
    python benchmarks/algorithms.py --plot runs/algorithms                 tables and plots of what is there

A run is `launch.py` with a variant's settings over COMMON, in a process of its own on cores of its own. What is kept of it
is one small JSON file, `<variant>-<seed>.json`; a run that has its file is not repeated. The advantages come first, then the
others seed by seed, so what is there at any time can be compared. With --minutes no run begins that would not end in time,
judged by the slowest so far. A run that fails leaves its output as `<variant>-<seed>.log`, the others go on, and the exit
status is 1.

A seed changes data order and sampling. Databases, held-out questions and the cold-started model are the same in all runs.
The tables and plots are algorithm_figures.py's. Left out: search for each variant's best settings; all have the same.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from algorithm_figures import ADVANTAGES, write_figures

ROOT = Path(__file__).resolve().parents[1]

CONFIG = "configs/quickstart.yaml"
COMMON = (
    "trainer.policy_mini_batch_size=32",
    "trainer.policy.optimizer_config.lr=1e-4",
    "trainer.eval_interval=4",
    "trainer.ckpt_interval=0",
    "data.demo.heldout_databases=20",
)
FOUR_STEPS = ("trainer.policy_mini_batch_size=8", "trainer.policy.optimizer_config.lr=5e-5")
"""A batch makes four optimizer steps, so that ratios leave 1 and the losses differ: on policy they nearly agree."""


class Variant(NamedTuple):
    settings: tuple[str, ...] = ()
    votes: bool = False
    """Whether the trained model is also evaluated with several samples."""
    databases: int = 300
    """Databases of the training questions, eight each. Of 32, an epoch is eight steps."""


VARIANTS = {
    "grpo": Variant(votes=True),
    "dr_grpo": Variant((
        "trainer.algorithm.grpo_norm_by_std=false",
        "trainer.algorithm.loss_reduction=seq_mean_token_sum_norm",
        "trainer.algorithm.max_seq_len=64",
    )),
    "rloo": Variant(("trainer.algorithm.advantage_estimator=rloo",)),
    "reinforce++": Variant(("trainer.algorithm.advantage_estimator=reinforce++",)),
    "maxrl": Variant(("trainer.algorithm.advantage_estimator=maxrl",)),
    "gae": Variant((
        "trainer.algorithm.advantage_estimator=gae",
        "trainer.critic.optimizer_config.lr=3e-4",
    )),
    "partial": Variant(("environment.text2sql.partial_reward=0.1",)),
    "turns": Variant(("trainer.algorithm.turn_penalty=0.05",)),
    "few": Variant(databases=32),
    "learnable_first": Variant(("data.order=learnable_first",), databases=32),
    "easy_first": Variant(("data.order=easy_first",), databases=32),
    "ppo": Variant((*FOUR_STEPS, "trainer.algorithm.eps_clip_high=0.2")),
    "clip_higher": Variant((*FOUR_STEPS, "trainer.algorithm.eps_clip_high=0.28")),
    "gspo": Variant((
        *FOUR_STEPS,
        "trainer.algorithm.policy_loss_type=gspo",
        "trainer.algorithm.loss_reduction=sequence_mean",
        "trainer.algorithm.eps_clip_low=3e-4",
        "trainer.algorithm.eps_clip_high=4e-4",
    )),
    "cispo": Variant((*FOUR_STEPS, "trainer.algorithm.policy_loss_type=cispo")),
}  # fmt: skip
SAMPLES = 8  # of each question where there is a vote
STOP_SECONDS = 30.0  # that a run has to end after it was told to


class Job(NamedTuple):
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


class Bench:
    """The runs of one call: where their results go, what they share, when no other may begin."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.out, self.work, self.steps, self.settings = args.out.absolute(), work, args.steps, args.settings
        self.run_seconds, self.deadline = args.run_minutes * 60, time.monotonic() + args.minutes * 60
        self.slowest = 0.0
        self.failed: list[str] = []
        self._cores: queue.Queue[set[int]] = queue.Queue()
        for cores in split_cores(sorted(os.sched_getaffinity(0)), args.parallel):
            self._cores.put(cores)
        self._lock = threading.Lock()

    def data(self, databases: int) -> list[str]:
        """Settings that put the generated databases and compiled programs where all runs share them."""
        demo = self.work / f"demo{databases}"
        return [
            f"data.demo.directory={demo}",
            f"data.demo.train_databases={databases}",
            f"data.train_data=[{demo}/train.jsonl]",
            f"data.val_data=[{demo}/heldout.jsonl]",
            f"environment.text2sql.database_root={demo}/databases",
            f"trainer.compile_cache={self.work}/xla",
        ]

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Generates the databases once, before runs that begin together would each do it."""
        for databases in {VARIANTS[job.variant].databases for job in jobs}:
            settings = [*COMMON, *self.data(databases), *self.settings]
            launch(["demo", "--config", CONFIG, *settings], self.work / "demo.log", self.run_seconds)

    def play(self, job: Job) -> None:
        """One run from its start to its file of results, if there is time for it."""
        cores = self._cores.get()
        try:
            if time.monotonic() + self.slowest > self.deadline:
                print(f"{job.name}: left out, for want of time", flush=True)
                return
            os.sched_setaffinity(0, cores)  # of this thread, and so of the processes that it starts
            started = time.monotonic()
            result = self._run(job)
            seconds = time.monotonic() - started
            with self._lock:
                self.slowest = max(self.slowest, seconds)
            store(self.out / f"{job.name}.json", {**result, "seconds": round(seconds, 1), "cores": len(cores)})
            print(f"{job.name}: {result['evals'][-1]['accuracy']:.1%} after {seconds:.0f} s", flush=True)
        except RunFailed as error:
            self.failed.append(job.name)
            shutil.copy(error.log, self.out / f"{job.name}.log")
            print(f"{job.name}: {error}; see {self.out / job.name}.log", flush=True)
        finally:
            shutil.rmtree(self.work / job.name, ignore_errors=True)
            self._cores.put(cores)

    def _run(self, job: Job) -> dict[str, Any]:
        variant, folder, log = VARIANTS[job.variant], self.work / job.name, self.work / f"{job.name}.log"
        settings = [
            *COMMON,
            *self.data(variant.databases),
            *variant.settings,
            *self.settings,
            f"trainer.seed={job.seed}",
        ]
        run = [f"trainer.max_steps={self.steps}", f"trainer.run_dir={folder}"]
        launch(["--config", CONFIG, *settings, *run], log, self.run_seconds)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result = {
            "variant": job.variant,
            "seed": job.seed,
            "settings": [*COMMON, *variant.settings, *self.settings],
            **collect(metrics),
        }
        if variant.votes:
            vote = ["--model", f"{folder}/export", "--samples", str(SAMPLES)]
            sampled = [*settings, "generator.eval_sampling_params.temperature=1.0"]
            launch(["eval", "--config", CONFIG, *vote, *sampled], log, self.run_seconds)
            result["votes"] = votes(json.loads(log.read_text().splitlines()[-1]))
        return result


class RunFailed(Exception):
    def __init__(self, what: str, log: Path) -> None:
        super().__init__(what)
        self.log = log


def launch(arguments: Sequence[str], log: Path, seconds: float) -> None:
    """Runs launch.py and writes what it prints to `log`. Raises RunFailed if it fails or takes longer than `seconds`."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}  # runs side by side would fight over one accelerator
    with log.open("w") as output:
        command = [sys.executable, "launch.py", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise RunFailed(f"not done after {seconds:.0f} s", log) from None
    if status:
        raise RunFailed(f"exit status {status}", log)


def collect(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run: accuracies, and a few figures of each training step."""
    evals = [m for m in metrics if m["kind"] == "eval" and m["max_turns"] > 1]
    train = [m for m in metrics if m["kind"] == "train"]
    kept = {
        "reward": "reward/avg_raw_reward",
        "correct": "outcome/correct",
        "spread": "reward/groups_with_spread",
        "entropy": "policy/entropy",
        "clipped": "policy/clip_frac",
        "turns": "generate/turns",
    }
    return {
        "evals": [
            {
                "step": m["step"],
                "accuracy": m["eval/all/avg_score"],
                "turns": m["eval/turns"],
                "sql_error": m["eval/outcome/sql_error"],
            }
            for m in evals
        ],
        "train": {name: [round(m[key], 5) if key in m else None for m in train] for name, key in kept.items()},
    }


def votes(metrics: dict[str, float]) -> dict[str, float]:
    """What several samples are worth, of the metrics that `launch.py eval` prints."""
    names = {"mean": "avg_score", "majority": "maj_at_n", "any": f"pass_at_{SAMPLES}"}
    return {name: metrics[f"eval/all/{key}"] for name, key in names.items()}


def split_cores(cores: Sequence[int], parts: int) -> list[set[int]]:
    """The cores in `parts` shares that differ by one at most; shared where there are fewer cores than parts."""
    if parts >= len(cores):
        return [{cores[i % len(cores)]} for i in range(parts)]
    return [set(cores[i::parts]) for i in range(parts)]


def store(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result) + "\n")
    temporary.replace(path)


def run_missing(args: argparse.Namespace) -> bool:
    """Plays what has no file yet. True if nothing failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [[v for v in args.variants if (v in ADVANTAGES) == first] for first in (True, False)]
    wanted = [Job(variant, seed) for part in parts for seed in args.seeds for variant in part]
    jobs = [job for job in wanted if not (args.out / f"{job.name}.json").exists()]
    print(f"{len(jobs)} of {len(wanted)} runs to make, {args.parallel} at a time", flush=True)
    if not jobs:
        return True
    with tempfile.TemporaryDirectory(prefix="algorithms-", dir=args.work) as folder:
        bench = Bench(args, Path(folder))
        bench.prepare(jobs)
        with ThreadPoolExecutor(args.parallel) as pool:
            list(pool.map(bench.play, jobs))
    return not bench.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/algorithms"), help="folder of the results (%(default)s)")
    add("--plot", type=Path, metavar="DIR", help="run nothing; tables and plots of the results in DIR")
    add("--figures", type=Path, default=ROOT / "docs", help="folder for the plots (docs)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--parallel", type=int, default=1, help="runs at one time; the cores are shared out among them")
    add("--steps", type=int, default=20)
    add("--minutes", type=float, default=1440.0, help="begin no run that would end later than this")
    add("--run-minutes", type=float, default=60.0, help="a run that takes longer has failed")
    add("--work", type=Path, help="where the runs' own folders are made, and deleted (the system's temporary folder)")
    add("--set", dest="settings", action="append", default=[], metavar="key=value", help="more settings, for every run")
    args = parser.parse_args()
    fine = True if args.plot else run_missing(args)
    write_figures(args.plot or args.out, args.figures)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
