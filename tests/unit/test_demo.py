"""The demo task: what it hides is really hidden, looking really finds it, and the same parameters give the same files."""

import json
import random
import re
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from rollout.sql import Executor
from rollout.sql.prompt import built_in
from rollout.types import Task
from sqlrl_jax.config import DemoConfig
from sqlrl_jax.data.demo import generate as demo
from sqlrl_jax.data.demo.generate import (
    Item,
    Parameters,
    accuracy,
    ensure,
    generate,
    items,
    prompt_text,
    response_text,
    same,
)
from sqlrl_jax.data.demo.questions import KINDS
from sqlrl_jax.data.demo.schema import PLAIN, SPELLINGS, spell
from sqlrl_jax.data.demo.script import Player, play, run_query
from sqlrl_jax.data.demo.tokenizer import PHRASES, TAGS, train_tokenizer
from sqlrl_jax.data.tasks import DataError, read_tasks

SMALL = {"seed": 3, "train_databases": 6, "heldout_databases": 4, "questions_per_database": 5}
PARAMETERS = Parameters(
    seed=1, train_databases=60, heldout_databases=60, questions_per_database=8, demonstration_databases=60
)


def rows_of(root: Path, task: Task, sql: str) -> list[tuple[object, ...]]:
    path = root / "databases" / task.fields["db_id"] / f"{task.fields['db_id']}.sqlite"
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("demo") / "task", **SMALL, demonstration_databases=8)


def test_gold_answers_from_the_written_files_are_not_empty(folder: Path) -> None:
    for name in demo.SETS:
        for task in read_tasks(folder / f"{name}.jsonl"):
            rows = rows_of(folder, task, task.fields["gold_sql"])
            assert rows
            assert all(cell is not None for row in rows for cell in row)


def test_sets_are_disjoint_and_complete(folder: Path) -> None:
    used = {name: {t.fields["db_id"] for t in read_tasks(folder / f"{name}.jsonl")} for name in demo.SETS}
    assert [len(used[name]) for name in demo.SETS] == [6, 4, 8]
    assert len(set.union(*used.values())) == 18
    assert {p.name for p in (folder / "databases").iterdir()} == set.union(*used.values())
    assert len(read_tasks(folder / "train.jsonl")) == 30


def test_same_parameters_same_lines_other_seed_others(tmp_path: Path, folder: Path) -> None:
    again = generate(tmp_path / "again", **SMALL, demonstration_databases=8)
    other = generate(tmp_path / "other", **{**SMALL, "seed": 4}, demonstration_databases=8)
    for name in demo.SETS:
        text = (folder / f"{name}.jsonl").read_bytes()
        assert (again / f"{name}.jsonl").read_bytes() == text
        assert (other / f"{name}.jsonl").read_bytes() != text


def test_more_databases_leave_the_earlier_ones_as_they_are(tmp_path: Path, folder: Path) -> None:
    more = generate(tmp_path / "more", **{**SMALL, "train_databases": 9}, demonstrations=False)
    assert read_tasks(more / "train.jsonl")[:30] == read_tasks(folder / "train.jsonl")
    assert not (more / "demonstrations.jsonl").read_text()


def test_a_second_call_does_nothing_and_other_parameters_replace(tmp_path: Path) -> None:
    out = generate(tmp_path / "task", **SMALL, demonstration_databases=1)
    (out / "heldout.jsonl").write_text("kept")
    config = DemoConfig(directory=str(out), **SMALL)
    assert ensure(config) == out  # demonstrations that nobody asked for do no harm
    assert (out / "heldout.jsonl").read_text() == "kept"
    ensure(config.model_copy(update={"heldout_databases": 2}))
    assert len(read_tasks(out / "heldout.jsonl")) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["task"]


