"""`launch.py prepare` on a small folder of every public set: what it writes, and what it says when something is off."""

import json
import shlex
from pathlib import Path
from typing import Any

import omnisql_tree as tree
import pytest

import launch
from rollout.types import Task
from sqlrl_jax.config_file import load
from sqlrl_jax.data import prepare
from sqlrl_jax.data.public.sources import GROUPS, SOURCES, resolve
from sqlrl_jax.data.tasks import read_tasks

COUNT, NAMES = tree.COUNT, tree.NAMES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tree.build(tmp_path / "data")


def run(capfd: Any, *arguments: Any) -> tuple[int, str, str]:
    code = launch.main(["prepare", *map(str, arguments)])
    out, error = capfd.readouterr()
    return code, out, error


def fails(capfd: Any, *arguments: Any) -> str:
    code, _, error = run(capfd, *arguments)
    assert code == 2
    assert "Traceback" not in error
    return error.partition("error: ")[2]


SKYRL_PROMPT = tree.skyrl_row()["prompt"]
EXPECTED = {
    "spider-train": [("00001", "pets_1", "spider/database", "How many singers do we have?", COUNT, {})],
    "spider-dev": [
        ("00001", "concert_singer", "spider/database", "How many singers do we have?", COUNT, {}),
        ("00002", "pets_1", "spider/database", "How many singers do we have?", NAMES, {}),
    ],
    "spider-test": [("00001", "soccer_3", "spider/test_database", "How many singers do we have?", COUNT, {})],
    "spider-dk": [("00001", "new_concert_singer", "Spider-DK/database", "How many vocalists?", COUNT, {"type": 2})],
    "spider-syn": [("00001", "pets_1", "spider/database", "How many animals?", COUNT, {})],
    "spider-realistic": [("00001", "concert_singer", "spider/database", "How many singers do we have?", COUNT, {})],
    "bird-train": [
        ("00001", "movies", "bird/train/train_databases", "How many?", COUNT, {"evidence": "a singer sings"})
    ],
    "bird-dev": [
        (
            number,
            "california_schools",
            "bird/dev_20240627/dev_databases",
            "How many?",
            COUNT,
            {"evidence": "a singer sings", "difficulty": "simple"},
        )
        for number in ("0", "17")
    ],
    "synsql": [
        (
            "0000001",
            "shop",
            "SynSQL-2.5M/databases",
            "Who?",
            NAMES,
            {"difficulty": "Highly Complex", "question_style": "Vague"},
        )
    ],
    "ehrsql": [("00001", "mimic_iii", "EHRSQL/database", "Which drugs?", NAMES, {})],
    "sciencebenchmark": [("00001", "cordis", "sciencebenchmark/databases", "Größe?", NAMES, {})],
}


def expected(name: str) -> list[Task]:
    if name.startswith("skyrl-sql"):
        rows = [("shop", "synsql", "SynSQL-2.5M/databases"), ("pets_1", "spider", "spider/database")]
        rows = rows[1:] if name.endswith("validation") else rows
        return [
            Task(
                f"{name}-{number:05d}",
                data,
                {
                    "db_id": db_id,
                    "db_root": folder,
                    "question": "How many?",
                    "gold_sql": COUNT,
                    "evidence": "old is above 25",
                    "prompt": SKYRL_PROMPT,
                },
            )
            for number, (db_id, data, folder) in enumerate(rows, 1)
        ]
    if name == "spider2-sqlite":
        fields: dict[str, Any] = {
            "db_id": "E_commerce",
            "db_root": "spider2_sqlite/databases",
            "question": "Ages?",
            "gold_results": [{"names": ["age"], "columns": [["30", ""]], "ignore_order": True}],
            "evidence": "",
        }
        return [Task("spider2-sqlite-local002", name, fields)]
    return [
        Task(
            f"{name}-{own}",
            name,
            {"db_id": db_id, "db_root": folder, "question": question, "gold_sql": gold, "evidence": "", **extra},
        )
        for own, db_id, folder, question, gold, extra in EXPECTED[name]
    ]


def test_every_set(root: Path, tmp_path: Path, capfd: Any) -> None:
    code, out, _ = run(capfd, *SOURCES, "--data", root, "--out", tmp_path / "out")
    assert code == 0
    for name, source in SOURCES.items():
        tasks = read_tasks(tmp_path / "out" / f"{name}.jsonl")
        assert tasks == expected(name)
        for task in tasks:
            db_id = task.fields["db_id"]
            assert (root / task.fields["db_root"] / db_id / f"{db_id}.sqlite").is_file()
        assert name in out or source.skyrl_data
    ids = [task.id for name in SOURCES for task in expected(name)]
    assert len(set(ids)) == len(ids)


