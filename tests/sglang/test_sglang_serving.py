"""`launch.py serve --model` with the real SGLang: a chat over HTTP says what transformers says, to those who have the key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from small_model import MARKS, START_TIMEOUT, Reference, settings, write_model

from rollout.chat import Chat, load_tokenizer

pytestmark = MARKS
ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "the largest city"}]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "cities"
    write_model(folder / "export", 0)
    return folder


@pytest.fixture(scope="module")
def url(run_folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    engine = [given for given in settings(run_folder) if "engine_init_kwargs" in given]
    command = [sys.executable, "launch.py", "serve", "--model", str(run_folder), "--listen", address, *engine]
    log = run_folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--api-key-env", "SERVE_KEY"],
            cwd=ROOT,
            env=os.environ | {"SERVE_KEY": "a key", "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while f"serving cities ({run_folder}/export) at http://{address}/v1" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://{address}/v1"
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in log.read_text()


def post(url, body, key="a key"):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_a_chat_says_what_transformers_says(url, run_folder):
    answer = post(url, {"model": "cities", "messages": MESSAGES, "temperature": 0, "max_tokens": 12})
    chat = Chat(load_tokenizer(str(run_folder / "export")))
    ids = list(chat.prompt_ids(MESSAGES))
    reference, said = Reference(run_folder / "export"), []
    while len(said) < 12 and not (said and said[-1] in chat.end_ids):
        said.append(int(reference.logprobs(ids + said)[-1].argmax()))
    assert answer["model"] == "cities"
    assert answer["choices"][0]["message"]["content"] == chat.decode([i for i in said if i not in chat.end_ids])
    assert answer["usage"]["completion_tokens"] == len(said)


def test_who_has_no_key_gets_nothing(url):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(url, {"model": "cities", "messages": MESSAGES, "max_tokens": 1}, key="another")
