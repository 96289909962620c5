"""One run in several processes, one a host: how they start together, agree, and end together.

`run` brings them up (flags, environment, or what jax detects on a TPU pod, SLURM or Kubernetes), hands the work a `World`
and ends all of them when one ends. A process that runs alone gets a World of one, whose methods do nothing, and
jax.distributed is not touched. Bytes between processes travel on their own connection (link.py), not over the accelerators:
it needs no compiled program, does not disturb a running one, and still works when a collective hangs.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rollout.channel import split_address
from rollout.errors import UserError
from sqlrl_jax.config import DistributedConfig
from sqlrl_jax.link import Event, Link, LinkError, Peer
from sqlrl_jax.meeting import is_loopback, listen, meet
from sqlrl_jax.relay import Relay

T = TypeVar("T")

LOST = 75  # EX_TEMPFAIL: nothing is wrong here; start all processes again
UNWIND_SECONDS = 20.0  # for a process that fails to stop its services
NOTICE_SECONDS = 5.0  # for the link to tell why a collective broke
JAX_HEARTBEAT_SECONDS = 100


class World:
    """The processes of a run, seen from one of them; this one is the only one. Several: `Several`."""

    index, count = 0, 1
    peers: tuple[Peer, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.index == 0

    @property
    def address(self) -> str:
        """Where other processes of the run reach this host."""
        return "127.0.0.1"

    def exchange(self, name: str, data: bytes) -> list[bytes]:
        """What each process gave, by process; all of them call it at the same point. Raises LinkError past a deadline."""
        return [data]

    def hear_stop(self, listener: Callable[[str], None]) -> None:
        """`listener(why)` is called, from a thread, when another process was asked to stop."""

    def tell_stop(self, why: str) -> None:
        """Tells the others that this process was asked to stop. May be called in a signal handler."""

    def record(self, write: Callable[[str], None]) -> None:
        """`write(sentence)` also gets the sentence that ends this process because of another."""

    def connect(self, mesh: Mesh) -> None:
        """Opens the connections that collectives over `mesh` need, before programs do whose compilation takes its time."""

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """An exception inside is told to the others before anything here is closed: closing may wait for them."""
        yield

    # What follows from `exchange` alone.

    def barrier(self, name: str) -> None:
        """Returns when every process is here."""
        self.exchange(name, b"")

    def gather(self, name: str, value: Any) -> list[Any]:
        """`exchange` of JSON values."""
        return [json.loads(data) for data in self.exchange(name, json.dumps(value).encode())]

    def from_main(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives in process 0, for all; a JSON value. The others wait."""
        value: T = self.gather(name, make() if self.is_main else None)[0]
        return value

    def in_turn(self, name: str, work: Callable[[], T]) -> T:
        """Calls `work` in one process after another: for folders that some of them may share."""
        for index in range(self.count):
            if index == self.index:
                out = work()
            self.barrier(name)
        return out

    def require_same(self, what: str, value: str) -> None:
        """Raises LinkError when the processes differ in `value`, and says where."""
        for other, theirs in enumerate(self.gather(f"same {what}", value)):
            if theirs != value:
                raise LinkError(
                    f"process {self.index} and process {other} differ in {what}: {_difference(value, theirs)}; start every "
                    f"process with the same command, files and code"
                )


@dataclass(frozen=True)
class Place:
    """Which process this is. `local_devices` None means all that jax sees."""

    host: str
    port: int
    index: int
    count: int
    local_devices: list[int] | None = None


