"""What a push of weights costs on loopback, as markdown tables: speed against a plain TCP copy, differences, memory.

    python benchmarks/push.py [--model DIR] [--steps 5]

Three parts, each with a service in a process of its own. (1) Whole pushes of a random 0.54B model in bfloat16 (1.07 GB), in
turns with copies of as many bytes over a TCP socket from memory to memory. (2) Steps of AdamW at a learning rate of 1e-6 on
a 135M model (Llama type, hidden 576, 30 layers), the learner's own update on random episodes, and after each a push of
differences. `--model` gives a checkpoint folder to train; without it the weights are random. (3) What the first two took in
memory, on either side beyond what it held before.

The services' engine here only holds weights: it copies what it is given over what it has, which is what generation would
have to stop for. `--engine embedded` pushes part 2 to the embedded engine, with the probe (needs --model).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rollout.client import RolloutClient
from rollout.engine.scripted import ScriptedEngine
from rollout.server import serve
from rollout.supervisor import ServiceProcess
from rollout.types import TensorSpec, Trajectory
from rollout.wire import numpy_dtype
from sqlrl_jax import config_file
from sqlrl_jax.allocator import keep_freed_memory
from sqlrl_jax.buckets import Converter, Piece, Weights
from sqlrl_jax.config import Config
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.hf import hf_manifest, load_hf
from sqlrl_jax.probing import Prober
from sqlrl_jax.weights import Pusher

ROOT = Path(__file__).resolve().parents[1]
DTYPE = "bfloat16"
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 16}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LEARNING_RATE = 1e-6


def model(sizes: Mapping[str, int]) -> ModelConfig:
    shared = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    heads = {"num_key_value_heads": 4 if sizes is LARGE else 3, "max_position_embeddings": 2048}
    return ModelConfig.from_hf({**shared, **heads, **sizes})


class Holder(ScriptedEngine):
    """Weights in memory of its own, and nothing that computes with them."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        super().__init__([], 1)
        self._specs, self._version = list(specs), -1
        self._weights = {s.name: np.zeros(s.shape, numpy_dtype(s.dtype)) for s in specs}
        for value in self._weights.values():
            value.view(np.uint8 if value.ndim else value.dtype)[...] = 1  # really there
        self._watch = Peak()

    @property
    def version(self) -> int:
        return self._version

    def manifest(self) -> list[TensorSpec]:
        return self._specs

    def apply_weights(self, tensors: Mapping[str, Any], version: int) -> float:
        started = time.monotonic()
        for name, value in tensors.items():
            np.copyto(self._weights[name], value)
        self._version = version
        return time.monotonic() - started

    def stats(self) -> dict[str, float]:
        return {"extra_bytes": float(self._watch.extra)}


class Peak:
    """How much larger than now this process has been since."""

    def __init__(self) -> None:
        self.start = self.peak = resident()
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, resident())

    @property
    def extra(self) -> int:
        return self.peak - self.start

    def stop(self) -> int:
        self._stop.set()
        return self.extra


def cpu_seconds(*pids: int) -> float:
    """That these processes have used."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * 4096


def serve_weights(sizes: Mapping[str, int], port_file: str) -> None:
    async def play(*arguments: Any) -> None:
        raise RuntimeError("this service plays no episodes")

    engine = Holder(hf_manifest(model(sizes), DTYPE))
    asyncio.run(serve(engine, play, "127.0.0.1:0", port_file=port_file, supervised=True))


def holder(sizes: Mapping[str, int], folder: Path) -> ServiceProcess:
    which = "large" if sizes is LARGE else "small"
    return ServiceProcess([sys.executable, __file__, "--serve", which], folder / "service.log", start_timeout=120)


def embedded(config: Config, folder: Path) -> ServiceProcess:
    file = folder / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "launch.py"), "serve", "--config", str(file)]
    return ServiceProcess(command, folder / "service.log", start_timeout=240)


class TcpPeer:
    """A process that takes bytes from a socket into its memory."""

    CODE = """if True:
        import socket, sys, numpy as np
        size = int(sys.argv[1])
        memory = memoryview(np.ones(size, np.uint8))
        with socket.create_server(("127.0.0.1", 0)) as server:
            print(server.getsockname()[1], flush=True)
            connection, _ = server.accept()
            while True:
                got = 0
                while got < size:
                    step = connection.recv_into(memory[got:])
                    if not step: sys.exit()
                    got += step
                connection.sendall(b"!")
    """

    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(data.nbytes)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._socket = socket.create_connection(("127.0.0.1", int(self._process.stdout.readline())))

    @property
    def pid(self) -> int:
        return self._process.pid

    def copy(self) -> float:
        """Seconds until the other process has it all."""
        started = time.monotonic()
        self._socket.sendall(self._data.data)
        assert self._socket.recv(1) == b"!"
        return time.monotonic() - started

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def bucket_bytes(config: ModelConfig) -> int:
    """Of the largest bucket: a layer or the embedding."""
    sizes: dict[str, int] = {}
    for spec in hf_manifest(config, DTYPE):
        bucket = ".".join(spec.name.split(".")[:3]) if ".layers." in spec.name else spec.name
        sizes[bucket] = sizes.get(bucket, 0) + math.prod(spec.shape) * 2
    return max(sizes.values())


class Ready(Weights):
    """Weights that lie converted in host memory, so that only sending is measured."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.cuts)
        self._buckets = [[replace(p, data=p.data.copy()) for p in bucket] for bucket in weights.buckets()]

    def buckets(self) -> Iterator[list[Piece]]:
        yield from self._buckets


