"""How fast one GRPO update runs, against the same update in eager PyTorch, as a markdown table.

    python benchmarks/update.py [--work tiny|small] [--rounds 5]        (needs the extra `parity` for PyTorch)
        [--trl PYTHON] [--tunix PYTHON]     TRL and Tunix themselves, from environments of their own

tiny: a 0.92M Qwen2-type model, 256 episodes of 40 to 184 tokens, mean 82. small: 78M, vocabulary 16,384, 16 episodes of 116
to 630 tokens, mean 339. Eight episodes a question, of whose tokens its prompt is a third. float32, AdamW, PPO clip. Useful
tokens are those of the episodes, padding not counted. Ours comes with what episodes begin with computed once, as it is by
default, and with every episode whole, which is also the row for episodes of which no two are of one question. The
contenders take turns, each in a process of its own; the table shows each one's median and best round and its CPU time,
because machines are seldom quiet. Compiling is left out (a warm-up update); the losses of the warm-up must agree, or the
run ends with an error. PyTorch comes three times: padded as TRL does, sorted by length with transformers' own model, and as
fast as we could write it (torch_peer.py, transformers_peer.py). Our rows were tuned once, by hand; PyTorch's micro-batches
are tuned here, for each of the three, by trying several sizes first and keeping the fastest, unless --sizes gives them.

The last row takes its turns too: the time of the products that the update cannot do without (layers, attention over each
token's own past, the head on trained tokens; forward and backward, nothing recomputed) at the rate of one product of two
2048 x 2048 matrices.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import turns
from safetensors.numpy import save_file

from rollout.types import Trajectory
from sqlrl_jax.allocator import keep_freed_memory
from sqlrl_jax.config_file import load
from sqlrl_jax.data.packing import samples_of
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.hf import to_hf_tensors
from sqlrl_jax.model.params import param_specs, parameter_count

ROOT = Path(__file__).resolve().parents[1]

OURS = "sqlrl_jax"
APART = "sqlrl_jax, nothing shared"
SPLIT = "sqlrl_jax, each core a device"
PADDED = "eager PyTorch, padded (TRL's layout)"
SORTED = "transformers, sorted by length"
BEST = "the best eager PyTorch we could write"
TORCH = (PADDED, SORTED, BEST)
LIMIT = "limit at the matmul rate"
TRL = "TRL 1.16 GRPOTrainer"
TUNIX = "Tunix 0.1.7, padded"
PEERS = {TRL: "trl_peer.py", TUNIX: "tunix_peer.py"}


GROUP = 8  # episodes of a question


class Rows(NamedTuple):
    tokens: int
    number: int  # in a micro-batch
    buckets: tuple[int, ...] = ()  # shorter rows that may be used

    @property
    def settings(self) -> list[str]:
        return [
            f"trainer.policy.row_tokens={self.tokens}",
            f"trainer.policy.rows_per_micro_batch={self.number}",
            f"trainer.policy.row_buckets=[{','.join(map(str, self.buckets))}]",
        ]


class Work(NamedTuple):
    model: ModelConfig
    episodes: int
    shortest: int
    longest: int
    mean: int
    rows: Rows
    apart: Rows  # where nothing is shared
    chunk: int
    torch_sizes: tuple[int, ...]  # sequences in a micro-batch of PyTorch; the fastest is used
    split: Rows | None = None  # of two devices of one core each, where they are tried: they hold everything twice


WORK = {
    "tiny": Work(
        ModelConfig("qwen2", 1024, 128, 384, 4, 4, 2, 32, tie_word_embeddings=True, attention_bias=True),
        *(256, 40, 184, 84, Rows(256, 7), Rows(216, 7, (168, 72)), 240, (4, 8, 16, 32, 64, 128, 256), Rows(240, 12)),
    ),
    "small": Work(
        ModelConfig("qwen2", 16384, 768, 2176, 10, 12, 4, 64, tie_word_embeddings=True, attention_bias=True),
        *(16, 116, 630, 353, Rows(760, 1), Rows(720, 1), 312, (1, 2, 4, 8)),
    ),
}


def make_episodes(work: Work, seed: int = 0) -> list[Trajectory]:
    """Episodes of the wanted lengths, eight a question: its prompt, a third of their tokens, then turns of sampled tokens
    with observations in between."""
    rng = np.random.default_rng(seed)
    spread = rng.beta(1.2, 1.2 * (work.longest - work.mean) / (work.mean - work.shortest), work.episodes)
    lengths = (work.shortest + spread * (work.longest - work.shortest)).round().astype(int)
    lengths[:2] = work.shortest, work.longest
    out = []
    for i, length in enumerate(lengths):
        if i % GROUP == 0:
            group = lengths[i : i + GROUP]
            prompt = min(int(group.mean()) // 3, int(group.min()) - 8)
            question = rng.integers(0, work.model.vocab_size, prompt).tolist()
        ids = question + rng.integers(0, work.model.vocab_size, length - prompt).tolist()
        mask = [int(position % 32 < 20) for position in range(length - prompt)]
        logprobs = [-np.log(work.model.vocab_size) * m for m in mask]
        out.append(
            Trajectory(
                str(i // GROUP),
                "benchmark",
                i % GROUP,
                ids[:prompt],
                ids[prompt:],
                mask,
                logprobs,
                [],
                0.0,
                "wrong",
                "solution",
            )
        )
    return out


def make_advantages(work: Work) -> np.ndarray:
    return np.random.default_rng(1).normal(size=work.episodes).astype(np.float32)


def learner_update(work: Work, overrides: list[str]) -> Callable[[], tuple[float, float]]:
    """Our update; called, it returns loss and gradient norm."""
    keep_freed_memory()
    config = load(
        None,
        [
            "generator.max_input_length=16",
            "generator.sampling_params.max_generate_length=1",
            "trainer.policy.optimizer_config.lr=0.0003",
            "trainer.policy.optimizer_config.max_grad_norm=1.0",
            *work.rows.settings,
            f"trainer.policy.logprob_chunk={work.chunk}",
            "trainer.policy.scan_layers=false",
            "trainer.policy.remat=none",
            *overrides,
        ],
    )
    learner = Learner(config, make_mesh(config.trainer.mesh), work.model, init_params(work.model, 0))
    episodes = make_episodes(work)

    def update() -> tuple[float, float]:
        metrics = learner.update(episodes, make_advantages(work))
        return metrics["policy/loss"], metrics["policy/grad_norm"]

    return update


def torch_update(name: str, work: Work, size: int) -> Callable[[], tuple[float, float]]:
    """PyTorch's update of the same weights and episodes, `size` sequences at a time."""
    from torch_peer import TorchUpdate

    tensors = jax.device_get(to_hf_tensors(init_params(work.model, 0), work.model, "float32"))
    samples = samples_of(make_episodes(work), make_advantages(work), "token_mean")
    if name == SORTED:
        from transformers_peer import TransformersUpdate

        peer: TorchUpdate = TransformersUpdate(tensors, work.model, size=size)
    else:
        peer = TorchUpdate(tensors, work.model, size=size, by_length=name == BEST)
    return lambda: peer.update(samples)


