"""How fast one GRPO update of a large model runs on an accelerator, as a markdown table.

    python benchmarks/accelerator.py [--work 1.5b|7b-lora …] [--peer] [--rounds 3]

The shape of Qwen2.5-Coder with random weights on one device, bfloat16 compute, full rematerialisation; 1.5b trains float32
masters with AdamW, 7b-lora adapters of rank 32 on frozen bfloat16 weights. 64 episodes of 400 to 6,000 tokens, a third of
each prompt. `--peer` adds the same update of 1.5b in eager PyTorch on a GPU: sequences sorted by length, the head on
trained tokens only, flash attention, autocast, layers recomputed; its loss must agree with ours. Useful tokens are those
of the episodes. MFU counts the products that the update cannot do without (nothing recomputed) against the peak of the
device's datasheet, dense bfloat16. Compiling is left out: the first update is not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from update import Rows, Work, least_flops, make_advantages, make_episodes

from sqlrl_jax.check import PUBLISHED
from sqlrl_jax.config_file import load
from sqlrl_jax.data.packing import samples_of
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.hf import to_hf_tensors

ROOT = Path(__file__).resolve().parents[1]

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v5p": 459e12, "TPU v5 lite": 197e12, "TPU v6": 918e12}
ROW = 8192
MODELS = {"1.5b": "qwen2.5-coder-1.5b", "7b-lora": "qwen2.5-coder-7b", "tiny": ""}
LORA_RANK = 32
Update = Callable[[], tuple[float, float]]


def work_of(name: str) -> Work:
    if name == "tiny":  # to try the script where there is no accelerator
        model = ModelConfig("qwen2", 512, 256, 512, 2, 4, 2, 64, tie_word_embeddings=True, attention_bias=True)
        return Work(model, 8, 40, 200, 100, Rows(256, 1), Rows(256, 1), 64, ())
    model = ModelConfig.from_hf(json.loads((PUBLISHED / f"{MODELS[name]}.json").read_text()))
    return Work(model, 64, 400, 6000, 1800, Rows(ROW, 1), Rows(ROW, 1), 2048, ())


def settings(name: str, work: Work) -> list[str]:
    out = [
        "generator.max_input_length=16",
        "generator.sampling_params.max_generate_length=1",
        "trainer.policy.compute_dtype=bfloat16",
        "trainer.policy.remat=full",
        "trainer.policy.optimizer_config.lr=0.0003",
        "trainer.policy.optimizer_config.max_grad_norm=1.0",
        *work.rows.settings,
        f"trainer.policy.logprob_chunk={work.chunk}",
        "trainer.compile_cache=",
    ]
    return out + ([f"trainer.policy.model.lora.rank={LORA_RANK}"] if name.endswith("lora") else [])


def our_update(name: str, work: Work, overrides: list[str]) -> Update:
    config = load(None, [*settings(name, work), *overrides])
    mesh = make_mesh(config.trainer.mesh, jax.devices()[:1])
    dtype = jnp.bfloat16 if name.endswith("lora") else jnp.float32
    params = jax.jit(lambda: jax.tree.map(lambda p: p.astype(dtype), init_params(work.model, 0)))()
    learner = Learner(config, mesh, work.model, params)
    del params
    episodes, advantages = make_episodes(work), make_advantages(work)

    def update() -> tuple[float, float]:
        metrics = learner.update(episodes, advantages)
        return metrics["policy/loss"], metrics["policy/grad_norm"]

    return update


def peer_update(work: Work, size: int) -> Update:
    import torch
    from torch_peer import TorchUpdate

    params = jax.jit(lambda: init_params(work.model, 0))()
    tensors = {name: jax.device_get(t) for name, t in to_hf_tensors(params, work.model, "float32").items()}
    del params
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = samples_of(make_episodes(work), make_advantages(work), "token_mean")
    peer = TorchUpdate(tensors, work.model, size=size, by_length=True, device=device, mixed=True)
    return lambda: peer.update(samples)


def measure(update: Update, rounds: int) -> tuple[list[float], tuple[float, float]]:
    """Seconds of each round after the first, and what the first gave."""
    first = update()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - started)
    return seconds, first


def device_peak() -> float | None:
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK.items() if name in kind), None)


def row(name: str, label: str, work: Work, seconds: list[float], gigabytes: float) -> str:
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in make_episodes(work))
    middle, peak = statistics.median(seconds), device_peak()
    # Frozen matrices have no gradient of their own: 4 of the 6 operations a weight and token.
    flops = least_flops(work) * (4 / 6 if name.endswith("lora") else 1)
    mfu = f"{flops / middle / peak:.0%}" if peak else ""
    return f"| {label} | {tokens:,} | {middle:.2f} | {tokens / middle:,.0f} | {mfu} | {gigabytes:.1f} |"


def ours(name: str, rounds: int, overrides: list[str]) -> tuple[str, tuple[float, float]]:
    work = work_of(name)
    update = our_update(name, work, overrides)
    seconds, first = measure(update, rounds)
    statistics_ = jax.devices()[0].memory_stats() or {}
    label = f"sqlrl_jax, {name}" + (f" ({' '.join(overrides)})" if overrides else "")
    return row(name, label, work, seconds, statistics_.get("peak_bytes_in_use", 0) / 1e9), first


def peer(name: str, rounds: int, size: int) -> tuple[str, tuple[float, float]]:
    import torch

    work = work_of(name)
    update = peer_update(work, size)
    gc.collect()
    seconds, first = measure(update, rounds)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9
    return row(name, f"eager PyTorch, {name}, {size} sequences at a time", work, seconds, gigabytes), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=MODELS, default="1.5b", help="one a process: memory is that of the process")
    parser.add_argument("--peer", type=int, metavar="SIZE", help="eager PyTorch instead, so many sequences at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="key=value settings of the learner to try")
    args = parser.parse_args()
    if args.peer:  # jax only makes the weights
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", file=sys.stderr)
    print("| update | useful tokens | seconds | tokens/s | MFU | peak GB |\n|---|---|---|---|---|---|")
    line, first = peer(args.work, args.rounds, args.peer) if args.peer else ours(args.work, args.rounds, args.settings)
    print(line, flush=True)
    print(f"first update: loss {first[0]:.6f}, gradient norm {first[1]:.5f}", file=sys.stderr)


if __name__ == "__main__":
    main()
