"""A real model scores the same behind an HTTP server as in the rollout service: one environment, two ways to reach it."""

import asyncio
import itertools
import json
import sys
import threading
from pathlib import Path

import pytest

import launch
from rollout.chat import Chat, load_tokenizer
from rollout.engine.embedded import EmbeddedEngine
from rollout.supervisor import ServiceProcess
from rollout.types import SamplingParams
from sqlrl_jax.config_file import load
from sqlrl_jax.data.demo.generate import ensure
from tests.unit.chat_server import ChatServer, Reply, completion, strip_stop

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
QUESTIONS = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The quickstart's model in conversation style, on sixteen generated questions."""
    demo = tmp_path_factory.mktemp("demo")
    found = [
        f"trainer.policy.model.path={ROOT / 'models' / 'quickstart'}",
        f"data.demo.directory={demo}",
        f"environment.text2sql.database_root={demo / 'databases'}",
        f"data.val_data=[{demo / 'heldout.jsonl'}]",
        "data.demo.train_databases=1",
        f"data.demo.heldout_databases={QUESTIONS // 4}",
        "data.demo.questions_per_database=4",
        "generator.use_conversation_multi_turn=true",
        "generator.max_input_length=512",
        "trainer.policy.row_tokens=1024",
    ]
    ensure(load(CONFIG, found).data.demo)
    return found


class ModelServer(ChatServer):
    """Renders the conversation with the model's own template, generates, and strips stop strings as servers do."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        super().__init__(self.answer)
        self.engine = engine
        self.chat = Chat(load_tokenizer(engine.tokenizer_dir), conversation=True)
        self.order = itertools.count()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def answer(self, request) -> Reply:
        ids = self.chat.prompt_ids(request["messages"])
        if len(ids) >= self.engine.max_context:
            return Reply(400, json.dumps({"message": f"maximum context length is {self.engine.max_context} tokens"}))
        params = SamplingParams(
            request["temperature"], request["top_p"], request["max_tokens"], tuple(request["stop"])
        )  # fmt: skip
        generation = asyncio.run_coroutine_threadsafe(self._generate(ids, params, request["seed"]), self.loop).result(
            60
        )
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(generation.output_ids)}
        text = strip_stop(self.chat.action_text(generation.output_ids), request["stop"])
        return completion(text, generation.finish_reason, usage=usage)

    async def _generate(self, ids, params, seed):
        async with self.engine.session(next(self.order)) as session:
            return await session.generate(ids, params, seed)


def evaluate(capsys, settings, out, *options):
    assert launch.main(["eval", "--config", str(CONFIG), "--out", str(out), *options, *settings]) == 0
    metrics = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    episodes = {row["task_id"]: row for row in map(json.loads, out.read_text().splitlines())}
    return metrics, episodes


@pytest.fixture(scope="module")
def running(settings, tmp_path_factory):
    """The address of a rollout service that somebody else started."""
    command = [sys.executable, str(ROOT / "launch.py"), "serve", "--config", str(CONFIG), *settings]
    service = ServiceProcess(command, tmp_path_factory.mktemp("service") / "service.log", start_timeout=120)
    yield service.start()
    service.stop()


def test_served_scores_what_the_rollout_service_scores(settings, running, capsys, tmp_path):
    hosted, ours = evaluate(capsys, settings, tmp_path / "hosted.jsonl", f"generator.services=[{running}]")
    engine = EmbeddedEngine(load(CONFIG, settings))
    try:
        with ModelServer(engine) as server:
            served, theirs = evaluate(capsys, settings, tmp_path / "served.jsonl", "--server", server.url)
    finally:
        engine.close()
    assert len(ours) == len(theirs) == QUESTIONS
    for name, row in ours.items():
        assert [turn["action"] for turn in row["turns"]] == [turn["action"] for turn in theirs[name]["turns"]]
        assert [turn["tokens"] for turn in row["turns"]][:-1] == [turn["tokens"] for turn in theirs[name]["turns"]][:-1]
    assert {**hosted, "model": ""} == {**served, "model": ""}
    assert 0 < hosted["eval/all/avg_score"] < 1
    assert hosted["eval/turns"] > 1  # some looked, so observations went both ways