def test_twice_gives_the_same_bytes_and_leaves_nothing_else(root: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    run(capfd, "bird", "--data", root, "--out", out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run(capfd, "bird-dev", "bird", "--data", root, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert sorted(first) == ["bird-dev.jsonl", "bird-train.jsonl"]


@pytest.mark.parametrize("folder", ["", "with space", "a,b: [c]"])
def test_the_settings_it_prints_can_be_used(folder: str, tmp_path: Path, capfd: Any) -> None:
    root, out = tree.build(tmp_path / folder / "omni" / "data"), tmp_path / folder / "out"
    code, text, _ = run(capfd, "spider", "--data", root.parent, "--out", out)  # the folder above data/ will do
    assert code == 0
    command = text.partition("from this folder:\n\n")[2].replace("\\\n", " ")
    words = [word for word in shlex.split(command) if word.startswith(("data.", "environment."))]
    config = load(None, words)
    assert config.data.train_data == (str(out / "spider-train.jsonl"),)
    assert config.data.val_data == (str(out / "spider-dev.jsonl"), str(out / "spider-test.jsonl"))
    assert config.environment.text2sql.database_root == str(root)
    assert shlex.split(command)[:4] == ["python", "launch.py", "--config", "FILE"]


def test_rows_of_skyrl_beside_the_databases(root: Path, tmp_path: Path, capfd: Any) -> None:
    """As `hf download --local-dir` leaves them: train.parquet above db_files/data."""
    place = tmp_path / "sql"
    (place / "db_files").mkdir(parents=True)
    (root / "skyrl-sql/train.parquet").rename(place / "train.parquet")
    root.rename(place / "db_files/data")
    assert run(capfd, "skyrl-sql-train", "--data", place, "--out", tmp_path / "out")[0] == 0
    assert read_tasks(tmp_path / "out/skyrl-sql-train.jsonl") == expected("skyrl-sql-train")


def test_sample(root: Path, tmp_path: Path, capfd: Any) -> None:
    rows = [tree.spider_row("pets_1", question=f"q{i}") for i in range(500)]
    tree.write_json(root / "spider/train_spider_enhanced_with_cot.json", rows)
    kept = []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert run(capfd, "spider-train", "--data", root, "--out", out, "--sample", 50)[0] == 0
        kept.append([task.id for task in read_tasks(out / "spider-train.jsonl")])
    assert kept[0] == kept[1] == sorted(kept[0])
    assert len(kept[0]) == 50
    assert 10 < sum(name > "spider-train-00250" for name in kept[0]) < 40
    assert prepare.sample(expected("bird-dev"), 5) == expected("bird-dev")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"question": "absent"}, "field question is missing; the row has db_id, query"),
        ({"query": "absent"}, "field query or SQL is missing"),
        ({"query": None}, "field query: expected text, found NoneType"),
        ({"query": "  "}, "field query is empty"),
        ({"question": 3}, "field question: expected text, found int"),
        ({"question": "half \ud83d"}, "field question: holds half of a surrogate pair"),
        ({"db_id": ["pets_1"]}, "field db_id: expected text, found list"),
        ({"db_id": "nowhere"}, "nowhere/nowhere.sqlite does not exist"),
        ({"db_id": ".."}, "field db_id: '..' is not a plain name"),
        ({"db_id": "../database/pets_1"}, "field db_id: '../database/pets_1' is not a plain name"),
    ],
)
def test_a_bad_row_is_named_and_may_be_left_out(
    fields: dict[str, Any], said: str, root: Path, tmp_path: Path, capfd: Any
) -> None:
    row = {**tree.spider_row("pets_1"), **fields}
    row = {key: value for key, value in row.items() if value != "absent"}
    file = root / "spider/train_spider_enhanced_with_cot.json"
    file.write_text(json.dumps([tree.spider_row("pets_1"), row]))
    error = fails(capfd, "spider-train", "--data", root, "--out", tmp_path / "out")
    assert error.startswith(f"{file}: row 2: field ")
    assert said in error
    assert "1 bad row in" in error
    assert not list((tmp_path / "out").iterdir())
    code, out, _ = run(capfd, "spider-train", "--data", root, "--out", tmp_path / "out", "--skip-bad")
    assert code == 0
    assert "1 question, 1 bad row left out:" in out
    assert said in out
    assert read_tasks(tmp_path / "out/spider-train.jsonl") == expected("spider-train")


