"""The client of served models: what it sends, what it puts back, and every way a server can fail."""

import asyncio
import json
import socket
import time
from dataclasses import replace
from itertools import count

import pytest
from chat_server import ChatServer, Reply, completion, strip_stop
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rollout.chat_client import (
    ChatClient,
    ContextFull,
    ServerOptions,
    ServerRefused,
    _completion,
    _parse,
    _words,
    checked_key,
    json_object,
    restore_stop,
    with_model,
)
from rollout.errors import InfrastructureError, UserError
from rollout.types import SamplingParams

STOPS = ("</sql>", "</solution>")
PARAMS = SamplingParams(temperature=0.0, top_p=0.95, max_tokens=2048, stop=STOPS)
ASK = [{"role": "user", "content": "how many?"}]
FAST = ServerOptions(url="", model="small", retries=2, backoff=0.01, timeout=10.0)


def complete(server, seed=7, **options):
    async def run():
        async with ChatClient(
            replace(FAST, url=server if isinstance(server, str) else server.url, **options)
        ) as client:
            return await client.complete(ASK, PARAMS, seed)

    return asyncio.run(run())


def in_turn(*replies):
    """Answers the n-th request with the n-th reply, and the last one from then on."""
    number = count()
    return lambda request: replies[min(next(number), len(replies) - 1)]


def test_a_turn_and_what_is_sent():
    with ChatServer(lambda request: "<think>one</think><sql>SELECT 1</sql>") as server:
        answer = complete(server, seed=(1 << 40) + 5, api_key="sk-secret", extra={"top_k": 20, "top_p": None})
    assert answer.text == "<think>one</think><sql>SELECT 1</sql>"
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("stop", 10, 5)
    [request], [headers] = server.requests, server.headers
    assert request == {
        "model": "small",
        "messages": ASK,
        "temperature": 0.0,
        "max_tokens": 2048,
        "stop": list(STOPS),
        "seed": 5,
        "top_k": 20,
    }
    assert headers["Authorization"] == "Bearer sk-secret"
    assert "secret" not in repr(ServerOptions("http://x/v1", "m", api_key="sk-secret"))


def test_no_key_sends_no_header():
    with ChatServer(lambda request: "x") as server:
        complete(server)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "text", ["<sql>SELECT 1</sql>", "a<solution>\nSELECT '<x>'</solution>", "<sql>a</sql><sql>b</sql>"]
)
def test_stop_strings_are_put_back(text):
    stripped = text[: text.rfind("</")]
    stop = text[text.rfind("</") :]
    assert restore_stop(stripped, STOPS, "stop", None) == text
    assert restore_stop(stripped, STOPS, "stop", stop) == text
    assert restore_stop(text, STOPS, "stop", stop) == restore_stop(text, STOPS, "stop", None) == text
    assert restore_stop(stripped, STOPS, "length", None) == stripped
    assert restore_stop(stripped, STOPS, "stop", 151645) == stripped  # the server says: end of sequence


def test_a_turn_without_an_open_tag_stays_as_it_is():
    assert restore_stop("I do not know.", STOPS, "stop", None) == "I do not know."
    assert restore_stop("<sql>SELECT 1</sql> and then", STOPS, "stop", None) == "<sql>SELECT 1</sql> and then"
    assert restore_stop("<solution>", (), "stop", None) == "<solution>"


WRITTEN = st.lists(
    st.sampled_from(["<sql>", "</sql>", "<solution>", "</solution>", "<think>", "</think>", "SELECT 1", " "])
)


@settings(max_examples=300)
@given(WRITTEN.map("".join))
def test_stripping_and_putting_back_changes_nothing(text):
    stripped = strip_stop(text, list(STOPS))
    if stripped == text:
        return  # no stop string: nothing was taken away
    matched = text[len(stripped) :].split(">")[0] + ">"
    assert restore_stop(stripped, STOPS, "stop", matched) == stripped + matched
    if stripped.rfind("<" + matched[2:]) > max(stripped.rfind("<" + stop[2:]) for stop in STOPS if stop != matched):
        assert restore_stop(stripped, STOPS, "stop", None) == stripped + matched


