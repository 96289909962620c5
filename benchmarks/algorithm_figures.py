"""Tables and plots of benchmarks/algorithms.py's results: Markdown to the terminal, SVG files into a folder.

Pure reading of the small JSON files; whatever has not been run is left out and named. A figure of several seeds is their
mean with the least and the greatest. The same results give the same bytes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Result = dict[str, Any]

LABELS = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce++": "REINFORCE++",
    "maxrl": "MaxRL",
    "gae": "GAE",
    "ppo": "PPO clip 0.2 / 0.2",
    "clip_higher": "PPO clip 0.2 / 0.28",
    "gspo": "GSPO",
    "cispo": "CISPO",
}
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce++", "maxrl", "gae")
LOSSES = ("ppo", "clip_higher", "gspo", "cispo")
PAIRS = (  # what, without, with
    ("wrong answers that found rows earn 0.1", "grpo", "partial"),
    ("a right answer loses 0.05 a turn", "grpo", "turns"),
    ("learnable questions first, 256 questions", "few", "learnable_first"),
    ("easy questions first, 256 questions", "few", "easy_first"),
    ("clip 0.28 above instead of 0.2 (four updates a batch)", "ppo", "clip_higher"),
)
_INK, _SOFT, _ACCENT = "#333b44", "#9aa3ad", "#2463c4"
_STYLE = {
    "svg.fonttype": "path",  # the same everywhere, whatever fonts the reader has
    "svg.hashsalt": "sqlrl-jax",
    "font.size": 9,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": "#dfe2e6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dfe2e6",
    "axes.grid": True,
    "axes.axisbelow": True,
}


def write_figures(results: Path, folder: Path) -> None:
    """Prints the tables and draws the plots of what is in `results`."""
    by_variant = read(results)
    for title, names in (("advantages", ADVANTAGES), ("losses, four updates a batch", LOSSES)):
        if rows := accuracy_rows(by_variant, names):
            print(f"\nAccuracy in per cent, mean (least–greatest) over seeds; {title}:\n")
            print(table(rows))
    if rows := pair_rows(by_variant):
        print("\nWithout and with:\n")
        print(table(rows))
    if rows := vote_rows(by_variant.get("grpo", [])):
        print("\nVoting at evaluation:\n")
        print(table(rows))
    missing = sorted({*LABELS, *(name for _, *two in PAIRS for name in two)} - by_variant.keys())
    if missing:
        print(f"\nnot run: {', '.join(missing)}")
    for file, names in (("algorithms.svg", ADVANTAGES), ("losses.svg", LOSSES)):
        if any(name in by_variant for name in names):
            folder.mkdir(parents=True, exist_ok=True)
            draw(by_variant, [name for name in names if name in by_variant], folder / file)
            print(f"\nplot: {folder / file}")


def read(folder: Path) -> dict[str, list[Result]]:
    """Results by variant, in the order of their seeds."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    by_variant: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(found, key=lambda r: r["seed"]):
        by_variant[result["variant"]].append(result)
    return dict(by_variant)


def curves(results: Sequence[Result], key: str = "accuracy") -> dict[int, list[float]]:
    """A figure of the evaluations by step: one value a seed, of the steps that every seed has."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for result in results:
        for entry in result["evals"]:
            by_step[entry["step"]].append(entry[key])
    return {step: values for step, values in sorted(by_step.items()) if len(values) == len(results)}


def spread(values: Sequence[float]) -> str:
    """`61.3 (58–65)`, from fractions."""
    mean = 100 * sum(values) / len(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({100 * min(values):.0f}–{100 * max(values):.0f})"


def accuracy_rows(by_variant: dict[str, list[Result]], names: Sequence[str]) -> list[list[str]]:
    present = {name: curves(by_variant[name]) for name in names if name in by_variant}
    steps = sorted({step for curve in present.values() for step in curve})
    rows = [
        [LABELS[name], str(len(by_variant[name])), *(spread(curve[s]) if s in curve else "" for s in steps)]
        for name, curve in present.items()
    ]
    return [["algorithm", "seeds", *(f"step {step}" for step in steps)], *rows] if rows else []


def pair_rows(by_variant: dict[str, list[Result]]) -> list[list[str]]:
    """Each option without and with it, over the seeds that both have: accuracy half way and at the end, turns at the end."""
    head: list[str] = []
    rows = []
    for what, without, with_it in PAIRS:
        seeds = {r["seed"] for r in by_variant.get(without, [])} & {r["seed"] for r in by_variant.get(with_it, [])}
        for label, name in (("without", without), ("with", with_it)) if seeds else ():
            results = [r for r in by_variant[name] if r["seed"] in seeds]
            accuracy, turns = curves(results), curves(results, "turns")
            middle, last = list(accuracy)[len(accuracy) // 2], list(accuracy)[-1]
            head = ["option", "", "seeds", f"step {middle}", f"step {last}", f"turns at step {last}"]
            mean_turns = sum(turns[last]) / len(seeds)
            rows.append(
                [what, label, str(len(seeds)), spread(accuracy[middle]), spread(accuracy[last]), f"{mean_turns:.2f}"]
            )
    return [head, *rows] if rows else []


def vote_rows(results: Sequence[Result]) -> list[list[str]]:
    voted = [r for r in results if "votes" in r]
    if not voted:
        return []
    columns = {name: [r["votes"][name] for r in voted] for name in ("mean", "majority", "any")}
    greedy = [r["evals"][-1]["accuracy"] for r in voted]
    head = ["seeds", "greedy", "one sample", "majority of 8", "any of 8"]
    return [head, [str(len(voted)), spread(greedy), *(spread(values) for values in columns.values())]]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def draw(by_variant: dict[str, list[Result]], names: Sequence[str], path: Path) -> None:
    """A panel for each variant: its mean and range over the seeds, the first variant's mean in grey behind."""
    with matplotlib.style.context(["default", _STYLE]):
        columns = min(3, len(names))
        height = -(-len(names) // columns)
        figure = Figure(figsize=(2.7 * columns, 2.3 * height), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        panels = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).ravel()
        first = mean(curves(by_variant[names[0]]))
        for panel, name in zip(panels, names, strict=False):
            curve = curves(by_variant[name])
            steps, low = list(curve), [100 * min(values) for values in curve.values()]
            if name != names[0]:
                panel.plot(list(first), list(first.values()), color=_SOFT, linewidth=1.5)
            panel.fill_between(
                steps, low, [100 * max(v) for v in curve.values()], color=_ACCENT, alpha=0.18, linewidth=0
            )
            panel.plot(steps, list(mean(curve).values()), color=_ACCENT, linewidth=2)
            panel.set_title(f"{LABELS[name]}, {len(by_variant[name])} seeds", loc="left", fontsize=9)
            panel.set_ylim(0, 100)
            panel.set_xticks(steps)
            panel.tick_params(length=0, labelbottom=True)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        grey = f" (grey: {LABELS[names[0]]})" if len(names) > 1 else ""
        figure.supxlabel(f"training step{grey}", fontsize=9, x=0.98, ha="right")
        figure.supylabel("accuracy on held-out questions, %", fontsize=9)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def mean(curve: dict[int, list[float]]) -> dict[int, float]:
    """Per cent by step."""
    return {step: 100 * sum(values) / len(values) for step, values in curve.items()}