def whole_pushes(folder: Path, rounds: int) -> None:
    config = model(LARGE)
    params = jax.block_until_ready(jax.jit(init_params, static_argnums=(0, 1))(config, 0))
    size = sum(math.prod(s.shape) * 2 for s in hf_manifest(config, DTYPE))
    service = holder(LARGE, folder)
    client = RolloutClient([service.start()])
    peer = TcpPeer(np.random.default_rng(0).integers(0, 256, size, np.uint8))
    pusher = Pusher(client, config, DTYPE, run_id="benchmark", epoch=1, delta=False)
    watch = Peak()
    pusher.push(params, 0)  # the first one of each warms up
    extra = watch.stop()
    peer.copy()
    ready = Ready(Converter(config, DTYPE).weights(params))
    print(
        f"\nWhole pushes of {size / 1e9:.2f} GB in {DTYPE}, in turns with TCP copies; GB/s and, of both sides, CPU s/GB\n"
    )
    print("| TCP copy | CPU | sent, checked | CPU | of TCP | applied too | converted too | pause, of all that |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    me, other = os.getpid(), service.pid
    assert other is not None
    for number in range(rounds):
        clocks = [cpu_seconds(me, peer.pid)]
        copy = peer.copy()
        clocks += [cpu_seconds(me, peer.pid), cpu_seconds(me, other)]
        sent = pusher.push_weights(ready, 2 * number + 1)
        clocks.append(cpu_seconds(me, other))
        converted = pusher.push(params, 2 * number + 2)
        staged, all_of_it = sent["bridge/wire_seconds"], converted["bridge/push_seconds"]
        copy_cpu, push_cpu = (clocks[i + 1] - clocks[i] for i in (0, 2))
        print(
            f"| {size / copy / 1e9:.2f} | {copy_cpu / size * 1e9:.2f} | {size / staged / 1e9:.2f} | "
            f"{push_cpu / size * 1e9:.2f} | {copy / staged:.2f} | {size / sent['bridge/push_seconds'] / 1e9:.2f} | "
            f"{size / all_of_it / 1e9:.2f} | {converted['bridge/pause_seconds'] / all_of_it:.0%} |",
            flush=True,
        )
    peer.close()
    service_extra = client.status()[client.addresses[0]].stats["extra_bytes"]
    print("\n| memory beyond what it held | MB | |\n|---|---|---|")
    print(f"| learner, while it converts and sends | {extra / 1e6:.0f} | {extra / bucket_bytes(config):.1f} buckets |")
    print(
        f"| service, while it stages and applies | {service_extra / 1e6:.0f} | {service_extra / size:.2f} versions |",
        flush=True,
    )
    client.close()
    service.stop()


def settings(folder: str) -> Config:
    overrides = {
        "trainer.policy.model.path": folder or "none",
        "trainer.policy.optimizer_config.lr": LEARNING_RATE,
        "trainer.policy.row_tokens": 256,
        "trainer.policy.rows_per_micro_batch": 2,
        "trainer.policy.logprob_chunk": 64,
        "trainer.train_batch_size": 2,
        "trainer.policy_mini_batch_size": 2,
        "trainer.compile_cache": "",
        "environment.env_class": "calculator",  # none is played
        "generator.max_input_length": 128,
        "generator.sampling_params.max_generate_length": 64,
        "generator.inference_engine.dtype": DTYPE,
        "generator.inference_engine.max_sequences": 4,
    }
    return config_file.load(None, [f"{key}={value}" for key, value in overrides.items()])


def episodes(vocabulary: int, seed: int) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    out = []
    for number in range(4):
        ids = rng.integers(0, vocabulary, 100).tolist()
        prompt, response = ids[:40], ids[40:]
        scored = [-10.0] * len(response)
        out.append(
            Trajectory(
                f"q{number // 2}",
                "",
                number % 2,
                prompt,
                response,
                [1] * 60,
                scored,
                [(0, 0, 60)],
                0.0,
                "wrong",
                "done",
            )
        )
    return out


def differences(folder: Path, checkpoint: str, steps: int, engine: str) -> None:
    config = settings(checkpoint)
    mesh = make_mesh(config.trainer.mesh)
    shape = ModelConfig.from_dir(checkpoint) if checkpoint else model(SMALL)
    params = load_hf(checkpoint, shape, mesh) if checkpoint else jax.jit(init_params, static_argnums=(0, 1))(shape, 0)
    learner = Learner(config, mesh, shape, params)
    prober = Prober(config, learner, []) if engine == "embedded" else None
    service = embedded(config, folder) if engine == "embedded" else holder(SMALL, folder)
    client = RolloutClient([service.start()])
    pusher = Pusher(client, shape, DTYPE, run_id="benchmark", epoch=1)
    extra = 0
    what = f"weights of {Path(checkpoint).name}" if checkpoint else "random weights"
    print(f"\nAdamW at {LEARNING_RATE:g}, {what}, in {DTYPE}; {engine} engine\n")
    print(
        "| step | values changed | MB sent | times smaller | encode, GB/s a thread | staged, s | of that check, s ",
        end="",
    )
    print("| apply, s | pause, s | of push | probe, nats |\n|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for step in range(steps + 1):
        if step:
            batch = episodes(shape.vocab_size, step)
            learner.update(batch, np.array([1.0, -1.0, 1.0, -1.0]))
            if prober:
                prober.see(batch)
        probe = prober.probe() if prober else None
        watch = Peak()
        m = {k.removeprefix("bridge/"): v for k, v in pusher.push(learner.state.params, step, probe).items()}
        extra = watch.stop() if step else 0
        encode = f"{m['model_bytes'] / m['encode_seconds'] / 1e9:.2f}" if "encode_seconds" in m else ""
        density = f"{m['delta_density']:.2%}" if "delta_density" in m else ""
        probed = f"{m['probe_logprob_diff']:.1e}" if "probe_logprob_diff" in m else ""
        print(
            f"| {step} | {density} | {m['sent_bytes'] / 1e6:.1f} | {m['model_bytes'] / m['sent_bytes']:.1f} | {encode} | "
            f"{m['wire_seconds']:.2f} | {m['check_seconds']:.2f} | {m['apply_seconds']:.2f} | {m['pause_seconds']:.3f} | "
            f"{m['pause_seconds'] / m['push_seconds']:.0%} | {probed} |",
            flush=True,
        )
    more = f"{extra / 1e6:.0f} MB more during a push"
    print(f"\nLearner: {m['base_bytes'] / 1e6:.0f} MB for the last version, and {more}", flush=True)
    client.close()
    service.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="a checkpoint folder for part 2")
    parser.add_argument("--engine", choices=("holder", "embedded"), default="holder")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--parts", choices=("whole", "differences", "both"), default="both")
    parser.add_argument("--serve", choices=("large", "small"), help=argparse.SUPPRESS)
    parser.add_argument("--port-file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_weights(LARGE if args.serve == "large" else SMALL, args.port_file)
        return
    if args.engine == "embedded" and not args.model:
        parser.error("--engine embedded needs --model, a checkpoint folder with a tokenizer")
    keep_freed_memory()  # as every learner on a CPU does
    with tempfile.TemporaryDirectory() as folder:
        if args.parts != "differences":
            whole_pushes(Path(folder), args.rounds)
        if args.parts != "whole":
            differences(Path(folder), args.model, args.steps, args.engine)


if __name__ == "__main__":
    main()
