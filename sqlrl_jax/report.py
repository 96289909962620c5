"""`launch.py report`: one self-contained HTML page of a run's folder: figures, curves, episodes, configuration.

Pure reading: nothing in the folder is changed but report.html, and the same folder gives the same bytes. The page asks for
nothing from elsewhere, and its content policy forbids every script but its own few lines, because most of its text was
written by a model. Whatever a run does not have yet is named on the page; only a folder that is no run is an error.
Left out: comparison of several runs, and live updating; make the report again instead.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from rollout.errors import UserError
from sqlrl_jax import report_episodes as episodes
from sqlrl_jax.report_charts import WIDE, Chart, Entry, Series, curve, line_chart, own_charts, stacked_chart, value_of
from sqlrl_jax.signals import all_signals

# Filter the training episodes by outcome; open or close all episodes of a section.
_SCRIPT = """
document.querySelectorAll("button[data-outcome]").forEach(button => button.addEventListener("click", () => {
  document.querySelectorAll("button[data-outcome]").forEach(b => b.setAttribute("aria-pressed", b === button));
  const wanted = button.dataset.outcome;
  document.querySelectorAll("#training > .episode").forEach(e => { e.hidden = wanted && e.dataset.of !== wanted; });
}));
document.querySelectorAll("button[data-all]").forEach(button => button.addEventListener("click", () => {
  const all = [...document.querySelectorAll("#" + button.dataset.all + " > .episode:not([hidden])")];
  const open = all.some(e => !e.open);
  all.forEach(e => { e.open = open; });
}));
"""


@dataclass
class RunData:
    """What a run's folder says. `evals` holds the evaluations by turn limit, each in step order."""

    name: str
    config: dict[str, Any]
    config_text: str
    train: list[Entry] = field(default_factory=list)
    evals: dict[int, list[Entry]] = field(default_factory=dict)
    max_turns: int = 0  # the limit of the run itself; 0 when there is no evaluation
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str, default: Any = None) -> Any:
        """A dotted key of the resolved configuration."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def sql(self) -> bool:
        """Whether the run was about text-to-SQL."""
        return bool(self.setting("environment.env_class", "text2sql") == "text2sql")

    @property
    def main_evals(self) -> list[Entry]:
        return self.evals.get(self.max_turns, [])

    @property
    def one_turn_evals(self) -> list[Entry]:
        return self.evals.get(1, []) if self.max_turns != 1 else []


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and returns its path.

    Raises UserError when the folder is not a run's, or a file in it is damaged (other than a torn last line).
    """
    run = read_run(run_dir)
    text = _environment().from_string(_template()).render(_page(run_dir, run))
    path = run_dir / "report.html"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return path


def read_run(run_dir: Path) -> RunData:
    """Reads config.yaml and metrics.jsonl; either may be missing, not both."""
    config_file, metrics_file = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; expected the folder of a run (trainer.run_dir)")
    if not config_file.exists() and not metrics_file.exists():
        raise UserError(f"{run_dir} is not a run's folder: it has neither config.yaml nor metrics.jsonl")
    config, config_text, notes = _read_config(config_file)
    run = RunData(run_dir.resolve().name, config, config_text, notes=notes)
    if metrics_file.exists():
        entries, note = episodes.read_lines(metrics_file)
        run.notes += [note] if note else []
        _sort_entries(run, _checked(entries, metrics_file))
    if not run.train and not run.main_evals:
        run.notes.append("No step has finished yet: there is nothing to show but the configuration.")
    starts = run_dir / ".starts.json"
    counted = episodes.read_lines(starts)[0] if starts.exists() else []
    if counted and value_of(counted[0], "starts", 1) > 1:
        run.notes.append(
            f"The run was started {counted[0]['starts']} times; the wall time includes the pauses between."
        )
    return run


def _read_config(path: Path) -> tuple[dict[str, Any], str, list[str]]:
    if not path.exists():
        return {}, "", ["config.yaml is missing: names and limits of the run are not known."]
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    return (config if isinstance(config, dict) else {}), text, []


