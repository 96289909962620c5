"""`launch.py eval` against a served model: scripted policies, real databases, faults, interruption and going on."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import ChatServer, Reply, completion

import launch
from rollout.chat_episode import neutral
from rollout.errors import UserError
from sqlrl_jax.episodes_file import EpisodesFile

ROOT = Path(__file__).resolve().parents[2]
CITIES = [("Ulm", 126), ("Bonn", 331), ("Kiel", 248)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of questions over one small database."""
    folder = tmp_path_factory.mktemp("eval")
    database = folder / "databases" / "city" / "city.sqlite"
    database.parent.mkdir(parents=True)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE city (name TEXT, people INTEGER)")
        connection.executemany("INSERT INTO city VALUES (?, ?)", CITIES)
    connection.close()
    for name, cities in (("north", CITIES[1:]), ("south", CITIES[:1])):
        rows = [
            {"id": f"{name}-{city}", "db_id": "city", "question": f"How many live in {city}?", "gold_sql": gold(city)}
            for city, _ in cities
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def gold(city: str) -> str:
    return f"SELECT people FROM city WHERE name = '{city}'"


def asked(request) -> str:
    """The city that the conversation is about."""
    text = json.dumps(request["messages"])
    return next(city for city, _ in CITIES if f"How many live in {city}?" in text)


def looks_then_answers(request) -> str:
    """Right but for Kiel."""
    city = asked(request)
    if len(request["messages"]) <= 2:
        return f"<think>look</think>\n<sql>SELECT name FROM city WHERE name = '{city}'</sql>"
    return f"<think>seen</think>\n<solution>{gold('Bonn' if city == 'Kiel' else city)}</solution>"


def command(data, server, *options, questions=("north", "south")) -> list[str]:
    files = [str(data / f"{name}.jsonl") for name in questions]
    return [
        "eval", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--server", server.url, "--questions", *files,
        "--databases", str(data / "databases"), *options, "environment.text2sql.workers=1",
    ]  # fmt: skip


def evaluate(capsys, *arguments, status=0):
    """Runs the command in this process: the last line's JSON, all that was printed, the error."""
    assert launch.main(command(*arguments)) == status
    output, error = capsys.readouterr()
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return json.loads(last) if status == 0 else {}, output, error


def episodes(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sets_table_and_json(data, capsys, tmp_path):
    out = tmp_path / "episodes.jsonl"
    with ChatServer(looks_then_answers) as server:
        metrics, output, _ = evaluate(capsys, data, server, "--out", str(out))
    assert metrics["eval/north/avg_score"] == 0.5
    assert metrics["eval/south/avg_score"] == 1.0
    assert metrics["eval/all/avg_score"] == pytest.approx(2 / 3)
    assert metrics["eval/mean_over_sets"] == 0.75
    assert (metrics["eval/looked_first"], metrics["eval/turns"]) == (1.0, 2.0)
    assert (metrics["model"], metrics["max_turns"]) == ("small", 5)
    assert "south, 1 questions: accuracy 100.0" in output
    assert "mean of sets" in output
    rows = {row["task_id"]: row for row in episodes(out)}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "north-Bonn": "correct", "north-Kiel": "wrong", "south-Ulm": "correct",
    }  # fmt: skip
    row = rows["south-Ulm"]
    assert [m["role"] for m in row["messages"]][-3:] == ["assistant", "user", "assistant"]
    assert row["messages"][-3]["content"].endswith("'Ulm'</sql>")  # the server's client put the stop string back
    assert "<observation>" in row["messages"][-2]["content"]
    assert [turn["status"] for turn in row["turns"]] == ["ok", "solution"]
    assert [turn["tokens"] for turn in row["turns"]] == [5, 5]


def test_every_turn_limit_and_markdown(data, capsys):
    with ChatServer(looks_then_answers) as server:
        metrics, output, _ = evaluate(capsys, data, server, "--turns", "1,2", "--markdown")
    assert metrics["turns"]["1"]["eval/all/avg_score"] == 0.0
    assert metrics["turns"]["2"]["eval/mean_over_sets"] == 0.75
    assert "| north | 2 | 50.0 |" in output
    assert output.count("| --- | ---: |") == 2


def test_samples_pass_at_k_and_votes(data, capsys):
    """Of four samples by seed: one right, three wrong in two different ways; the vote goes to the right one only if equal."""
    seeds: dict[str, list[int]] = {}

    def policy(request) -> str:
        known = seeds.setdefault(asked(request), [])
        known.append(request["seed"])
        guesses = ["SELECT 7", gold(asked(request)), "SELECT 8", f"{gold(asked(request))} LIMIT 5"]
        return f"<solution>{guesses[len(known) - 1]}</solution>"

    with ChatServer(policy) as server:
        options = ("--samples", "4", "--concurrency", "1", "generator.eval_sampling_params.temperature=1.0")
        metrics, output, _ = evaluate(capsys, data, server, *options)
    assert all(len(set(known)) == 4 for known in seeds.values())
    assert metrics["eval/all/avg_score"] == metrics["eval/all/pass_at_1"] == 0.5
    assert metrics["eval/all/pass_at_2"] == pytest.approx(1 - 1 / 6)
    assert metrics["eval/all/pass_at_4"] == metrics["eval/south/pass_at_n"] == 1.0
    assert metrics["eval/all/maj_at_n"] == 1.0
    assert "pass@2" in output
    assert "maj@4" in output


def test_several_greedy_samples_are_warned_about(data, capsys):
    with ChatServer(looks_then_answers) as server:
        _, output, _ = evaluate(capsys, data, server, "--samples", "2")
    assert "greedy samples are all the same" in output


def test_a_full_context_is_scored_and_told_apart(data, capsys):
    full = Reply(400, '{"message": "maximum context length is 4096 tokens"}')
    with ChatServer(lambda request: full if len(request["messages"]) > 2 else looks_then_answers(request)) as server:
        metrics, _, _ = evaluate(capsys, data, server)
    assert metrics["eval/outcome/overflow"] == 1.0
    with ChatServer(lambda request: full) as server:
        metrics, _, _ = evaluate(capsys, data, server)
    assert metrics["eval/outcome/prompt_too_long"] == 1.0


def test_lengths_go_by_the_servers_count(data, capsys):
    def policy(request):
        size = 300 + 10 * len(request["messages"])
        return completion("<sql>SELECT 1</sql>", usage={"prompt_tokens": size, "completion_tokens": 9})

    with ChatServer(policy) as server:
        metrics, _, _ = evaluate(capsys, data, server, "generator.max_input_length=320")
    assert metrics["eval/outcome/overflow"] == 1.0
    assert metrics["eval/turns"] == 1.0


def test_a_server_that_dies_leaves_what_was_finished_and_resume_goes_on(data, capsys, tmp_path):
    out, whole = tmp_path / "episodes.jsonl", tmp_path / "whole.jsonl"
    with ChatServer(
        lambda r: looks_then_answers(r) if asked(r) == "Bonn" else Reply(422, '{"detail": "gone"}')
    ) as server:
        _, output, error = evaluate(capsys, data, server, "--out", str(out), "--concurrency", "1", status=2)
    assert "answered 422: gone" in error
    assert "stopped after 1 of 3 episodes" in output
    assert "the 1 of 3 questions that ended first" in output
    assert "--resume" in output
    assert [row["task_id"] for row in episodes(out)] == ["north-Bonn"]
    with ChatServer(looks_then_answers) as server:
        _, _, error = evaluate(capsys, data, server, "--out", str(out), status=2)
        assert "exists already" in error
        resumed, _, _ = evaluate(capsys, data, server, "--out", str(out), "--resume")
        assert "Bonn" not in {asked(request) for request in server.requests}
        straight, _, _ = evaluate(capsys, data, server, "--out", str(whole))
    assert resumed == straight
    assert len(episodes(out)) == 3


def test_resume_refuses_what_does_not_belong_together(data, capsys, tmp_path):
    out = tmp_path / "episodes.jsonl"
    with ChatServer(looks_then_answers) as server:
        evaluate(capsys, data, server, "--out", str(out))
        resume = ("--out", str(out), "--resume")
        _, _, error = evaluate(capsys, data, server, *resume, "generator.eval_sampling_params.top_p=0.5", status=2)
        assert "another model, sampling or environment" in error
        changed = tmp_path / "changed"
        changed.mkdir()
        (changed / "databases").symlink_to(data / "databases")
        text = (data / "south.jsonl").read_text().replace("SELECT people", "SELECT name")
        (changed / "south.jsonl").write_text(text)
        root = f"environment.text2sql.database_root={data / 'databases'}"
        arguments = command(changed, server, *resume, root, questions=("south",))
        arguments = [a for a in arguments if a not in ("--databases", str(changed / "databases"))]
        assert launch.main(arguments) == 2
        assert "'south-Ulm' had another gold_sql" in capsys.readouterr().err
        out.write_text(out.read_text() + '{"torn')
        before = len(server.requests)
        metrics, _, _ = evaluate(capsys, data, server, *resume)
        assert metrics["eval/mean_over_sets"] == 0.75
        assert len(server.requests) == before
        assert len(episodes(out)) == 3


def test_a_question_with_missing_samples_is_played_again_as_a_whole(data, capsys, tmp_path):
    out = tmp_path / "episodes.jsonl"
    with ChatServer(looks_then_answers) as server:
        evaluate(capsys, data, server, "--out", str(out), "--samples", "2")
        lines = out.read_text().splitlines()
        out.write_text("\n".join(line for line in lines if '"sample": 1' not in line or "Ulm" not in line) + "\n")
        server.requests.clear()
        evaluate(capsys, data, server, "--out", str(out), "--samples", "2", "--resume")
        assert [asked(request) for request in server.requests] == ["Ulm"] * 4
    keys = [(row["task_id"], row["sample"]) for row in episodes(out)]
    assert len(keys) == len(set(keys)) == 6


def test_a_missing_database_is_named_and_never_scored(data, capsys, tmp_path):
    out = tmp_path / "episodes.jsonl"
    lost = tmp_path / "lost.jsonl"
    lost.write_text(
        json.dumps({"id": "lost", "db_id": "nowhere", "question": "How many live in Ulm?", "gold_sql": "SELECT 1"})
    )
    with ChatServer(looks_then_answers) as server:
        arguments = command(data, server, "--out", str(out), "--questions", str(lost), questions=("south",))
        assert launch.main(arguments) == 2
    error = capsys.readouterr().err
    assert "task 'lost' sample 0" in error
    assert "nowhere" in error
    assert [row["task_id"] for row in episodes(out)] == ["south-Ulm"]


def test_the_file_of_episodes(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert EpisodesFile(empty, {}, resume=False).done == {}
    (tmp_path / "latin.jsonl").write_bytes(b'{"task_id": "\xe9"}\n')
    for name, resume, says in [("", False, "exists"), ("", True, "Is a directory"), ("latin.jsonl", True, "not UTF-8")]:
        with pytest.raises(UserError, match=says):
            EpisodesFile(tmp_path / name, {}, resume=resume)


def test_ctrl_c_keeps_what_was_finished(data, tmp_path):
    out = tmp_path / "episodes.jsonl"

    def policy(request):
        return looks_then_answers(request) if asked(request) == "Bonn" else Reply(delay=30.0)

    with ChatServer(policy) as server:
        arguments = command(data, server, "--out", str(out), "--concurrency", "2")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (out.exists() and out.read_text().endswith("\n")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "stopped after 1 of 3 episodes" in output
    assert error.strip() == "stopped"
    assert [row["task_id"] for row in episodes(out)] == ["north-Bonn"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--served-model", "x"], "--served-model needs --server"),
        (["--server-extra", "{}"], "--server-extra needs --server"),
        (["--server", "http://127.0.0.1:9/v1", "--model", "models/quickstart"], "--served-model"),
        (["--server", "http://127.0.0.1:9/v1", "--server-extra", "[]"], "expected an object"),
        (["--server", "here"], "expected http://"),
        (["--resume"], "--out"),
    ],
)
def test_options_that_do_not_go_together(data, capsys, options, says):
    questions = ["--questions", str(data / "south.jsonl"), "--databases", str(data / "databases")]
    assert launch.main(["eval", "--config", str(ROOT / "configs" / "quickstart.yaml"), *questions, *options]) == 2
    assert says in capsys.readouterr().err


def test_control_tokens_in_data_are_broken_up():
    assert neutral("a <|im_end|> b <| x |> c <||> 1 <|2") == "a < |im_end|> b <| x |> c <||> 1 <|2"
    assert neutral("\ud800") == "?"


def test_an_environment_that_is_not_sql(capsys, tmp_path):
    rows = [{"id": f"c{n}", "question": f"What is {n} plus one?", "answer": f"{n} + 1"} for n in (1, 2)]
    questions = tmp_path / "sums.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def policy(request) -> str:
        seen = json.dumps(request["messages"])
        number = 1 if "What is 1 plus" in seen else 2
        return f"<calc>{number} + 1</calc>" if len(request["messages"]) == 1 else "<answer>2</answer>"

    with ChatServer(policy) as server:
        config = str(ROOT / "configs" / "calculator.yaml")
        status = launch.main(["eval", "--config", config, "--server", server.url, "--questions", str(questions)])
        assert server.requests[0]["stop"] == ["</calc>", "</answer>"]
    output = capsys.readouterr().out
    assert status == 0
    metrics = json.loads(output.strip().splitlines()[-1])
    assert (metrics["eval/all/avg_score"], metrics["eval/turns"]) == (0.5, 2.0)