def test_many_bad_rows_are_counted_and_the_first_told(root: Path, tmp_path: Path, capfd: Any) -> None:
    rows = [tree.spider_row("pets_1", question="") for _ in range(30)] + [tree.spider_row("gone") for _ in range(5)]
    tree.write_json(root / "spider/train_spider_enhanced_with_cot.json", rows[::-1])
    error = fails(capfd, "spider-train", "--data", root, "--out", tmp_path / "out")
    lines = error.splitlines()
    assert "gone.sqlite does not exist (and 4 more rows like it)" in lines[0]
    assert lines[20] == "… and 11 more bad rows"
    assert lines[21].startswith("35 bad rows in ")
    error = fails(capfd, "spider-train", "--data", root, "--out", tmp_path / "out", "--skip-bad")
    assert "no row is usable" in error


def test_a_file_that_is_no_database(root: Path, tmp_path: Path, capfd: Any) -> None:
    (root / "EHRSQL/database/mimic_iii/mimic_iii.sqlite").write_text("version https://git-lfs.github.com/spec/v1")
    error = fails(capfd, "ehrsql", "--data", root, "--out", tmp_path / "out")
    assert "dev.json: row 1: field db_id: " in error
    assert "mimic_iii.sqlite is not a SQLite database" in error


def test_ids_of_a_set_must_be_unique(root: Path, tmp_path: Path, capfd: Any) -> None:
    row = {"question_id": 7, "db_id": "california_schools", "question": "q", "evidence": "", "SQL": COUNT}
    tree.write_json(root / "bird/dev_20240627/dev.json", [row, row, {**row, "question_id": None}])
    error = fails(capfd, "bird-dev", "--data", root, "--out", tmp_path / "out")
    assert "dev.json: row 2: field question_id: 'bird-dev-7' was already used in row 1" in error
    assert "dev.json: row 3: field question_id: expected a number or text, found None" in error


def test_gold_files(root: Path, tmp_path: Path, capfd: Any) -> None:
    gold = root / "spider/dev_gold.sql"
    tree.write_gold(gold, (COUNT.replace(" ", "  ") + " ;", "concert_singer"), ("SELECT 1", "pets_1"))
    code, out, _ = run(capfd, "spider-dev", "--data", root, "--out", tmp_path / "out")
    assert code == 0
    assert f"{root / 'spider/dev.json'} has 2 rows; the published set has 1,034" in " ".join(out.split())
    assert f"the gold query of 1 row of {root / 'spider/dev.json'} differs from {gold} (row 2)" in " ".join(out.split())
    assert read_tasks(tmp_path / "out/spider-dev.jsonl")[1].fields["gold_sql"] == "SELECT 1"
    tree.write_gold(gold, (COUNT, "concert_singer"), (NAMES, "car_1"))
    assert "row 2: field db_id: 'pets_1', but query 2 of" in fails(
        capfd, "spider-dev", "--data", root, "--out", tmp_path
    )
    tree.write_gold(gold, *[(COUNT, "concert_singer"), (NAMES, "pets_1")] * 2)
    assert "has 4 queries" in fails(capfd, "spider-dev", "--data", root, "--out", tmp_path)
    tree.write_gold(gold, (COUNT, "concert_singer"))
    assert "has 1 queries" in fails(capfd, "spider-dev", "--data", root, "--out", tmp_path)
    gold.write_text("SELECT 1\n")
    assert f"{gold}:1: expected SQL, a tab and db_id" in fails(capfd, "spider-dev", "--data", root, "--out", tmp_path)
    gold.write_bytes(b"SELECT '\xff'\tpets_1\n")
    assert f"{gold}: byte 8 is not UTF-8" in fails(capfd, "spider-dev", "--data", root, "--out", tmp_path)
    gold.unlink()
    assert run(capfd, "spider-dev", "--data", root, "--out", tmp_path / "out")[0] == 0
    odd = "SELECT 'a\u2028b\x0cc'"  # not the end of a line
    tree.write_json(root / "spider/dev.json", [tree.spider_row("pets_1", query=odd)])
    gold.write_bytes(f"{odd}\tpets_1\r\n".encode())
    assert run(capfd, "spider-dev", "--data", root, "--out", tmp_path / "out")[0] == 0
    assert [task.fields["gold_sql"] for task in read_tasks(tmp_path / "out/spider-dev.jsonl")] == [odd]


