"""What `launch.py serve --model` takes, and what it says to what it does not take. A real server: tests/sglang."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_model import write_model

import launch
from rollout.errors import UserError
from sqlrl_jax.config import Config
from sqlrl_jax.serve_model import Request, command, main, model_folder, served_name


@pytest.fixture
def run_folder(tmp_path):
    write_model(tmp_path / "run" / "export")
    return tmp_path / "run"


def request(model: Path, listen: str = "127.0.0.1:0", key_variable: str = "") -> Request:
    return Request(str(model), listen, "", key_variable, ())


def test_a_model_folder_or_a_runs_export_is_served(run_folder):
    assert model_folder(run_folder / "export") == run_folder / "export"
    assert model_folder(run_folder) == run_folder / "export"
    assert served_name(run_folder) == served_name(run_folder / "export") == "run"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected a run folder"):
        model_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds adapters alone"):
        model_folder(tmp_path)


def test_other_machines_are_let_in_with_a_key_alone(run_folder, monkeypatch):
    with pytest.raises(UserError, match=r"0\.0\.0\.0:30000: other machines reach this address.*--api-key-env"):
        main(Config(), request(run_folder, "0.0.0.0:30000"))
    monkeypatch.delenv("SERVE_KEY", raising=False)
    with pytest.raises(UserError, match="SERVE_KEY: there is no such variable"):
        main(Config(), request(run_folder, "0.0.0.0:30000", "SERVE_KEY"))


def test_without_sglang_the_message_says_what_to_do(run_folder):
    if "sglang" in sys.modules:
        pytest.skip("SGLang is installed here")
    with pytest.raises(UserError, match=r"SGLang is not installed here.*generator\.inference_engine\.python"):
        main(Config(), request(run_folder))


def test_the_command_in_the_other_environment_is_one_that_is_taken(run_folder):
    asked = Request(str(run_folder), "127.0.0.1:1", "sql", "KEY", ("generator.inference_engine.python=/other/python",))
    again = launch._parse(command(asked))
    assert (again.model, again.listen, again.served_model, again.api_key_env) == (
        str(run_folder),
        "127.0.0.1:1",
        "sql",
        "KEY",
    )
    assert launch._config(again).generator.inference_engine.python == ""


def test_serve_asks_what_to_serve(capsys):
    assert launch.main(["serve"]) == 2
    assert "--config FILE" in capsys.readouterr().err