def _checked(entries: list[Entry], path: Path) -> list[Entry]:
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry.get("step"), int) or not isinstance(entry.get("kind"), str):
            raise UserError(f"{path}: entry {number} needs an integer 'step' and a text 'kind': {str(entry)[:80]}")
    return entries


def _sort_entries(run: RunData, entries: list[Entry]) -> None:
    """Fills train and evals; of several entries for one step (a resumed run) the last counts."""
    own = int(run.setting("generator.max_turns", 0) or 0)
    train = {e["step"]: e for e in entries if e["kind"] == "train"}
    run.train = [train[step] for step in sorted(train)]
    evals: dict[tuple[int, int], Entry] = {}
    for entry in (e for e in entries if e["kind"] == "eval"):
        evals[int(entry.get("max_turns", own)), entry["step"]] = entry
    for turns, step in sorted(evals):
        run.evals.setdefault(turns, []).append(evals[turns, step])
    run.max_turns = own if own in run.evals else max(run.evals, default=0)


def _page(run_dir: Path, run: RunData) -> dict[str, Any]:
    """Everything the template shows."""
    before, after, evaluated = _held_out_episodes(run_dir, run)
    samples, sampled_steps = _training_samples(run_dir, run)
    times = [e["time"] for e in [*run.train, *run.main_evals, *run.one_turn_evals] if value_of(e, "time") > 0]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    pairs = episodes.match(before, after)
    return {
        "run": run,
        "model": run.setting("trainer.policy.model.path", ""),
        "date": f"{datetime.fromtimestamp(min(times), UTC):%d %B %Y, %H:%M} UTC".lstrip("0") if times else "",
        "headlines": _headlines(run, times),
        "signals": all_signals(run.train),
        "accuracy": _accuracy_chart(run),
        "reward": _reward_chart(run),
        "table": _source_table(run, after),
        "outcome_charts": _outcome_charts(run),
        "habit_charts": _habit_charts(run),
        "optimizer_charts": _optimizer_charts(run),
        "time_charts": _time_charts(run),
        "pairs": [(title, [(episodes.view(p.before), episodes.view(p.after)) for p in members])
                  for title, members in episodes.choose_pairs(pairs)],
        "pair_count": len(pairs),
        "evaluated_steps": evaluated,
        "samples": [(o, episodes.OUTCOME_LABELS.get(o, o or "unknown"), n, [episodes.view(r) for r in records])
                    for o, n, records in samples],
        "sampled_steps": sampled_steps,
        "script": Markup(_SCRIPT),
        "script_hash": digest,
    }  # fmt: skip


def _held_out_episodes(run_dir: Path, run: RunData) -> tuple[list[Entry], list[Entry], list[int]]:
    """Episodes of the first and the last evaluation that was written, and their steps; before is empty for only one."""
    files = episodes.trajectory_files(run_dir, "eval")
    ends = files if len(files) <= 1 else [files[0], files[-1]]
    read = [_read_noting(path, run) for path in ends]
    steps = [int(path.stem.rpartition("_")[2]) for path in ends]
    if not read:
        return [], [], []
    return (read[0] if len(read) == 2 else []), read[-1], steps


def _training_samples(run_dir: Path, run: RunData) -> tuple[list[tuple[str, int, list[Entry]]], list[int]]:
    files = episodes.spread(episodes.trajectory_files(run_dir, "train"), episodes.TRAINING_FILES)
    records = [record for path in files for record in _read_noting(path, run)]
    return episodes.choose_samples(records), [int(path.stem.rpartition("_")[2]) for path in files]


def _read_noting(path: Path, run: RunData) -> list[Entry]:
    records, note = episodes.read_lines(path)
    run.notes += [note] if note else []
    return records