class Several(World):
    """One of several processes. `run` makes it."""

    def __init__(self, place: Place, settings: DistributedConfig) -> None:
        self.index, self.count = place.index, place.count
        self._settings, self._place = settings, place
        self._ending = threading.Lock()
        self._write: Callable[[str], None] = lambda sentence: None
        self._heard: Callable[[str], None] = lambda why: None
        version = f"jax {jax.__version__}"
        peers, lines, told = meet(
            place.index,
            place.count,
            place.host,
            place.port,
            timeout=settings.start_timeout,
            version=version,
            told=lambda: {"service": _free_port(place.host)},
        )
        self.peers = tuple(peers)
        self._link = Link(place.index, peers, lines, lost_after=settings.lost_after, on_event=self._event)
        self._start_jax(int(told["service"]))

    def _start_jax(self, port: int) -> None:
        """jax.distributed, whose service process 0 runs on `port`."""
        if (
            os.environ.get("JAX_PLATFORMS") == "cpu"
        ):  # gloo's own patience is 30 s, less than some programs take to compile
            patience = f"--xla_cpu_collective_timeout_seconds={int(self._settings.wait_timeout)}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}".strip()
        host, bind = "127.0.0.1", f"{_bind_host(self._place.host)}:{port}"
        local = port if self.is_main else Relay(self.peers[0].address, port).port
        jax.distributed.initialize(
            f"{host}:{local}",
            num_processes=self.count,
            process_id=self.index,
            local_device_ids=self._place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(self._settings.start_timeout),
            heartbeat_timeout_seconds=max(JAX_HEARTBEAT_SECONDS, int(3 * self._settings.lost_after)),
            shutdown_timeout_seconds=int(self._settings.start_timeout),
            coordinator_bind_address=bind,
        )

    @property
    def address(self) -> str:
        return self.peers[self.index].address

    def exchange(self, name: str, data: bytes) -> list[bytes]:
        return self._link.exchange(name, data, self._settings.wait_timeout)

    def hear_stop(self, listener: Callable[[str], None]) -> None:
        self._heard = listener

    def tell_stop(self, why: str) -> None:
        self._link.stop(why)

    def connect(self, mesh: Mesh) -> None:
        if jax.default_backend() != "cpu":  # there JAX itself is patient
            return
        axes = [name for name, size in mesh.shape.items() if size > 1]
        for number in range(1, len(axes) + 1):
            for group in itertools.combinations(axes, number):
                one = jax.shard_map(partial(jax.lax.psum, axis_name=group), mesh=mesh, in_specs=P(), out_specs=P())
                compiled = jax.jit(one).lower(jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, P())))
                whole = jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda _: np.float32(1))
                program = compiled.compile()
                self.barrier("collectives")  # gloo wants all processes within half a minute
                jax.block_until_ready(program(whole))

    def record(self, write: Callable[[str], None]) -> None:
        self._write = write

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            said = self._told(error)
            timer = threading.Timer(UNWIND_SECONDS, self._give_up, (said, status_of(error)))
            timer.daemon = True
            timer.start()
            raise

    def close(self) -> None:
        """After the work, in every process: ends jax.distributed and the link in order."""
        self.barrier("end")
        jax.distributed.shutdown()
        self._link.close()

    def _give_up(self, said: str, status: int) -> None:
        """Ends a process whose closing waits for others that have gone, before anybody could print why it ends."""
        os.write(2, f"\nerror: {said}\n".encode(errors="replace"))
        self.leave(status)

    def _told(self, error: BaseException) -> str:
        """Tells the others why this process ends, and returns it. If another has gone, the link ends this one meanwhile."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            time.sleep(
                NOTICE_SECONDS
            )  # a broken collective raises before the link knows who broke it, and how it ended
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._link.fault(f"{self.peers[self.index]} has ended: {' '.join(said.split())[:1000]}")
        return said

    def _event(self, event: Event, text: str) -> None:
        if event == "stop":
            self._heard(text)
            return
        with self._ending:  # never released: the first sentence is the only one
            sentence = (
                f"process {self.index}: {text}. The run cannot go on without it, so this process ends too; start all "
                f"processes again with trainer.resume_mode=latest to go on from the last checkpoint"
            )
            os.write(2, f"\nerror: {sentence}\n".encode(errors="replace"))
            try:
                self._write(sentence)
            finally:
                self.leave(LOST)

    def leave(self, status: int) -> NoReturn:
        """Ends this process without the orderly end of jax.distributed, which would wait for the others."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def run(
    place: Place | None,
    settings: DistributedConfig,
    work: Callable[[World], int],
    explained: Callable[[Callable[[], int]], int],
) -> int:
    """Calls `work` as the process that `place` says (None: the only one). Returns its status.

    Several processes end together: one that fails prints why, by way of `explained`, and tells the others, which name it.
    Raises UserError as long as they have not met.
    """
    if place is None:
        return work(World())
    world = Several(place, settings)
    orderly = False

    def whole() -> int:
        nonlocal orderly
        with world.ending_together():
            status = work(world)
            world.close()
        orderly = True
        return status

    try:
        status = explained(whole)
    except BaseException:
        traceback.print_exc()
        status = 1
    if not orderly:
        world.leave(status)
    return status


def status_of(error: BaseException) -> int:
    """The exit status that launch.py gives for `error`."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def place_of(coordinator: str | None, index: int | None, count: int | None, timeout: float) -> Place | None:
    """This process's place from flags, or from the variables that jax's own launchers set; None: there is one process.

    `coordinator` is HOST:PORT of process 0, or "auto": detected on TPU pods, SLURM, Kubernetes and Open MPI. Raises
    UserError.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    index = _number("JAX_PROCESS_ID") if index is None else index
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    if coordinator is None:
        if index is not None or count is not None:
            raise UserError("--process-id and --process-count need --coordinator HOST:PORT, where process 0 listens")
        return None
    local: list[int] | None = None
    if coordinator == "auto":
        coordinator, index, count, local = _detected(index, count, timeout)
    if index is None or count is None:
        raise UserError(
            "--coordinator needs --process-id (0 to N-1) and --process-count N too; or --coordinator auto, which finds all "
            "three on TPU pods, SLURM and Kubernetes"
        )
    if not 0 <= index < count:
        raise UserError(f"--process-id {index} of --process-count {count}: must be 0 to {count - 1}")
    host, port = split_address(coordinator)
    return Place(host, port, index, count, local) if count > 1 else None


def _detected(index: int | None, count: int | None, timeout: float) -> tuple[str, int, int, list[int] | None]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize itself asks

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, count, index, None, None, int(timeout))
    except Exception as error:  # whatever a metadata server or an API answers
        raise UserError(f"--coordinator auto: {type(error).__name__}: {error}") from error
    address, count, index, local = found
    if address is None or count is None or index is None:
        raise UserError(
            "--coordinator auto found neither a TPU pod, nor SLURM (start with srun), nor Kubernetes (pip install "
            "kubernetes): name the place with --coordinator HOST:PORT --process-id I --process-count N"
        )
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"  # on its node: it has all devices
    return address, index, count, None if local is None or alone else list(local)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r}: expected a whole number")
    return None if text is None else int(text)


def _free_port(host: str) -> int:
    with listen(host, 0) as server:
        port: int = server.getsockname()[1]
    return port


def _bind_host(host: str) -> str:
    if is_loopback(host):
        return "127.0.0.1"
    return "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"


def _difference(one: str, other: str) -> str:
    """The first line in which two texts differ."""
    mine, theirs = one.splitlines(), other.splitlines()
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            return f"{a.strip()!r} and {b.strip()!r}"
    return f"{len(mine)} lines and {len(theirs)}"
