"""Rows of SkyRL-SQL: used as they are, with their messages word for word, and named when something is off."""

import builtins
from pathlib import Path
from typing import Any

import omnisql_tree as tree
import pytest

from rollout.errors import UserError
from sqlrl_jax.config import Config
from sqlrl_jax.config_file import override
from sqlrl_jax.data.public.skyrl import shown
from sqlrl_jax.data.questions import load_questions
from sqlrl_jax.data.tasks import DataError, read_tasks, write_tasks


def test_a_run_reads_the_parquet_file_as_it_is(tmp_path: Path) -> None:
    train = tree.write_parquet(
        tmp_path / "train.parquet", [tree.skyrl_row(), tree.skyrl_row(data="bird", db_id="movies")]
    )
    held_out = tree.write_parquet(tmp_path / "validation.parquet", [tree.skyrl_row(data="spider", db_id="pets_1")])
    questions = load_questions(
        override(Config(), [("data.train_data", [str(train)]), ("data.val_data", [str(held_out)])])
    )
    assert [task.id for task in questions.train] == ["skyrl-sql-train-00001", "skyrl-sql-train-00002"]
    assert [task.id for task in questions.val] == ["skyrl-sql-validation-00001"]
    assert [(task.fields["db_root"], task.fields["db_id"]) for task in (*questions.train, *questions.val)] == [
        ("SynSQL-2.5M/databases", "shop"),
        ("bird/train/train_databases", "movies"),
        ("spider/database", "pets_1"),
    ]
    first = questions.train[0]
    assert first.fields["prompt"] == tree.skyrl_row()["prompt"]
    assert "{db_details}. Knowledge: {external_knowledge}." in first.fields["prompt"][0]["content"]
    assert (first.fields["question"], first.fields["evidence"]) == ("How many?", "old is above 25")
    assert first.fields["gold_sql"] == tree.COUNT
    write_tasks(tmp_path / "again.jsonl", questions.train)
    assert read_tasks(tmp_path / "again.jsonl") == questions.train


@pytest.mark.parametrize(
    ("user", "question", "evidence"),
    [
        ("{db_details}:S;\n {external_knowledge}: K1;K2;\n {question}: Q?\nmore ", "Q?\nmore", "K1;K2"),
        ("{db_details}:CREATE;\n {question}: Q; {x}", "Q; {x}", ""),
        ("{db_details}:a {question}: b;\n {external_knowledge}: ;\n {question}: Q", "Q", ""),
        ("Just a question", "Just a question", ""),
        ("{db_details}:S;\n {question}:  ", "{db_details}:S;\n {question}:", ""),
    ],
)
def test_question_and_knowledge_are_read_out(user: str, question: str, evidence: str) -> None:
    messages = [
        {"role": "system", "content": tree.SYSTEM},
        {"role": "user", "content": "old {question}: no"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": user},
    ]
    assert shown(messages) == (question, evidence)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"env_class": "gsm8k"}, "field env_class: expected 'text2sql', found 'gsm8k'"),
        ({"data": "wikisql"}, "field data: expected synsql, spider, bird, found 'wikisql'"),
        ({"data": None}, "field data: expected synsql, spider, bird, found None"),
        ({"db_id": ""}, "field db_id is empty"),
        ({"reward_spec": {"method": "rule", "ground_truth": None}}, "field reward_spec.ground_truth: expected text"),
        ({"reward_spec": None}, "field reward_spec.ground_truth: expected text"),
        ({"prompt": []}, "field prompt: no message of the role user"),
        ({"prompt": None}, "field prompt: expected a list of messages"),
        ({"prompt": [{"role": "user", "content": None}]}, "field prompt[0].content: expected text"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "field prompt: no message of the role user"),
    ],
)
def test_bad_rows_are_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tree.write_parquet(tmp_path / "train.parquet", [tree.skyrl_row(), {**tree.skyrl_row(), **fields}])
    with pytest.raises(DataError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}: row 2: {said}")


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tree.write_parquet(tmp_path / "a.parquet", [{"question": "q"}])
    with pytest.raises(DataError, match="column prompt is missing; a file of SkyRL-SQL has prompt, env_class"):
        read_tasks(path)
    path = tree.write_parquet(tmp_path / "train.parquet", [tree.skyrl_row()] * 50)
    whole = path.read_bytes()
    for broken in (whole[:-30], whole[: len(whole) // 2], b"", b"PAR1", whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(broken)
        with pytest.raises(DataError) as caught:
            read_tasks(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_tasks(tmp_path / "none.parquet")


def test_odd_names_of_folders(tmp_path: Path) -> None:
    path = tree.write_parquet(tmp_path / "a[1]*{b}" / "train.parquet", [tree.skyrl_row()])
    assert len(read_tasks(path)) == 1


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree.write_parquet(tmp_path / "train.parquet", [tree.skyrl_row()])
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
        read_tasks(path)