def least_flops(work: Work) -> float:
    """Operations of the products in an update: 2 forward and 4 backward for each weight and token."""
    model, episodes = work.model, make_episodes(work)
    matrices = sum(math.prod(s.shape) for p, s in param_specs(model).items() if p.startswith("layers.") and s.is_matrix)
    width = model.num_hidden_layers * model.num_attention_heads * model.head_dim
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in episodes]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    trained = sum(sum(e.loss_mask) for e in episodes)
    return 6.0 * (matrices * sum(lengths) + 2 * width * pairs + model.hidden_size * model.vocab_size * trained)


def limit_update(work: Work) -> Callable[[], tuple[float, float]]:
    """Products that take the time of all the products in an update, as nearly as whole ones can."""
    side = 2048
    matrix = jnp.ones((side, side))
    multiply = jax.jit(lambda a: a @ a)
    for _ in range(4):  # the threads are slow at first
        multiply(matrix).block_until_ready()
    count = max(round(least_flops(work) / (2 * side**3)), 1)

    def update() -> tuple[float, float]:
        for _ in range(count):
            multiply(matrix).block_until_ready()
        return 0.0, 0.0

    return update


def serve(name: str, work: Work, size: int, overrides: list[str]) -> None:
    """A contender's process."""
    if name == LIMIT:
        update = limit_update(work)
    else:
        update = torch_update(name, work, size) if name in TORCH else learner_update(work, overrides)
    turns.serve(update)


def variants(work: Work) -> dict[str, list[str]]:
    """Ours, by name, and the settings that tell them apart. Two devices share the rows so that XLA runs small operations on
    both cores too."""
    out = {OURS: [], APART: ["trainer.policy.share_prefixes=false", *work.apart.settings]}
    if work.split:
        out[SPLIT] = ["trainer.mesh.data=2", "trainer.mesh.fsdp=1", *work.split.settings]
    return out