def _headlines(run: RunData, times: list[float]) -> list[tuple[str, str, str]]:
    """(label, figure, remark) for the top of the page."""
    out = [
        _accuracy_headline("Held-out accuracy", run.main_evals, f"up to {run.max_turns} turns"),
        _accuracy_headline(
            "With one turn only", run.one_turn_evals, "the same questions" + ", no looking first" * run.sql
        ),
    ]
    steps = len(run.train)
    per_step = [run.setting("trainer.train_batch_size", 0), run.setting("generator.n_samples_per_prompt", 0)]
    if steps:
        counted = sum(value_of(e, "generate/episodes", per_step[0] * per_step[1]) for e in run.train)
        questions = f"{steps * per_step[0]:,} questions asked, " if per_step[0] else ""
        out.append(("Training episodes", f"{counted:,.0f}", f"{questions}{steps:,} steps"))
        tokens = _total(run.train, "generate/tokens")
        out.append(("Tokens written", _short(tokens), "by the model, in training"))
    if len(times) > 1:
        out.append(("Wall time", _duration(max(times) - min(times)), "from first to last record"))
    return [headline for headline in out if headline[1]]


def _accuracy_headline(label: str, evals: list[Entry], remark: str) -> tuple[str, str, str]:
    scored = [e for e in evals if math.isfinite(value_of(e, "eval/all/avg_score"))]
    if not scored:
        return label, "", ""
    first, last = scored[0], scored[-1]
    last_text = f"{100 * last['eval/all/avg_score']:.1f}%"
    if first is last:
        return label, last_text, f"step {last['step']}, {remark}"
    return (
        label,
        f"{100 * first['eval/all/avg_score']:.1f} → {last_text}",
        f"step {first['step']} → {last['step']}, {remark}",
    )


def _accuracy_chart(run: RunData) -> Chart:
    several = f"up to {run.max_turns} turns" if run.max_turns != 1 else "one turn"
    score = "eval/all/avg_score"
    series = [curve(run.main_evals, score, several, "after", markers=True)]
    series.append(curve(run.one_turn_evals, score, "one turn only", "one-turn", markers=True, dashed=True))
    caption = "Share of held-out questions whose answer is right."
    if run.sql:
        caption = "Share of held-out questions whose answer returns the right rows, on databases never trained on."
    return line_chart("accuracy", "Held-out accuracy", caption, "% of questions", series, WIDE)