def test_everything_missing_is_listed_before_anything_is_done(root: Path, tmp_path: Path, capfd: Any) -> None:
    (root / "spider/dev.json").unlink()
    (root / "spider/test_database").rename(root / "elsewhere")
    error = fails(capfd, "published", "--data", root, "--out", tmp_path / "out")
    assert f"{root / 'spider/dev.json'} (for spider-dev)" in error
    assert f"{root / 'spider/test_database'} (for spider-test)" in error
    assert not (tmp_path / "out").exists()
    assert "no such folder; add --download" in fails(capfd, "spider", "--data", tmp_path / "no", "--out", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected a JSON array"),
        (b'{"a": 1}', "expected a JSON array"),
        (b"[]", "holds no questions"),
        (b'[{"db_id": "pets_1", "query"', "row 1: the file ends inside this row"),
        (b'[{"db_id": "pe\xff"}]', "byte 14 is not UTF-8"),
        (b'[{"db_id": nil, "question": "0123456789"}]', "row 1: not valid JSON"),
        (b"[3]", "row 1: expected an object"),
    ],
)
def test_files_that_are_no_json(content: bytes, said: str, root: Path, tmp_path: Path, capfd: Any) -> None:
    file = root / "spider/train_spider_enhanced_with_cot.json"
    file.write_bytes(content)
    error = fails(capfd, "spider-train", "--data", root, "--out", tmp_path / "out", "--skip-bad")
    assert error.startswith(str(file))
    assert said in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "name a set"),
        ("spider-dve --data . --out x", "did you mean 'spider-dev'"),
        ("spider-dev --out x", "a set needs --data"),
        ("spider-dev --data .", "a set needs --out"),
        ("spider-dev --data . --out x --questions q", "does not go with --questions"),
        ("spider-dev --data . --out x trainer.seed=1", "only read with --check"),
        ("own spider-dev --data . --out x", "`own` is prepared alone"),
        ("own --questions q --out x", "`own` needs --databases"),
        ("own --questions q --databases d --out x --download", "does not go with --download"),
        ("--check", "--check needs --questions"),
        ("--check --questions q --skip-bad", "does not go with --skip-bad"),
        ("--check --questions q --valid 0.2", "does not go with --valid"),
        ("spider-dev --check --questions q", "does not go with set 'spider-dev'"),
        ("--list --data x", "does not go with --data"),
    ],
)
def test_options_that_do_not_fit(arguments: str, said: str, capfd: Any) -> None:
    error = fails(capfd, *arguments.split())
    assert said in error
    assert error.count("\n") == 1


def test_own(root: Path, tmp_path: Path, capfd: Any) -> None:
    questions, out = tmp_path / "q.csv", tmp_path / "my out"
    questions.write_text("question,sql\n" + "".join(f"How many over {n}?,{COUNT} WHERE age > {n}\n" for n in range(9)))
    database = root / "spider/database/pets_1/pets_1.sqlite"
    code, text, _ = run(capfd, "own", "--databases", database, "--questions", questions, "--out", out, "--valid", 0.4)
    assert code == 0
    assert "9 questions over 1 database, 5 for training, 4 for validation" in text
    words = shlex.split(text.partition("from this folder:\n\n")[2].replace("\\\n", " "))[4:]
    config = load(None, [word for word in words if "model" not in word])
    assert len(read_tasks(config.data.train_data[0])) == 5
    assert (Path(config.environment.text2sql.database_root) / "pets_1/pets_1.sqlite").is_file()


def test_list(capfd: Any) -> None:
    code, out, _ = run(capfd, "--list")
    assert code == 0
    assert all(name in out for name in (*SOURCES, *GROUPS, "own"))


def test_names_come_before_or_after_options() -> None:
    after = launch._parse(["prepare", "--data", "d", "spider", "bird", "--out", "o", "ehrsql"])
    assert sorted(after.what) == ["bird", "ehrsql", "spider"]
    assert [source.name for source in resolve(["published", "spider-dev"])] == list(GROUPS["published"])


def test_real_questions_through_a_spider_file(shared_dir: Path, tmp_path: Path, capfd: Any) -> None:
    devset = shared_dir / "data/devset"
    tasks = [task for task in read_tasks(devset / "questions.jsonl") if task.source == "spider-train"]
    rows = [
        {"db_id": t.fields["db_id"], "query": t.fields["gold_sql"], "question": t.fields["question"]} for t in tasks
    ]
    root = tmp_path / "data"
    tree.write_json(root / "spider/train_spider_enhanced_with_cot.json", rows)
    (root / "spider/database").symlink_to(devset / "databases", target_is_directory=True)
    assert run(capfd, "spider-train", "--data", root, "--out", tmp_path / "out")[0] == 0
    back = read_tasks(tmp_path / "out/spider-train.jsonl")
    assert len(back) == 6402
    for old, new in zip(tasks, back, strict=True):
        assert new.source == old.source
        assert new.fields == {**old.fields, "db_root": "spider/database"}