def test_an_unfinished_or_foreign_folder_is_not_destroyed(tmp_path: Path) -> None:
    out = tmp_path / "task"
    out.mkdir()
    (out / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"no readable complete\.json"):
        generate(out, **SMALL)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        generate(out, **SMALL)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_guess_is_right_exactly_when_nothing_is_hidden() -> None:
    for item in items(PARAMETERS, "heldout"):
        guess, _ = run_query(item.connection, item.question.guess(item.database.parent))
        tied = item.question.kind == "tie" and len(item.gold) > 1
        assert same(guess, item.gold) == (not item.task.fields["hidden"] and not tied), item.task


def test_knowing_only_a_part_of_what_is_hidden_is_not_enough() -> None:
    """Two spelled filters need two looks; a filter and a renamed column need both to be found."""
    seen: Counter[str] = Counter()
    for item in items(PARAMETERS, "train"):
        question, hidden = item.question, item.task.fields["hidden"]
        if len(hidden) < 2:
            continue
        for forgotten in hidden:
            values = {f.column.name: f.word if f.column.name == forgotten else f.stored for f in question.filters}
            number = question.table.number if question.table.number == forgotten else question.table.real_number
            rows, _ = run_query(item.connection, question.sql(item.database.parent, values, number))
            assert not same(rows, item.gold)
            seen[question.kind] += 1
    assert seen["two"] > 10
    assert seen["both"] > 10


def test_ties_for_the_highest_and_the_lowest_are_as_common_as_none() -> None:
    tied: Counter[str] = Counter()
    tables = {
        (i.database.db_id, t.name): i.database.rows[t.name]
        for i in items(PARAMETERS, "train")
        for t in i.database.children
    }
    for rows in tables.values():
        for name, extreme in (("highest", max(r[-1] for r in rows)), ("lowest", min(r[-1] for r in rows))):
            texts = [r[1] for r in rows if r[-1] == extreme]
            assert len(set(texts)) == len(texts)  # so that also a set tells one row from all
            tied[name] += len(texts) > 1
    assert all(0.35 < tied[name] / len(tables) < 0.65 for name in ("highest", "lowest"))


def test_answers_compare_as_multisets() -> None:
    assert same([(1,), (2,), (1,)], [(2,), (1,), (1,)])
    assert not same([(1,), (2,)], [(2,), (1,), (1,)])


def test_prompt_hides_spelling_and_names() -> None:
    for item in items(PARAMETERS, "heldout"):
        prompt = prompt_text(item.task)
        schema, question = item.task.fields["schema"], item.task.fields["question"]
        assert built_in("short").messages(schema, question, "", 5) == [{"role": "user", "content": prompt}]
        for chosen in item.question.filters:
            assert chosen.stored == chosen.word or chosen.stored not in prompt
        table = item.question.table
        assert f"{table.number})" in prompt
        assert table.number == table.real_number or not re.search(rf"\b{table.real_number}\b", prompt)


def test_floor_and_ceiling() -> None:
    guess = accuracy(PARAMETERS, "heldout", Player.guesser())
    expert = accuracy(PARAMETERS, "heldout", Player.expert())
    assert set(guess) == {*KINDS, "all"}
    assert 0.2 <= guess["all"] <= 0.4
    assert set(expert.values()) == {1.0}
    tie_safe = accuracy(PARAMETERS, "heldout", Player(0, 0, 0, 0, 0, 1))
    assert guess["all"] < tie_safe["all"] <= 0.5  # as far as one gets without looking


def test_looking_alone_or_mending_alone_is_not_enough() -> None:
    looks = accuracy(PARAMETERS, "heldout", Player(1, 1, 0, 0, 0, 1))
    mends = accuracy(PARAMETERS, "heldout", Player(0, 0, 1, 0, 1, 1))
    assert looks["value"] == looks["join"] == looks["two"] == 1.0
    assert max(looks["both"], looks["column"], looks["tie"]) < 0.8
    assert mends["column"] == mends["tie"] == 1.0
    assert max(mends["value"], mends["join"], mends["two"]) < 0.8


