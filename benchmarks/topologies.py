"""Compiles the recipes' steps for TPU slices and prints the table of the README: python benchmarks/topologies.py

Each row is `python launch.py check --config … --topology … [key=value …] --json` in a process of its own; no TPU is needed,
but libtpu is (pip install '.[tpu]'), and some minutes and 4 GB a row. `--only v5p` takes the rows whose text holds that;
`--out FILE` keeps every answer, one JSON line each, and leaves out what the file already has. Ends with 1 where a row's
verdict is not the expected one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2.0**30


HEADER = ["recipe", "slice, mesh", "rows", "HBM of a device, GiB", "FLOPs / 6·N·tokens", "sent / ideal"]
HEADER += ["attention kernels", "compiled in"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe on a slice."""

    config: str
    slice: str
    settings: tuple[str, ...] = ()
    fits: bool = True

    @property
    def command(self) -> list[str]:
        return [
            "launch.py",
            "check",
            "--config",
            f"configs/{self.config}.yaml",
            "--topology",
            self.slice,
            *self.settings,
        ]


_POLICY = "trainer.policy."
_SHARED = _POLICY + "share_prefixes=true"
_FRUGAL = (_POLICY + "rows_per_micro_batch=4", _POLICY + "offload_optimizer=true")
TABLE = [
    Row("sql_fsdp", "v5p:2x2x1"),
    Row("sql_fsdp", "v6e:2x4", ("trainer.mesh.sequence=2", *_FRUGAL)),
    Row("sql_fsdp", "v5e:4x4", ("trainer.mesh.sequence=4", *_FRUGAL)),
    Row("skyrl_sql", "v5p:2x2x1"),
    Row("skyrl_sql_conversation", "v5p:2x2x1"),
    Row("skyrl_sql_tp_lora", "v5p:2x2x1"),
    Row("sql_fsdp_2node", "v5p:2x2x4"),
    Row("sql_fsdp", "v5p:2x2x1", (_SHARED,)),
    Row("sql_fsdp", "v6e:2x4", ("trainer.mesh.sequence=2", *_FRUGAL, _SHARED)),
    Row("sql_fsdp", "v5e:2x4", (_POLICY + "rows_per_micro_batch=8",), fits=False),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose command holds this text")
    parser.add_argument("--out", type=Path, help="file of answers, one JSON line a row")
    args = parser.parse_args()
    known = _read(args.out) if args.out else {}
    lines, wrong = [], 0
    for row in TABLE:
        text = " ".join(row.command)
        if args.only not in text:
            continue
        answer = known.get(text) or _ask(row)
        if args.out and text not in known:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"command": text, "answer": answer}) + "\n")
        lines.append(line(row, answer))
        wrong += answer["fits"] != row.fits
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join([cells(HEADER), cells(["---"] * len(HEADER)), *lines]))
    return 1 if wrong else 0


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    return {entry["command"]: entry["answer"] for entry in map(json.loads, file.read_text().splitlines())}


def _ask(row: Row) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *row.command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(row.command)} ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def line(row: Row, answer: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    compiled, micro = answer["compiled"], answer["micro_batch"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in answer["mesh"].items() if size > 1)
    hbm = answer["topology"]["hbm_bytes_per_device"] / GIB
    needs = f"{compiled['needs_bytes_per_device'] / GIB:.1f} of {hbm:.1f}"
    if not answer["fits"]:
        needs = f"refused: {needs}"
    rows = f"{micro['rows']} x {micro['tokens'] // micro['rows']}"
    sent, figures = compiled["sent_bytes_per_micro_batch"], ["", "", ""]
    if sent is not None:
        flops = compiled["flops_per_device_per_micro_batch"] * answer["devices"] / micro["flops"]["six_n"]
        figures = [f"{flops:.2f}", f"{sent['ratio']:.2f}", f"{compiled['attention_kernels']:.0f}"]
    recipe = f"{row.config}, prompts shared" if _SHARED in row.settings else row.config
    return cells([recipe, f"{row.slice}, {mesh}", rows, needs, *figures, _seconds(compiled)])


def cells(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _seconds(compiled: dict[str, Any]) -> str:
    return f"{compiled['compile_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
