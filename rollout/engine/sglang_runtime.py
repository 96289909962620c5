"""SGLang in this process: one thread that owns its event loop, its processes watched, every call with a deadline.

SGLang's tokenizer manager lives in an event loop of its own here; the scheduler and detokenizer are processes that SGLang
starts, and what they log goes where this process logs. As an engine of its own SGLang would install signal handlers and,
when one of its processes fails, kill everything below this process; a rollout service has workers and episodes of its
own, so here a failure only ends what SGLang was asked, and is told to whoever asked.

Left out: several SGLang engines in one process (start several services), and SGLang's own HTTP server.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.metadata
import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, TypeVar

from rollout.engine.base import EngineError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
INSTALL = "pip install -e '.[rollout]'"
STOP_SECONDS = 10.0


def require_sglang(arguments: Mapping[str, Any]) -> None:
    """Raises EngineError when SGLang or a GPU is missing here, with what to do."""
    try:
        importlib.metadata.version("sglang")
        import torch
    except ImportError:  # PackageNotFoundError is one
        raise EngineError(
            f"SGLang is not installed here ({sys.executable}). On a host with GPUs it gets an environment of its own:"
            f" {INSTALL}; what is started from another environment finds it by generator.inference_engine.python"
        ) from None
    if "device" not in arguments and not torch.cuda.is_available():
        raise EngineError(
            "SGLang: no GPU is visible here (nvidia-smi lists them; CUDA_VISIBLE_DEVICES hides them)."
            " Run it on a GPU host, or name another device in generator.inference_engine.engine_init_kwargs"
        )


class Runtime:
    """A started SGLang engine. `failure` says why it has stopped, "" while it runs.

    `on_failure` is called once, from a thread of this class, when a process of SGLang's dies by itself.
    """

    def __init__(self, arguments: Mapping[str, Any], start_timeout: float, on_failure: Callable[[str], None]) -> None:
        require_sglang(arguments)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._dead: Future[None] = Future()
        self.failure = ""
        self.loop = asyncio.new_event_loop()
        self._engine: Any = None
        self._processes: list[Any] = []
        others = set(multiprocessing.active_children())
        _listen_to_children()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(dict(arguments), started), name="sglang", daemon=True)
        self._thread.start()
        try:
            started.result(start_timeout)
        except Exception as error:
            self._processes = list(set(multiprocessing.active_children()) - others)
            self._kill()
            late = f"it was not ready within {start_timeout:.0f} s (bridge.start_timeout)"
            why = late if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
            raise EngineError(f"SGLang does not start: {why}; its log, just before this line, says more") from error
        self._processes = self._children()
        threading.Thread(target=self._watch, name="sglang-watch", daemon=True).start()

    @property
    def manager(self) -> Any:
        """SGLang's tokenizer manager; its coroutines run in `loop` alone."""
        return self._engine.tokenizer_manager

    @property
    def input_limit(self) -> int:
        """A prompt must have fewer tokens than this: the context and the KV cache bound it."""
        return int(self.manager.max_req_input_len)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Runs a coroutine in SGLang's loop. Raises EngineError when SGLang has stopped."""
        with self._lock:  # what comes before the loop stops is at least cancelled
            if not self.failure:
                return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        coroutine.close()
        raise EngineError(f"the engine has stopped: {self.failure}")

    def result(self, future: Future[_T], what: str, timeout: float) -> _T:
        """Waits for something submitted. Raises EngineError when SGLang has died or takes longer."""
        either: list[Future[Any]] = [future, self._dead]
        done, _ = wait(either, timeout, return_when=FIRST_COMPLETED)
        if future in done:
            return future.result()
        future.cancel()
        if self.failure:
            raise EngineError(f"SGLang did not {what}: {self.failure}")
        raise EngineError(f"SGLang did not {what} within {timeout:.0f} s")

    def call(self, coroutine: Coroutine[Any, Any, _T], what: str, timeout: float) -> _T:
        return self.result(self.submit(coroutine), what, timeout)

    def close(self) -> None:
        """Lets the schedulers free their devices, then ends what is left. Closing twice does nothing."""
        if not self._fail("it was closed"):
            return
        if any(process.is_alive() for process in self._processes):
            from sglang.srt.managers.io_struct import ShutdownReq

            self.loop.call_soon_threadsafe(self.manager._dispatch_to_scheduler, ShutdownReq())
            deadline = time.monotonic() + STOP_SECONDS
            schedulers = self._processes[:-1]  # the detokenizer is started last and told nothing
            for process in schedulers:
                process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _run(self, arguments: dict[str, Any], started: Future[None]) -> None:
        try:
            with _own_logging():
                from sglang.srt.entrypoints.engine import Engine

                asyncio.set_event_loop_policy(None)  # SGLang sets uvloop's for the whole process
                asyncio.set_event_loop(self.loop)  # which SGLang finds and takes as its own
                self._engine = Engine(**arguments)
                atexit.unregister(self._engine.shutdown)  # it would kill this service's other processes too
                self.manager._subprocess_watchdog.stop()  # it would send this process SIGQUIT
                self.loop.call_soon(self.manager.auto_create_handle_loop)  # it looks for a running loop
        except BaseException as error:  # SGLang leaves with SystemExit too
            started.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            return
        started.set_result(None)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    def _children(self) -> list[Any]:
        """SGLang's processes, in the order of their start."""
        by_pid = {process.pid: process for process in multiprocessing.active_children()}
        return [by_pid[pid] for pid in self._engine.get_all_child_pids() if pid in by_pid]

    def _watch(self) -> None:
        ended = connection.wait([process.sentinel for process in self._processes])
        process = next(p for p in self._processes if p.sentinel in ended)
        process.join(1.0)
        how = f"its process {process.pid} ended (exit code {process.exitcode}; the log says more)"
        if self._fail(how):
            _log.error("SGLang has stopped: %s", how)
            self._kill()
            self._on_failure(how)

    def _fail(self, why: str) -> bool:
        """Marks SGLang as stopped; False when it was so before."""
        with self._lock:
            if self.failure:
                return False
            self.failure = why
        self._dead.set_result(None)
        return True

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(STOP_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_SECONDS)


def _listen_to_children() -> None:
    """SGLang's processes send SIGQUIT to their parent when they fail, which by default would end it without a word."""
    if threading.current_thread() is not threading.main_thread():
        raise EngineError("SGLang must be started from the main thread: it tells failures by a signal")
    signal.signal(signal.SIGQUIT, lambda number, frame: _log.error("SIGQUIT: a process of SGLang's has failed"))


@contextmanager
def _own_logging() -> Iterator[None]:
    """SGLang replaces the root logger's handlers, closing them, and its level; this service keeps its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
