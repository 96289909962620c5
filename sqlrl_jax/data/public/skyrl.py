"""The rows of SkyRL-SQL, as they are: `data.train_data=[train.parquet]` works, and so does `launch.py prepare skyrl-sql`.

Each row brings its own messages. They are kept word for word, with the placeholders `{db_details}`,
`{external_knowledge}` and `{question}` that were never filled in the system message. Question and knowledge are read out of
the user message only to be shown and checked; the model reads the messages. Left out: `method` of `reward_spec` and
`data_source`, which say nothing that `data` does not.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rollout.errors import UserError
from rollout.types import Task
from sqlrl_jax.data.public.sources import SKYRL_ROOTS
from sqlrl_jax.data.tasks import DataError, check_text

COLUMNS = ("prompt", "env_class", "reward_spec", "db_id", "data")
_QUESTION = re.compile(r".*\{question\}:(.*)\Z", re.DOTALL)
_KNOWLEDGE = re.compile(r".*\{external_knowledge\}:(.*?);?\s*\{question\}:", re.DOTALL)


def skyrl_tasks(path: Path) -> Iterator[tuple[int, Task]]:
    """(row from 1, task) of a parquet file. Raises DataError naming file, row and field."""
    for number, row in parquet_rows(path):
        yield number, skyrl_task(row, f"{path}: row {number}", skyrl_id(path.stem, number))


def skyrl_id(stem: str, number: int) -> str:
    """The same whether the file is read directly or prepared."""
    return f"skyrl-sql-{stem}-{number:05d}"


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, row) with the columns of SkyRL-SQL, a few at a time. Raises DataError for a file that is no parquet."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: parquet is read by the library `datasets`: pip install -e '.[data]'") from None
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what we raise
    try:
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset(
                "parquet", data_files=[glob.escape(str(path))], split="train", streaming=True, cache_dir=cache
            )
            missing = [name for name in COLUMNS if name not in (rows.features or {})]
            if missing:
                raise DataError(f"{path}: column {missing[0]} is missing; a file of SkyRL-SQL has {', '.join(COLUMNS)}")
            yield from enumerate(rows, 1)
    except (ValueError, OSError) as error:  # pyarrow's errors are these
        raise DataError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    finally:
        datasets.logging.set_verbosity(level)


def skyrl_task(row: dict[str, Any], where: str, task_id: str) -> Task:
    """One row as a task. Raises DataError naming the field."""
    if row["env_class"] != "text2sql":
        raise DataError(f"{where}: field env_class: expected 'text2sql', found {row['env_class']!r}")
    if row["data"] not in SKYRL_ROOTS:
        raise DataError(f"{where}: field data: expected {', '.join(SKYRL_ROOTS)}, found {row['data']!r}")
    spec = row["reward_spec"]
    gold = check_text(spec.get("ground_truth") if isinstance(spec, dict) else None, "reward_spec.ground_truth", where)
    messages = _messages(row["prompt"], where)
    question, evidence = shown(messages)
    fields = {
        "db_id": check_text(row["db_id"], "db_id", where),
        "db_root": SKYRL_ROOTS[row["data"]],
        "question": question,
        "gold_sql": gold,
        "evidence": evidence,
        "prompt": messages,
    }
    return Task(id=task_id, source=row["data"], fields=fields)


def shown(messages: list[dict[str, str]]) -> tuple[str, str]:
    """Question and external knowledge from the last user message; the whole message where it has another form."""
    user = [m["content"] for m in messages if m["role"] == "user"][-1]
    question, knowledge = _QUESTION.match(user), _KNOWLEDGE.match(user)
    text = question.group(1).strip() if question else ""
    return text or user.strip(), knowledge.group(1).strip() if knowledge else ""


def _messages(prompt: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(prompt, list):
        raise DataError(f"{where}: field prompt: expected a list of messages, found {type(prompt).__name__}")
    messages = []
    for number, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise DataError(f"{where}: field prompt[{number}]: expected role and content")
        messages.append(
            {name: check_text(message.get(name), f"prompt[{number}].{name}", where) for name in ("role", "content")}
        )
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{where}: field prompt: no message of the role user")
    return messages
