"""What the head's logits and the kept activations cost in memory: markdown tables.

    python benchmarks/memory.py                what the compiler reserves, for a 0.5B model with a vocabulary of 151,936
    python benchmarks/memory.py --run          and processes that run a small model of that vocabulary, by their peak RSS

A micro-batch's gradients are compiled as training compiles them, in float32, every place of a row trained, once with our
head, once with all logits at one time ([tokens, vocabulary], as a plain loss has them) and once with no head at all: the
loss is then a mean over the hidden states. "Memory" is everything that exists while they are computed: weights, summed
gradients and temporaries. The optimizer's moments, the same for all, are left out. The second table is of the settings of
trainer.policy.remat. Rows are of 512 tokens, so that attention on a CPU, which holds its scores, does not hide the head.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqlrl_jax.config_file import load
from sqlrl_jax.learner import objective_of
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import forward, unembedding
from sqlrl_jax.model.params import Params
from sqlrl_jax.rl.logprobs import TokenLogprobs
from sqlrl_jax.rl.losses import load_policy_loss
from sqlrl_jax.step import Program

ROOT = Path(__file__).resolve().parents[1]

VOCABULARY, ROW = 151_936, 512
_qwen2 = partial(ModelConfig, "qwen2", attention_bias=True, tie_word_embeddings=True)
MODELS = {
    "0.5B": _qwen2(VOCABULARY, 896, 4864, 24, 14, 2, 64),
    "narrow": _qwen2(VOCABULARY, 256, 768, 4, 4, 2, 64),
    "deep": _qwen2(4096, 256, 768, 12, 4, 2, 64),
}


class WithoutHead(Program):
    """Gradients of the mean of each hidden state, in place of a log-probability."""

    def _outputs(self, params: Params, batch: dict[str, Array], temperature: float | None = None) -> TokenLogprobs:
        value = self._picked(params, batch).mean(-1)
        return TokenLogprobs(value, jnp.zeros_like(value), value > 0)

    def _picked(self, params: Params, batch: dict[str, Array]) -> Array:
        places = batch["tokens"], batch["positions"], batch["reach"]
        hidden = forward(self.model_config, params, *places, self._compute)
        return jnp.take_along_axis(hidden.reshape(1, -1, hidden.shape[-1]), batch["index"][..., None], axis=1)


class FullLogits(WithoutHead):
    """All logits at one time."""

    def _outputs(self, params: Params, batch: dict[str, Array], temperature: float | None = None) -> TokenLogprobs:
        table = jax.nn.log_softmax(self._picked(params, batch) @ unembedding(params))
        chosen = jnp.take_along_axis(table, batch["targets"][..., None], axis=-1)[..., 0]
        return TokenLogprobs(chosen, -(jnp.exp(table) * table).sum(-1), table.argmax(-1) == batch["targets"])


HEADS: dict[str, type[Program]] = {"none": WithoutHead, "chunked": Program, "full logits": FullLogits}


def make(args: argparse.Namespace) -> Program:
    """The compiled step of a case."""
    config = load(
        None,
        [
            "generator.max_input_length=16",
            "generator.sampling_params.max_generate_length=1",
            f"trainer.policy.row_tokens={ROW}",
            f"trainer.policy.rows_per_micro_batch={args.tokens // ROW}",
            f"trainer.policy.logprob_chunk={args.chunk}",
            f"trainer.policy.remat={args.remat}",
        ],
    )
    algorithm = config.trainer.algorithm
    objective = partial(objective_of, algorithm, load_policy_loss(algorithm.policy_loss_type), "rollout")
    mesh = make_mesh(config.trainer.mesh, jax.devices()[:1])
    return HEADS[args.head](config.trainer.policy, MODELS[args.model], mesh, objective, temperature=1.0, total_steps=0)


def case(args: argparse.Namespace) -> dict[str, float]:
    """One program: what the compiler reserves and, when it is run, seconds and the process's peak RSS; gigabytes."""
    program = make(args)
    batch, params = program.abstract_batches(), program.abstract_params()
    gradients, sums = jax.eval_shape(program.zeros, params, {}, batch)
    compiled = program.add.lower(gradients, sums, params, {}, batch, jax.ShapeDtypeStruct((), np.int32)).compile()
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    out = {"held": held / 1e9, "temporary": memory.temp_size_in_bytes / 1e9}
    if not args.run:
        return out
    compile_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    weights = jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), params)
    arrays = {name: jnp.zeros(a.shape, a.dtype) for name, a in batch.items()}
    arrays |= {
        "index": jnp.arange(args.tokens, dtype=jnp.int32)[None, None],
        "count": jnp.full(1, args.tokens, jnp.int32),
    }
    arrays |= {"reach": arrays["reach"] + ROW, "mask": ~arrays["mask"], "weights": arrays["weights"] + 1}
    carried: Any = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (gradients, sums))
    for _ in range(args.rounds):
        started = time.perf_counter()
        carried = jax.block_until_ready(compiled(*carried, weights, {}, arrays, np.int32(1)))
        out["seconds"] = min(time.perf_counter() - started, out.get("seconds", float("inf")))
    return out | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "compile_peak": compile_peak}


def measured(
    model: str, head: str, tokens: int, chunk: int, remat: str = "full", run: bool = False
) -> dict[str, float]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", "--model", model, "--head", head, "--tokens", str(tokens)]
    command += ["--chunk", str(chunk), "--remat", remat] + ["--run"] * run
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def head_table(model: str, tokens: tuple[int, ...], chunk: int, run: bool) -> None:
    """Memory with each head; all logits are run only where they are small enough for any machine."""
    print(f"\n{model}, vocabulary {VOCABULARY:,}, {chunk} trained tokens at one time, remat full\n")
    print("| tokens | head | memory, GB | x no head |" + " seconds | peak RSS, GB |" * run)
    print("|---|---|---|---|" + "---|---|" * run)
    for count in tokens:
        base = 0.0
        for head in HEADS:
            ran = run and (head != "full logits" or count <= 1024)
            got = measured(model, head, count, chunk, run=ran)
            whole = got["held"] + got["temporary"]
            base = base or whole
            line = f"| {count:,} | {head} | {whole:.2f} | {whole / base:.2f} |"
            if run:
                line += f" {got['seconds']:.1f} | {got['peak']:.2f} |" if ran else " not run | |"
            print(line, flush=True)


def remat_table(run: bool) -> None:
    """Temporaries of each policy, for a model whose activations count for more than its weights."""
    print("\n12 layers of width 256, 8,192 tokens\n\n| remat | temporaries, GB |" + " seconds | peak RSS, GB |" * run)
    print("|---|---|" + "---|---|" * run)
    for remat in ("none", "attention", "full"):
        got = measured("deep", "chunked", 8192, 1024, remat, run)
        line = f"| {remat} | {got['temporary']:.2f} |"
        print(line + (f" {got['seconds']:.1f} | {got['peak']:.2f} |" if run else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    for name in ("model", "head", "remat"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("tokens", "chunk"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(args)))
        return
    head_table("0.5B", (2048, 8192), 1024, False)
    if args.run:
        head_table("narrow", (1024, 8192), 128, True)
    remat_table(args.run)


if __name__ == "__main__":
    main()