@pytest.mark.parametrize("key", ["stop_reason", "matched_stop"])
def test_what_the_server_says_it_matched_decides(key):
    with ChatServer(
        in_turn(completion("<sql>SELECT 1", **{key: "</sql>"}), completion("<sql>SELECT 1", **{key: 2}))
    ) as server:
        assert complete(server).text == "<sql>SELECT 1</sql>"
        assert complete(server).text == "<sql>SELECT 1"


@pytest.mark.parametrize(
    "fault",
    [
        Reply(429, '{"error": {"message": "too many tokens a minute"}}', {"Retry-After": "0"}),
        Reply(503, "warming up", {"Retry-After": "²"}),
        Reply(200, '{"choices": [{"message": {"content": "<sql>SE', cut=True),
        Reply(200, "<html>a proxy's page</html>"),
        Reply(200, '{"choices": []}'),
        Reply(200, '{"choices": [{"message": {"content": 3}}]}'),
        Reply(200, '{"error": {"message": "the upstream is gone"}}'),
        Reply(200, b"\xff\xfe"),
        Reply(200, "[]"),
    ],
    ids=["429", "503", "cut", "html", "no choices", "not text", "error with 200", "bytes", "list"],
)
def test_what_passes_is_tried_again_and_then_reported(fault):
    with ChatServer(in_turn(fault, fault, "fine")) as server:
        assert complete(server).text == "fine"
        assert len(server.requests) == 3
    with ChatServer(in_turn(fault)) as server, pytest.raises(InfrastructureError, match="3 attempts") as caught:
        complete(server)
    assert server.url in str(caught.value)
    assert len(server.requests) == 3


def test_the_servers_own_words_are_quoted():
    fault = Reply(500, '{"error": {"message": "CUDA out of memory"}}')
    with ChatServer(in_turn(fault)) as server, pytest.raises(InfrastructureError, match="500: CUDA out of memory"):
        complete(server)


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InfrastructureError, match=r"cannot be reached.*is it running"):
        complete(url)


def test_a_slow_server_has_a_deadline():
    with ChatServer(in_turn(Reply(delay=5.0))) as server:
        started = time.monotonic()
        with pytest.raises(InfrastructureError, match=r"no answer within 0\.1 s"):
            complete(server, timeout=0.1)
        assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("status", "says"), [(401, "--api-key-env"), (403, "--api-key-env"), (422, "temperature"), (307, "points to")]
)
def test_what_a_person_must_mend_is_not_tried_again(status, says):
    fault, words = Reply(status, '{"error": {"message": "bad temperature"}}'), f"answered {status}: bad temperature"
    with ChatServer(in_turn(fault)) as server, pytest.raises(ServerRefused, match=words) as caught:
        complete(server, api_key="sk-secret")
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_wrong_model_name_or_path_is_refused():
    with ChatServer(lambda request: "x") as server:
        with pytest.raises(ServerRefused, match=r"`other` does not exist.*'other' the name"):
            complete(server, model="other")
        with pytest.raises(ServerRefused, match="right up to /v1"):
            complete(server.url + "/v2")


NAMES = ["choices", "message", "content", "finish_reason", "stop_reason", "usage", "error", "detail", "reasoning"]
FULL = [
    "This model's maximum context length is 32768 tokens. However, you requested 40000 tokens.",
    "The decoder prompt (length 40000) is longer than the maximum model length of 32768.",
    "The input (40000 tokens) is longer than the model's context length (32768 tokens).",
    "request (40000 tokens) exceeds the available context size (32768 tokens), try increasing it",
    "Please reduce the length of the messages or completion",
    "Input length 131393 exceeds the maximum allowed input length of 131040 tokens.",
    "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens",
    "Your input exceeds the context window of this model. code: context_length_exceeded",
]


