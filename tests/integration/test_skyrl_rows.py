"""SkyRL-SQL's rows train as they are: two steps of the quickstart's model on a parquet file, straight and prepared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.sql import prompt, schema
from rollout.sql.executor import Executor
from sqlrl_jax.config import DemoConfig
from sqlrl_jax.data.demo.generate import ensure
from sqlrl_jax.data.tasks import read_tasks
from tests.unit import omnisql_tree as tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's questions as rows of SkyRL-SQL, their databases where OmniSQL has Spider's and SynSQL's."""
    data = tmp_path_factory.mktemp("skyrl") / "data"
    demo = DemoConfig(directory=str(data / "demo"), train_databases=4, heldout_databases=1, questions_per_database=4)
    ensure(demo)
    template = prompt.choose_template("", "short", "sqlite")
    with Executor(data / "demo/databases", workers=1) as executor:
        rows = []
        for task in read_tasks(data / "demo/train.jsonl"):
            db_id, question = task.fields["db_id"], task.fields["question"]
            text = schema.open_schema(executor, db_id, "short").text()
            [*_, user] = template.messages(text, question, "", 5)
            messages = [{"role": "system", "content": "{question}"}, {"role": "user", "content": user["content"]}]
            spec = {"method": "rule", "ground_truth": task.fields["gold_sql"]}
            kind = ("spider", "synsql")[len(rows) % 2]
            rows.append(tree.skyrl_row(prompt=messages, reward_spec=spec, db_id=db_id, data=kind))
    for folder in ("spider/database", "SynSQL-2.5M/databases"):
        (data / folder).parent.mkdir()
        (data / folder).symlink_to(data / "demo/databases", target_is_directory=True)
    tree.write_parquet(data / "train.parquet", rows)
    tree.write_parquet(data / "validation.parquet", rows[:4])
    return data


def launch(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "launch.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_steps_on_a_parquet_file(data: Path, tmp_path: Path) -> None:
    launch(
        *("--config", "configs/quickstart.yaml", f"trainer.run_dir={tmp_path / 'run'}", "trainer.max_steps=2"),
        *("trainer.train_batch_size=4", "trainer.policy_mini_batch_size=4", "trainer.policy.rows_per_micro_batch=4"),
        *("trainer.eval_interval=0", "trainer.eval_before_train=false", "generator.n_samples_per_prompt=2"),
        *(f"data.train_data=[{data}/train.parquet]", f"data.val_data=[{data}/validation.parquet]"),
        *(f"environment.text2sql.database_root={data}", "data.demo.train_databases=0"),
    )
    episodes = [
        json.loads(line)
        for path in sorted((tmp_path / "run/trajectories").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    trained = [e for e in episodes if e["task_id"].startswith("skyrl-sql-train-")]
    assert len(trained) == 2 * 4 * 2
    assert {e["db_root"] for e in trained} == {"spider/database", "SynSQL-2.5M/databases"}
    assert all(e["outcome"] in ("correct", "wrong", "malformed", "sql_error", "overflow") for e in trained)
    assert all("{question}" in e["prompt"] for e in trained)  # the literal placeholder of the row's own messages
    assert any(turn["status"] == "ok" for e in trained for turn in e["turns"])  # queries found their databases


def test_prepared_rows_are_the_same(data: Path, tmp_path: Path) -> None:
    launch("prepare", "skyrl-sql", "--data", data, "--out", tmp_path)
    for name in ("train", "validation"):
        assert read_tasks(tmp_path / f"skyrl-sql-{name}.jsonl") == read_tasks(data / f"{name}.parquet")
