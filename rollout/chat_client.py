"""A client of any server that speaks OpenAI's chat completions: SGLang, vLLM, llama.cpp, Ollama, a hosted service.

One request is one turn. Every wait has a deadline; what may pass (429, 5xx, a dropped connection, an answer that is none)
is tried again with growing pauses, and ends in an InfrastructureError that quotes the server. What a person has to mend (a
wrong key or model name) is a ServerRefused at once. A conversation that the server has no room for is ContextFull, which
is the model's own doing.

Most servers strip stop strings, and some set thoughts apart; the episode needs both, so they are put back where they
were. Left out: streaming, tools, and servers that take token ids (that is the rollout service's way).
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx2

from rollout.errors import InfrastructureError, UserError
from rollout.text import whole
from rollout.types import Message, SamplingParams

MAX_ANSWER_BYTES = 16 << 20
LEAST_TOKENS = 256
"""A turn is not asked for with less room than this."""
_PASSING = (408, 409, 425, 429)
_FULL = re.compile(
    r"context[ _-]?(length|size|window|limit)|maximum (context|model|prompt|allowed input) length|max_model_len"
    r"|exceed_context|too many tokens|tokens? exceeds?|(prompt|input) (is |length )?too long|reduce the length"
    r"|longer than the model|max_new_tokens. must be",
    re.IGNORECASE,
)
"""How servers say that a conversation is too long; there is no common code for it."""


class ServerRefused(UserError):
    """The server understood and declined: a wrong key, model name or parameter."""


class ContextFull(Exception):
    """The conversation does not fit the server's context any more."""


@dataclass(frozen=True)
class ServerOptions:
    """A served model. `url` ends before /chat/completions; `extra` is merged into each request (None takes a key out)."""

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    """Seconds one answer may take."""
    retries: int = 5
    backoff: float = 0.5
    """Seconds before the first new attempt; each later pause is twice as long, up to `longest_pause`."""
    longest_pause: float = 30.0
    concurrency: int = 16
    """Conversations at one time."""


@dataclass(frozen=True)
class Completion:
    """One turn, stop string included. Token counts are the server's own, None where it gives none."""

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def checked_key(name: str, value: str) -> str:
    """An API key fit for a header. Raises UserError that names the variable and never the key."""
    value = value.strip()
    if not value.isascii() or not value.isprintable():
        raise UserError(f"environment variable {name}: holds characters that no API key has")
    return value


def json_object(name: str, text: str) -> dict[str, Any]:
    """A JSON object given as the option `name`. Raises UserError."""
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict):
        raise UserError(f'{name}: expected an object such as {{"top_k": 20}}')
    return value


async def with_model(options: ServerOptions) -> ServerOptions:
    """The options with the server's only model where none is named. Raises UserError listing them if it has several."""
    if options.model:
        return options
    async with ChatClient(options) as client:
        names = await client.models()
    if len(names) != 1:
        raise UserError(
            f"server {options.url} has {len(names)} models; name one with --served-model: {', '.join(names)}"
        )
    return replace(options, model=names[0])


def restore_stop(text: str, stops: Sequence[str], finish_reason: str, matched: object) -> str:
    """The turn with the stop string that the server cut off.

    `matched` is what the server says ended the turn: SGLang and vLLM name the stop string, or give a token's number for
    the end of the sequence. Without that, a `</tag>` is put back where the last `<tag>` is still open; a model that
    ended its turn there by itself can't be told apart from one that was stopped.
    """
    if finish_reason != "stop" or isinstance(matched, int) or text.endswith(tuple(stops)):
        return text
    if matched in stops:
        return text + str(matched)
    opened = {stop: text.rfind("<" + stop[2:]) for stop in stops if stop.startswith("</")}
    still_open = [stop for stop, place in opened.items() if place > text.rfind(stop)]
    return text + max(still_open, key=lambda stop: opened[stop]) if still_open else text


