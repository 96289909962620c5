"""A person's own data from the command line: CSV files and questions to checked questions over a database."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sqlrl_jax.data.tasks import read_tasks

ROOT = Path(__file__).resolve().parents[2]
MEMBERS = [(i, f"Member {i}", ("Berlin", "Dresden")[i % 2], f"0{1000 + i}") for i in range(1, 41)]
LOANS = [(i, i % 40 + 1, 9.5 if i % 3 else "", f"2022-01-{i % 28 + 1:02d}") for i in range(1, 121)]
QUESTIONS = """\
Question;SQL;Hint
How many members live in Berlin?;SELECT count(*) FROM members WHERE city = 'Berlin';
Who lives in 01007?;SELECT name FROM members WHERE zip = '01007';
What are the fines of Member 2?;"SELECT fine FROM loans
JOIN members ON members.id = member WHERE name = 'Member 2' AND fine IS NOT NULL";fine in euros
Which members never borrowed?;SELECT name FROM members WHERE id NOT IN (SELECT member FROM loans);
How many books?;SELECT count(*) FROM book;
"""


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_csv_files_to_checked_questions(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    rows = ["id,name,city,zip", *(",".join(map(str, row)) for row in MEMBERS)]
    (library / "members.csv").write_text("\r\n".join(rows), encoding="utf-16")
    rows = ["id;member;fine;day", *(";".join(map(str, row)) for row in LOANS)]
    (library / "loans.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    (tmp_path / "questions.csv").write_text(QUESTIONS)
    out, good = tmp_path / "out", tmp_path / "good.jsonl"

    made = launch(
        "prepare", "own", "--databases", str(library), "--questions", str(tmp_path / "questions.csv"), "--out", str(out)
    )
    assert made.returncode == 0, made.stderr
    assert "5 questions over 1 database, 4 for training, 1 for validation" in made.stdout
    assert f"environment.text2sql.database_root={out}/databases" in made.stdout

    checked = launch(
        "prepare",
        "--check",
        "--questions",
        str(out / "questions.jsonl"),
        "--databases",
        str(out / "databases"),
        "--out",
        str(good),
    )
    assert checked.returncode == 1, checked.stderr
    assert "no such table: book" in checked.stdout
    assert [task.id for task in read_tasks(good)] == ["questions-00001", "questions-00002", "questions-00003"]
    dropped = (tmp_path / "good.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in dropped] == ["empty", "failing"]

    (library / "loans.csv").write_text("id;member\n1;2;3\n")
    refused = launch(
        "prepare", "own", "--databases", str(library), "--questions", str(tmp_path / "questions.csv"), "--out", str(out)
    )
    assert refused.returncode == 2
    assert f"error: {library / 'loans.csv'}:2: row 1 has 3 fields" in refused.stderr