def _reward_chart(run: RunData) -> Chart:
    smooth = max(1, min(25, len(run.train) // 10))
    values = curve(run.train, "reward/avg_raw_reward", "reward", "training", smooth=smooth)
    unit = "mean reward of a step"
    caption = "Mean reward of the sampled training episodes (1 for a right answer)."
    if smooth > 1:
        caption += f" Strong line: mean of {smooth} steps."
    return line_chart("reward", "Training reward", caption, unit, [values], WIDE)


def _outcome_charts(run: RunData) -> list[Chart]:
    def series(entries: list[Entry], prefix: str) -> list[Series]:
        return [curve(entries, prefix + o, label, o) for o, label in episodes.OUTCOME_LABELS.items()]

    train, held_out = series(run.train, "outcome/"), series(run.main_evals, "eval/outcome/")
    caption = "How sampled training episodes ended."
    return [
        stacked_chart("outcomes", "Training episodes", caption, "% of episodes", train, False, WIDE),
        stacked_chart(
            "eval-outcomes", "Held-out episodes", "How the episodes of each evaluation ended.", "% of episodes",
            held_out, True, WIDE,
        ),
    ]  # fmt: skip


def _habit_charts(run: RunData) -> list[Chart]:
    def both(metric: str) -> list[Series]:
        return [
            curve(run.train, f"generate/{metric}", "training", "training"),
            curve(run.main_evals, f"eval/{metric}", "held-out", "after", markers=True),
        ]

    turns = line_chart("turns", "Turns", "Mean number of actions in an episode.", "turns per episode", both("turns"))
    if not run.sql:
        return [turns, *own_charts(run.train, run.main_evals)]
    errors = [curve(run.train, "sql/error_rate", "SQL errors", "training")]
    first = "Episodes in which a query ran before the answer was given."
    return [
        turns,
        line_chart("looked", "Looked first", first, "% of episodes", both("looked_first")),
        line_chart("errors", "Failed queries", "Queries that failed, in training.", "% of queries", errors, zoom=True),
    ]


def _optimizer_charts(run: RunData) -> list[Chart]:
    def one(key: str, title: str, caption: str, unit: str) -> Chart:
        name = key.rpartition("/")[2]
        return line_chart(name, title, caption, unit, [curve(run.train, key, title, "training")], zoom=True)

    return [
        one("policy/entropy", "Entropy", "Mean entropy of the next-token distribution.", "nats per token"),
        one("policy/grad_norm", "Gradient norm", "Global norm before it is clipped.", "norm"),
        one("policy/clip_frac", "Clipped ratios", "Tokens whose probability ratio was clipped.", "% of tokens"),
        one(
            "policy/logprob_diff",
            "Mismatch",
            "Log-probability of learner less that of rollout, absolute.",
            "nats per token",
        ),
    ]


def _time_charts(run: RunData) -> list[Chart]:
    parts = [curve(run.train, f"timing/{part}", part, part) for part in ("rollout", "update", "push")]
    rest = [
        value_of(e, "timing/step") - sum(value_of(e, f"timing/{p}", 0.0) for p in ("rollout", "update", "push"))
        for e in run.train
    ]
    parts.append(Series("other", parts[0].x, [max(0.0, value) for value in rest], "rest"))
    speed = [curve(run.train, "generate/tokens_per_second", "tokens/s", "training")]
    caption = "Wall time of each training step by what it was spent on."
    return [
        stacked_chart("time", "Time of a step", caption, "seconds per step", parts, True, WIDE),
        line_chart(
            "speed",
            "Generation speed",
            "Tokens the model wrote per second of rollout.",
            "tokens per second",
            speed,
            WIDE,
        ),
    ]


def _source_table(run: RunData, after: list[Entry]) -> list[dict[str, Any]]:
    """Accuracy by kind of question, in the first and last evaluation; the row of all questions comes first."""
    if not run.main_evals:
        return []
    first, last = run.main_evals[0], run.main_evals[-1]
    one_turn = run.one_turn_evals[-1] if run.one_turn_evals else {}
    tasks = {str(r.get("task_id")): str(r.get("source", "")) for r in after}
    counts = Counter(tasks.values())
    total = last.get("eval/questions", len(tasks) or None)
    sources = sorted(k.split("/")[1] for k in last if k.startswith("eval/") and k.endswith("/avg_score"))
    sources.sort(key=lambda s: s != "all")
    rows = []
    for source in sources:
        key = f"eval/{source}/avg_score"
        rows.append({
            "source": "all questions" if source == "all" else source,
            "count": total if source == "all" else counts.get(source),
            "before": value_of(first, key) if first is not last else math.nan,
            "after": value_of(last, key),
            "one_turn": value_of(one_turn, key),
        })  # fmt: skip
    return rows


def _total(entries: list[Entry], key: str) -> float:
    return sum(value for e in entries if math.isfinite(value := value_of(e, key)))


def _short(value: float) -> str:
    """31,234,000 → 31.2 M; nothing for zero."""
    for size, name in ((1e9, " bn"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.0f}" if value else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _percent(value: float | None, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if value is not None and math.isfinite(value) else "–"


def _change(before: float, after: float) -> str:
    points = 100 * (after - before)
    return f"{'+' if points >= 0 else '−'}{abs(points):.1f}" if math.isfinite(points) else "–"


def _template() -> str:
    return resources.files("sqlrl_jax").joinpath("report.html.j2").read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {"percent": _percent}
    environment.filters.update(filters)
    environment.globals["change"] = _change
    return environment