class ChatClient:
    """Use as `async with`. `complete` may be called by many conversations at once."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        host = _host(options.url)
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        self._http = httpx2.AsyncClient(
            base_url=options.url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx2.Timeout(None, connect=10.0),  # the whole answer's deadline is asyncio's
            limits=httpx2.Limits(max_connections=options.concurrency + 1),
            trust_env=not _is_local(host),  # a proxy for the internet cannot reach this machine's servers
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names of the models that the server says it has."""
        answer = await self._ask("GET", "models", None)
        rows = answer.get("data")
        return (
            [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else []
        )

    async def complete(self, messages: Sequence[Message], params: SamplingParams, seed: int) -> Completion:
        """One turn after `messages`. Raises ContextFull, ServerRefused or InfrastructureError."""
        room = params.max_tokens
        while True:
            try:
                answer = await self._ask("POST", "chat/completions", self._body(messages, params, seed, room))
                return _completion(answer, params.stop)
            except ContextFull:  # many servers count the tokens asked for: there may be room for fewer
                if room // 2 < LEAST_TOKENS:
                    raise
                room //= 2

    def _body(self, messages: Sequence[Message], params: SamplingParams, seed: int, room: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": list(messages),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": room,
            "stop": list(params.stop),
            "seed": seed % (1 << 31),
            **self.options.extra,
        }
        return {key: value for key, value in body.items() if value is not None}

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        fault, hint = "", 0.0
        for attempt in range(self.options.retries + 1):
            if attempt:
                await asyncio.sleep(self._pause(attempt, hint))
            hint = 0.0
            try:
                async with asyncio.timeout(self.options.timeout):
                    status, headers, data = await self._exchange(method, path, body)
            except TimeoutError:
                fault = f"no answer within {self.options.timeout:g} s"
                continue
            except httpx2.HTTPError as error:
                fault = _describe(error)
                continue
            if status == 200:
                answer, fault = _parse(data, needs_choice=method == "POST")
                if answer is not None:
                    return answer
                continue
            fault = self._judge(status, headers, data)
            hint = _retry_after(headers)
        tries = self.options.retries + 1
        raise InfrastructureError(f"server {self.options.url}: {fault} ({tries} attempts)")

    async def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        async with self._http.stream(method, path, json=body) as response:
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    raise InfrastructureError(
                        f"server {self.options.url}: answered with more than {MAX_ANSWER_BYTES >> 20} MiB; is it a server?"
                    )
            return response.status_code, response.headers, bytes(data)

    def _judge(self, status: int, headers: Mapping[str, str], data: bytes) -> str:
        """What a status other than 200 means: returns the fault if it may pass, raises otherwise."""
        words = _words(data)
        if 400 <= status < 500 and status != 429 and _FULL.search(words):
            raise ContextFull(words)
        if status >= 500 or status in _PASSING:
            return f"answered {status}: {words}"
        advice = ""
        if status in (401, 403):
            advice = "; the API key comes from the environment variable that --api-key-env names"
        elif status == 404:
            advice = f"; is {self.options.url} right up to /v1, and {self.options.model!r} the name it serves?"
        elif 300 <= status < 400:
            advice = f"; give the address that it points to ({headers.get('location', '?')})"
        raise ServerRefused(f"server {self.options.url} answered {status}: {words}{advice}")

    def _pause(self, attempt: int, hint: float) -> float:
        growing = self.options.backoff * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        return min(self.options.longest_pause, max(growing, hint))


def _host(url: str) -> str:
    """The host in a server's address. Raises UserError if the address is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.port != 0
        host = parts.hostname
    except ValueError:  # a port that is no port
        usable, host = False, None
    if host and (parts.username or parts.password):
        raise UserError("--server: an address with a password in it; give the key by --api-key-env instead")
    if not usable or not host:
        raise UserError(f"--server {url}: expected http://HOST:PORT/v1 or https://HOST/v1")
    return host


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _describe(error: httpx2.HTTPError) -> str:
    if isinstance(error, httpx2.ConnectError):
        return f"cannot be reached ({error}); is it running, and is the address right?"
    return f"the connection broke ({error or type(error).__name__})"


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; 0 where it does not say or gives a date."""
    text = headers.get("retry-after", "")
    return float(text) if text.replace(".", "", 1).isdecimal() else 0.0


def _words(data: bytes) -> str:
    """The server's own words out of an error's body, on one line and not too long."""
    text = data.decode("utf-8", errors="replace")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    while isinstance(found, dict) and found:
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), json.dumps(found))
    line = " ".join(str(found).split())
    return (line[:300] + "…" if len(line) > 300 else line) or "nothing"


def _parse(data: bytes, needs_choice: bool) -> tuple[dict[str, Any] | None, str]:
    """The JSON object in an answer, or None and what is wrong with it."""
    try:
        answer: Any = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a number of 5,000 digits, nested without end
        return None, f"answered with something that is not JSON: {_words(data)}"
    if not isinstance(answer, dict) or (needs_choice and _message(answer) is None):
        return None, f"answered without a choice: {_words(data)}"
    return answer, ""


def _message(answer: dict[str, Any]) -> dict[str, Any] | None:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    return message if isinstance(message, dict) and isinstance(message.get("content"), str | None) else None


def _completion(answer: dict[str, Any], stops: Sequence[str]) -> Completion:
    choice, message, usage = answer["choices"][0], _message(answer) or {}, answer.get("usage")
    reason = str(choice.get("finish_reason") or "stop")
    matched = choice.get("stop_reason", choice.get("matched_stop"))
    counts = usage if isinstance(usage, dict) else {}
    return Completion(
        restore_stop(whole(_spoken(message)), stops, reason, matched),
        reason,
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
    )


def _spoken(message: Mapping[str, Any]) -> str:
    """What the model wrote: a server with a reasoning parser takes the thought out of it, tags and all."""
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(thought, str) or "<think>" in content:
        return content
    return f"<think>{thought}</think>{content}" if content else f"<think>{thought}"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
