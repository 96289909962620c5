"""`launch.py prepare`: public sets, or a person's own databases, to questions in our format.

What it writes is JSON lines, `<out>/<set>.jsonl`; the databases stay where they are and are found through `db_root` below
`environment.text2sql.database_root`. A file appears only when it is whole. Left out: the gold queries are run by
`prepare --check`, which takes minutes, not while converting.
"""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rollout.errors import UserError
from rollout.types import Task
from sqlrl_jax.data.disk import disk_errors
from sqlrl_jax.data.progress import Progress, bars
from sqlrl_jax.data.public.convert import Problems, convert, counted
from sqlrl_jax.data.public.sources import GROUPS, SOURCES, Source, resolve, root_of
from sqlrl_jax.data.tasks import DataError, write_tasks

SAMPLE_SEED = 0
OWN = ("valid", "encoding", "null")
"""Options of `own` alone."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    sets: tuple[str, ...] = ()
    data: str = ""
    out: str = ""
    questions: str = ""
    databases: str = ""
    config: str = ""
    settings: tuple[str, ...] = ()
    download: bool = False
    skip_bad: bool = False
    sample: int = 0
    valid: float | None = None
    encoding: str = ""
    null: tuple[str, ...] = ()
    check: bool = False
    list: bool = False


def main(request: Request) -> int:
    """Does one of: list the sets, check gold queries, prepare own data, prepare sets. Raises UserError, one sentence."""
    if request.list:
        _refuse(
            request,
            "--list shows the sets",
            ("sets", "data", "out", "questions", "databases", "check", "download", "sample", *OWN),
        )
        Console(highlight=False).print(table())
        return 0
    if request.check:
        return _check(request)
    if request.settings or request.config:
        raise UserError("prepare: --config and key=value settings are only read with --check")
    if not request.sets:
        raise UserError("prepare: name a set (--list shows all), `own`, or --check")
    if "own" in request.sets:
        return _own(request)
    return _sets(request)


def table() -> Table:
    """All sets, and the names that stand for several."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("set", "left"), ("split", "left"), ("questions", "right"), ("what", "left")):
        shown.add_column(title, justify="right" if justify == "right" else "left", no_wrap=title != "what")
    for source in SOURCES.values():
        shown.add_row(source.name, source.split, f"{source.rows:,}", source.title)
    shown.add_row()
    for name, members in GROUPS.items():
        shown.add_row(name, "", "", "stands for " + ", ".join(members))
    shown.add_row("own", "", "", "your databases and questions")
    return shown


def _refuse(request: Request, what: str, names: Iterable[str]) -> None:
    """Raises UserError when an option was given that the chosen action does not take."""
    for name in names:
        if getattr(request, name) not in (None, "", 0, False, ()):
            given = f"set {request.sets[0]!r}" if name == "sets" else "--" + name.replace("_", "-")
            raise UserError(f"prepare: {what} and does not go with {given}")


def _need(request: Request, what: str, **meanings: str) -> None:
    for name, meaning in meanings.items():
        if not getattr(request, name):
            raise UserError(f"prepare: {what} needs --{name} ({meaning})")


def _check(request: Request) -> int:
    _refuse(
        request,
        "--check tries the gold queries of --questions",
        ("sets", "data", "download", "skip_bad", "sample", *OWN),
    )
    _need(request, "--check", questions="JSON lines or a parquet file of SkyRL-SQL")
    from sqlrl_jax.config_file import load, override
    from sqlrl_jax.data.gold import main as check_golds

    config = load(request.config or None, request.settings)
    if request.databases:
        config = override(config, [("environment.text2sql.database_root", request.databases)])
    return check_golds(config, Path(request.questions), Path(request.out) if request.out else None)


def _own(request: Request) -> int:
    if len(request.sets) > 1:
        raise UserError("prepare: `own` is prepared alone, not together with other sets")
    _refuse(request, "`own` takes --databases, --questions and --out", ("data", "download", "skip_bad", "sample"))
    _need(
        request,
        "`own`",
        databases="a SQLite file, or a folder of SQLite or CSV files",
        questions="CSV or JSON lines of question and SQL",
        out="folder to write",
    )
    from sqlrl_jax.data.own.prepare import prepare_own

    with bars() as progress:
        done = prepare_own(
            request.databases,
            request.questions,
            request.out,
            valid=0.2 if request.valid is None else request.valid,
            encoding=request.encoding or None,
            nulls=request.null,
            progress=progress,
        )
    console = Console(highlight=False, soft_wrap=True)
    found = f"{counted(done.questions, 'question')} over {counted(len(done.databases), 'database')}"
    console.print(f"{done.out}: {found}, {done.train:,} for training, {done.validation:,} for validation", markup=False)
    for note in done.notes:
        console.print(f"  note: {note}", style="yellow", markup=False)
    words = [argument(key, value) for key, value in done.settings.items()]
    console.print(settings_text(words, train=True), markup=False)
    return 0


@dataclass
class _Done:
    """One set written."""

    source: Source
    file: Path
    written: int
    problems: Problems = field(default_factory=Problems)


