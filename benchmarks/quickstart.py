"""The quickstart's table: several seeds, each a whole run of the README's first command.

    python benchmarks/quickstart.py --seeds 0 1 2 --out runs/seeds

A seed changes data order, sampling and which episodes the model learns from; databases, held-out questions and the
cold-started model stay. A run that is already complete in the folder is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(seed: int, out: Path, settings: list[str]) -> list[dict[str, float]]:
    """The metrics of one seed's run, which is made or resumed if it is not complete."""
    folder = out / f"seed{seed}"
    if not (folder / "report.html").exists():
        command = [sys.executable, "launch.py", "--config", "configs/quickstart.yaml", f"trainer.seed={seed}"]
        command += [f"trainer.run_dir={folder}", "trainer.resume_mode=latest", *settings]
        subprocess.run(command, cwd=ROOT, check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(seed: int, metrics: list[dict[str, float]]) -> str:
    evals = [m for m in metrics if m["kind"] == "eval" and m["max_turns"] > 1]
    single = [m for m in metrics if m["kind"] == "eval" and m["max_turns"] == 1]
    steps = [m for m in metrics if m["kind"] == "train"]
    before, after = evals[0]["eval/all/avg_score"], evals[-1]["eval/all/avg_score"]
    minutes = sum(m["timing/step"] for m in steps) / 60
    pace = sorted(m["timing/step"] for m in steps)[len(steps) // 2]
    cells = [
        str(seed),
        f"{before:.1%}",
        f"{after:.1%}",
        f"+{100 * (after - before):.0f} points",
        f"{single[-1]['eval/all/avg_score']:.1%}",
        f"{evals[0]['eval/looked_first']:.0%} → {evals[-1]['eval/looked_first']:.0%}",
        str(len(steps)),
        f"{pace:.1f} s",
        f"{minutes:.1f} min",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    lines = [row(seed, run(seed, args.out.absolute(), args.settings)) for seed in args.seeds]
    print("| seed | before | after | gain | after, one turn | looked first | steps | median step | training |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