def test_demonstrations_replay_to_what_was_written() -> None:
    """Every action is one query or one solution, solutions end the episode, and at most five turns are needed."""
    modes: Counter[str] = Counter()
    for item in items(PARAMETERS, "demonstrations"):
        episode = play(item.database, item.question, item.connection, Player.mixed(0.35), random.Random(item.task.id))
        assert len(episode.actions) == len(episode.observations) + 1 <= demo.MAX_TURNS
        for action, observation in zip(episode.actions, episode.observations, strict=False):
            sql = re.fullmatch(r"<think>[^<]+</think><sql>([^<]+)</sql>", action)
            assert sql
            assert run_query(item.connection, sql[1])[1] == observation
        assert re.fullmatch(r"<think>[^<]+</think><solution>[^<]+</solution>", episode.actions[-1])
        modes[episode.actions[0].removeprefix("<think>").split("<")[0].split()[0]] += 1
    total = modes.total()
    assert set(modes) == {"guess", "look", "test"}
    assert 0.2 < modes["look"] / total < 0.4
    assert modes["guess"] / total > 0.5


def test_the_environment_shows_what_the_scripts_read(folder: Path) -> None:
    parameters = Parameters(**SMALL, demonstration_databases=8)
    with Executor(folder / "databases") as executor:
        seen = set()
        for item in items(parameters, "demonstrations"):
            rng = random.Random(item.task.id)
            episode = play(item.database, item.question, item.connection, Player.expert(), rng)
            queries = re.findall("<(?:sql|solution)>(.*)</", "\n".join(episode.actions))
            words = {f.column.name: f.word for f in item.question.filters}
            misspelled = item.question.sql(item.database.parent, words, item.question.table.real_number)
            for query in [*queries, item.question.guess(item.database.parent), misspelled]:
                expected = run_query(item.connection, query)[1]
                assert executor.run(item.task.fields["db_id"], query).observation == expected
                seen |= {end for end in ("(no rows)", "NULL") if expected.endswith(end)} | {expected.split(":")[0]}
        assert seen > {"(no rows)", "NULL", "SQL Error"}


def test_every_kind_and_spelling_occurs() -> None:
    chosen: list[Item] = list(items(PARAMETERS, "train"))
    kinds = Counter(item.question.kind for item in chosen)
    assert all(abs(kinds[kind] / len(chosen) - share) < 0.06 for kind, share in KINDS.items())
    spellings = {t.spelling for item in chosen for table in item.database.tables for t in table.texts}
    assert spellings == {PLAIN, *SPELLINGS}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_differ_from_the_word_and_contain_it(spelling: str) -> None:
    stored = spell(("paris", "rome"), spelling, random.Random(0))
    assert all(word in value and word != value for word, value in stored.items())
    assert len(set(stored.values())) == 2


def test_tokenizer_keeps_copies_alike_and_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(demo.corpus(PARAMETERS), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(tokenizer) <= 1024
    assert tokenizer.eos_token == "<|im_end|>"
    inner = [tokenizer.encode(text) for text in ("#paris", "'#paris'", "city\n#paris\n")]
    assert inner[1][-len(inner[0]) - 1 : -1] == inner[0] == inner[2][2:-1]
    assert all(len(tokenizer.encode(text)) == 1 for text in (*TAGS, *PHRASES, "paris", " city", "SELECT", " FROM"))
    lengths: list[int] = []
    for item in items(PARAMETERS, "heldout"):
        assert len(tokenizer.encode(prompt_text(item.task))) <= 70
        text = response_text(play(item.database, item.question, item.connection, Player.expert(), random.Random(0)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text  # tags survive
        lengths.append(len(ids))
    assert max(lengths) <= 240


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["hello user"], tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode("Zürich ✓  x")) == "Zürich ✓  x"


def test_command_prints_floor_and_ceiling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train-databases", "2", "--heldout-databases", "3", "--demonstration-databases", "2"]
    demo.main(["--out", str(tmp_path / "t"), "--tokenizer", str(tmp_path / "tok"), *sizes])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
    assert "100.0%" in line
    marker = json.loads((tmp_path / "t" / "complete.json").read_text())
    assert marker["train_databases"] == 2