@pytest.mark.parametrize("words", FULL)
def test_a_full_context_is_told_apart(words):
    fault = Reply(400, json.dumps({"error": {"message": words}}))
    with ChatServer(in_turn(fault)) as server, pytest.raises(ContextFull):
        complete(server)
    assert [request["max_tokens"] for request in server.requests] == [2048, 1024, 512, 256]


def test_fewer_tokens_are_asked_for_before_the_context_counts_as_full():
    full = Reply(400, json.dumps({"message": FULL[0]}))
    with ChatServer(lambda request: full if request["max_tokens"] > 600 else "fits") as server:
        assert complete(server).text == "fits"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300)
@given(JSON)
@example(
    {
        "choices": [{"message": {"content": "<sql>"}, "finish_reason": {}, "stop_reason": []}],
        "usage": {"prompt_tokens": "x"},
    }
)
def test_any_json_is_a_turn_or_a_fault(value):
    data = json.dumps(value).encode()
    answer, fault = _parse(data, needs_choice=True)
    assert (answer is None) == bool(fault)
    if answer is not None:
        assert isinstance(_completion(answer, STOPS).text, str)
    assert len(_words(data)) <= 301


@given(st.binary())
@example(b"[" * 200_000)
@example(b"9" * 5000)
@example(b'"\\ud800"')
def test_any_bytes_are_a_turn_or_a_fault(data):
    answer, fault = _parse(data, needs_choice=True)
    assert answer is None
    assert fault
    assert "\n" not in _words(data)


def test_an_endless_answer_is_not_read_to_its_end():
    with (
        ChatServer(in_turn(Reply(200, b"x" * (17 << 20)))) as server,
        pytest.raises(InfrastructureError, match="16 MiB"),
    ):
        complete(server)


def test_lone_surrogates_do_not_survive():
    body = '{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}'
    with ChatServer(in_turn(Reply(200, body))) as server:
        answer = complete(server)
    assert answer.text == "a?b"
    assert answer.prompt_tokens is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("thought", "content", "text"),
    [
        ("hm", "<sql>SELECT 1", "<think>hm</think><sql>SELECT 1</sql>"),
        ("hm <sql>SELECT 1", None, "<think>hm <sql>SELECT 1</sql>"),  # stopped inside the thought
        ("hm", "<think>hm</think>no", "<think>hm</think>no"),  # a server that shows it twice
        (None, "no", "no"),
        (None, None, ""),
    ],
)
def test_thoughts_that_were_set_apart_are_put_back(name, thought, content, text):
    message = {"role": "assistant", "content": content, name: thought}
    body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
    with ChatServer(in_turn(Reply(body=body))) as server:
        assert complete(server).text == text


def test_the_only_model_needs_no_name():
    with ChatServer(lambda request: "x", models=("only",)) as server:
        assert asyncio.run(with_model(ServerOptions(server.url, ""))).model == "only"
    two, words = ChatServer(lambda request: "x", models=("a", "b")), "2 models; name one with --served-model: a, b"
    with two as server, pytest.raises(UserError, match=words):
        asyncio.run(with_model(ServerOptions(server.url, "")))


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://x:999999/v1"])
def test_an_address_must_be_one(url):
    with pytest.raises(UserError, match="--server"):
        complete(url)


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(UserError, match="--api-key-env") as caught:
        complete("http://me:sesame@127.0.0.1:9/v1")
    assert "sesame" not in str(caught.value)


def test_a_broken_key_is_not_shown():
    assert checked_key("KEY", " sk-1\n") == "sk-1"
    with pytest.raises(UserError, match="variable KEY") as caught:
        checked_key("KEY", "sk-1\nsk-2")
    assert "sk-" not in str(caught.value)


def test_extra_must_be_an_object():
    assert json_object("--server-extra", '{"a": null}') == {"a": None}
    for text in ("[]", "{"):
        with pytest.raises(UserError, match="--server-extra"):
            json_object("--server-extra", text)