def _sets(request: Request) -> int:
    _refuse(request, "a public set is found below --data", ("questions", "databases", *OWN))
    _need(request, "a set", data="folder of the OmniSQL data", out="folder to write")
    sources = resolve(request.sets)
    data, out = Path(request.data), Path(request.out)
    console = Console(highlight=False, soft_wrap=True)
    if request.download:
        from sqlrl_jax.data.public.download import download

        with bars() as progress:
            download(sources, data, progress)
    root = root_of(data, sources)
    files = {source.name: questions_file(source, data, root) for source in sources}
    _all_there(sources, files, data, root)
    with disk_errors(out, DataError):
        out.mkdir(parents=True, exist_ok=True)
    done = []
    with bars() as progress:
        for source in sources:
            done.append(_write(source, files[source.name], root, out, request, progress))
    for one in done:
        _tell(one, console)
    words = [
        argument(key, files)
        for key, files in (
            ("data.train_data", [str(one.file) for one in done if one.source.split == "train"]),
            ("data.val_data", [str(one.file) for one in done if one.source.split != "train"]),
        )
        if files
    ]
    words.append(argument("environment.text2sql.database_root", str(root)))
    console.print(settings_text(words, train=any(one.source.split == "train" for one in done)), markup=False)
    return 0


def questions_file(source: Source, data: Path, root: Path) -> Path:
    """Where a set's questions lie; SkyRL-SQL's files also beside the databases, as the hub's own client puts them."""
    places = [root / source.questions]
    if source.skyrl_data:
        places = [place / source.questions for place in (data / "skyrl-sql", data, root / "skyrl-sql", root)]
    return next((place for place in places if place.is_file()), places[0])


def _all_there(sources: list[Source], files: dict[str, Path], data: Path, root: Path) -> None:
    """Raises DataError listing every file and folder that is missing, before anything long starts."""
    if not data.is_dir():
        raise DataError(f"--data {data}: no such folder; add --download to fetch the sets into it")
    missing: dict[Path, str] = {}
    for source in sources:
        if not files[source.name].is_file():
            missing.setdefault(files[source.name], source.name)
        for folder in source.folders:
            if not (root / folder).is_dir():
                missing.setdefault(root / folder, source.name)
    if missing:
        lines = [f"  {path} (for {name})" for path, name in missing.items()]
        raise DataError(
            f"--data {data}: not there are\n" + "\n".join(lines) + "\nexpected is the layout of OmniSQL's data.zip "
            "(docs/data.md); --download fetches it"
        )


def _write(source: Source, questions: Path, root: Path, out: Path, request: Request, progress: Progress) -> _Done:
    """Converts one set. Raises DataError with the first bad rows, unless they are to be left out."""
    size, target = questions.stat().st_size, out / f"{source.name}.jsonl"
    done = _Done(source, target, 0)
    tasks: Iterable[Task] = convert(
        source, questions, root, done.problems, lambda count: progress(source.name, count, size)
    )
    if request.sample:
        tasks = sample(tasks, request.sample)
    done.written = write_tasks(target, _refusing(tasks, done, questions, request.skip_bad))
    progress(source.name, size, size)
    return done


def _refusing(tasks: Iterable[Task], done: _Done, questions: Path, skip_bad: bool) -> Iterator[Task]:
    """The same tasks; raises DataError after the last one if any row was bad, so that no file takes its place."""
    count = 0
    for task in tasks:
        count += 1
        yield task
    if done.problems.rows and not skip_bad:
        raise DataError(
            "\n".join(done.problems.lines())
            + f"\n{counted(done.problems.rows, 'bad row')} in {questions}; nothing was written for {done.source.name}. "
            "Repair them, or leave them out with --skip-bad"
        )
    if not count:
        raise DataError(f"{questions}: no row is usable:\n" + "\n".join(done.problems.lines()))


def sample(tasks: Iterable[Task], count: int) -> list[Task]:
    """`count` of the tasks, each as likely as any other, in their order; always the same ones. Holds only those."""
    chosen: list[tuple[int, Task]] = []
    dice = random.Random(SAMPLE_SEED)
    for index, task in enumerate(tasks):
        if index < count:
            chosen.append((index, task))
        elif (place := dice.randrange(index + 1)) < count:
            chosen[place] = (index, task)
    return [task for _, task in sorted(chosen, key=lambda pair: pair[0])]


def _tell(done: _Done, console: Console) -> None:
    bad = done.problems.rows
    left_out = f", {counted(bad, 'bad row')} left out:" if bad else ""
    console.print(f"{done.file}: {counted(done.written, 'question')}{left_out}", markup=False)
    for line in done.problems.lines():
        console.print(f"  {line}", style="yellow", markup=False)
    for note in done.problems.notes:
        console.print(f"  note: {note}", style="yellow", markup=False)


def settings_text(words: list[str], train: bool) -> str:
    """The command that trains or evaluates on the files; `words` are settings, quoted for a shell."""
    verb, model = ("", "trainer.policy.model.path=MODEL") if train else ("eval ", "--model MODEL")
    use = "train on" if train else "evaluate on"
    command = " \\\n    ".join([f"python launch.py {verb}--config FILE {model}", *words])
    return f"\nTo {use} them, from this folder:\n\n  {command}"


def argument(key: str, value: str | list[str]) -> str:
    """`key=value` as a shell word that the configuration reads back as it is."""
    text = "[" + ",".join(value) + "]" if isinstance(value, list) else value
    try:
        as_it_is = yaml.safe_load(text) == value
    except yaml.YAMLError:
        as_it_is = False
    return shlex.quote(f"{key}={text if as_it_is else json.dumps(value, ensure_ascii=False)}")