def contender(name: str, arguments: list[str]) -> turns.Contender:
    """One that this file serves."""
    environment = {"JAX_NUM_CPU_DEVICES": "2"} if name == SPLIT else {}
    return turns.Contender([sys.executable, __file__, "--serve", name, *arguments], environment)


def write_work(work: Work, folder: Path) -> None:
    """The model and the episodes for contenders that know nothing of this project."""
    parameters = init_params(work.model, 0)
    tensors = jax.device_get(to_hf_tensors(parameters, work.model, "float32"))
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(work.model.to_hf("float32")))
    names = ("prompt_ids", "response_ids", "loss_mask", "logprobs")
    episodes = [
        {name: getattr(e, name) for name in names} | {"advantage": float(advantage)}
        for e, advantage in zip(make_episodes(work), make_advantages(work), strict=True)
    ]
    (folder / "episodes.json").write_text(json.dumps(episodes, default=float))


def fastest_size(name: str, work: str) -> int:
    """The micro-batch size with which a layout of PyTorch is fastest: best of three updates of each."""
    seconds: dict[int, float] = {}
    for size in WORK[work].torch_sizes:
        tried = contender(name, ["--work", work, "--size", str(size)])
        tried.update()
        seconds[size] = min(tried.update()["seconds"] for _ in range(3))
        tried.end()
    found = ", ".join(f"{size}: {value:.2f} s" for size, value in seconds.items())
    print(f"{name}: {found}", flush=True)
    return min(seconds, key=lambda size: seconds[size])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", choices=WORK, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes", type=int, nargs=3, metavar=("PADDED", "SORTED", "BEST"), help="PyTorch's micro-batches"
    )
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL (see trl_peer.py)")
    parser.add_argument(
        "--tunix", metavar="PYTHON", help="interpreter of an environment with Tunix (see tunix_peer.py)"
    )
    parser.add_argument("--serve", choices=(OURS, APART, SPLIT, *TORCH, LIMIT), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="key=value settings of the learner to try")
    args = parser.parse_args()
    work = WORK[args.work]
    if args.serve:
        serve(args.serve, work, args.size, args.settings)
        return 0
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in make_episodes(work))
    print(f"{args.work}: {parameter_count(work.model):,} parameters, {work.episodes} episodes, {tokens:,} tokens\n")
    sizes = dict(zip(TORCH, args.sizes or [fastest_size(name, args.work) for name in TORCH], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            name: contender(name, ["--work", args.work, "--size", str(sizes.get(name, 0)), *args.settings, *more])
            for name, more in (variants(work) | {name: [] for name in (*TORCH, LIMIT)}).items()
        }
        peers = {name: python for name, python in ((TRL, args.trl), (TUNIX, args.tunix)) if python}
        for name, python in peers.items():
            write_work(work, Path(folder))
            script = ROOT / "benchmarks" / PEERS[name]
            contenders[name] = turns.Contender([python, str(script), folder, str(sizes[PADDED])])
        first = {name: c.update() for name, c in contenders.items()}
    for name, got in first.items():
        if name not in (LIMIT, TUNIX) and not np.allclose(
            [got["loss"], got["norm"]], [first[OURS]["loss"], first[OURS]["norm"]], 1e-3, 1e-4
        ):
            print(f"{name}: loss and gradient norm differ: {got}, ours {first[OURS]}", file=sys.stderr)
            return 1
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, one in contenders.items():
            time.sleep(0.3)  # the threads of the one before stop spinning
            rounds[name].append(one.update())
    for one in contenders.values():
        one.end()
    print_table(tokens, rounds)
    return 0


def print_table(tokens: int, rounds: dict[str, list[dict[str, float]]]) -> None:
    """One row a contender. The ratios are medians over the rounds of what took its turn in the same round."""
    columns = ["update", "useful tokens/s, median", "best", "x padded", "x sorted", "x best PyTorch"]
    columns += ["CPU seconds", "peak RSS, GB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, results in rounds.items():
        rates = [tokens / r["seconds"] for r in results]
        times = [
            statistics.median(o["seconds"] / r["seconds"] for o, r in zip(rounds[other], results, strict=True))
            for other in TORCH
        ]
        middle, cpu = statistics.median(rates), statistics.median(r["cpu"] for r in results)
        cells = [f"{middle:,.0f}", f"{max(rates):,.0f}", *(f"{x:.2f}" for x in times), f"{cpu:.1f}"]
        peak = "" if name == LIMIT else f"{max(r['peak'] for r in results):.1f}"
        print(f"| {name} | {' | '.join(cells)} | {peak} |")


if __name__ == "__main__":
    sys.exit(main())
