"""The supervised cold start: a fresh small model imitates demonstrations until it can play an episode at all.

Demonstrations are played through the real episode (chat template, environment, SQLite workers) by an engine that says
what they say, so the model sees exactly the tokens, masks and observations of reinforcement learning later. Then packed
rows, next-token loss on everything with less weight on what the model did not write, one optimizer step a batch. The
result is a Hugging Face folder. Left out: resuming (it takes minutes) and starting from weights that exist, because
whoever has a pretrained model does not need this.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from rollout.chat import Chat, load_tokenizer
from rollout.engine.scripted import ScriptedEngine
from rollout.environment import make_environment_factory
from rollout.episode import EpisodeSettings, run_batch
from rollout.errors import UserError
from rollout.types import SamplingParams, Task, Trajectory
from sqlrl_jax.allocator import keep_freed_memory
from sqlrl_jax.config import Config
from sqlrl_jax.data.demo.generate import Parameters, corpus, generate
from sqlrl_jax.data.demo.tokenizer import train_tokenizer
from sqlrl_jax.data.packing import PackedBatch, Sample, pack_for
from sqlrl_jax.data.rows import assign_rows
from sqlrl_jax.data.tasks import read_tasks
from sqlrl_jax.display import Display, duration
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.hf import save_hf
from sqlrl_jax.model.params import param_shardings, parameter_count
from sqlrl_jax.rl.logprobs import TokenLogprobs
from sqlrl_jax.rl.losses import Sums, add_sums, next_token_loss
from sqlrl_jax.step import Program, Stepper

_PLAY_AT_ONCE = 512
_REPORT_EVERY = 50
_TOKENIZER_TEXTS = 12_000


def objective(out: TokenLogprobs, batch: dict[str, Any]) -> tuple[Float[Array, ""], Sums]:
    """Weighted next-token loss of a micro-batch."""
    return next_token_loss(out.logprobs, batch["weights"], out.greedy, batch["mask"])


def main(config: Config) -> int:
    """Generates demonstrations if needed, plays them, trains, writes sft.output. Returns the exit status."""
    keep_freed_memory()
    display, sft = Display(), config.sft
    if Path(sft.output).exists():
        raise UserError(f"sft.output {sft.output} exists already: remove it or name another folder")
    if config.trainer.policy.model.lora.rank:
        raise UserError("a fresh model has nothing to adapt: trainer.policy.model.lora.rank must be 0 here")
    parameters = Parameters(
        seed=config.data.demo.seed,
        train_databases=0,
        heldout_databases=0,
        questions_per_database=config.data.demo.questions_per_database,
        demonstration_databases=sft.databases,
        look=sft.look,
    )
    folder = generate(
        sft.demonstrations,
        seed=parameters.seed,
        train_databases=0,
        heldout_databases=0,
        questions_per_database=parameters.questions_per_database,
        demonstration_databases=sft.databases,
        look=sft.look,
    )
    tasks = read_tasks(folder / "demonstrations.jsonl")
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        train_tokenizer(islice(corpus(parameters), _TOKENIZER_TEXTS), tokenizer_dir, sft.model.vocab_size)
        chat = Chat(load_tokenizer(tokenizer_dir), conversation=config.generator.use_conversation_multi_turn)
        display.print(f"playing {len(tasks):,} demonstrations")
        samples = [sample_of(t, sft.prompt_loss_weight) for t in play(config, tasks, chat)]
        trainer = ColdStart(config, chat, samples, display)
        trainer.train()
        save_hf(sft.output, trainer.stepper.state.params, trainer.model_config, "float32", tokenizer_dir)
    display.print(f"wrote {sft.output}")
    return 0


def play(config: Config, tasks: Sequence[Task], chat: Chat) -> list[Trajectory]:
    """The demonstrations as finished episodes. Raises UserError naming one that cannot be played to its end."""
    generator = config.generator
    settings = EpisodeSettings(generator.max_turns, generator.max_input_length, config.trainer.max_prompt_length)
    params = SamplingParams(max_tokens=generator.sampling_params.max_generate_length)
    out: list[Trajectory] = []
    with make_environment_factory(config) as environments, ThreadPoolExecutor(8) as pool:
        for start in range(0, len(tasks), _PLAY_AT_ONCE):
            part = tasks[start : start + _PLAY_AT_ONCE]
            scripts = [[chat.encode_action(a, end=False) for a in task.fields["actions"]] for task in part]
            engine = ScriptedEngine(scripts, config.trainer.policy.row_tokens)
            played = run_batch(part, 1, engine, environments.create, chat, settings, params, seed=0, pool=pool)
            out += asyncio.run(_awaited(played))
    for task, episode in zip(tasks, out, strict=True):
        expected = len(task.fields["actions"])
        if episode.error or len(episode.turns) != expected:
            raise UserError(
                f"demonstration {task.id}: {len(episode.turns)} of its {expected} actions could be played "
                f"({episode.error or episode.stop_reason}); check generator.max_turns, max_input_length and "
                f"sampling_params.max_generate_length"
            )
    return out


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def sample_of(episode: Trajectory, prompt_loss_weight: float) -> Sample:
    """An episode with weight 1 on the model's own tokens and `prompt_loss_weight` on all others."""
    tokens = np.asarray([*episode.prompt_ids, *episode.response_ids], np.int32)
    own = np.asarray([0] * len(episode.prompt_ids) + episode.loss_mask, bool)
    weights = np.where(own, 1.0, prompt_loss_weight).astype(np.float32)
    trained = weights > 0
    trained[0] = False
    zeros = np.zeros(len(tokens), np.float32)
    return Sample(f"demonstration {episode.task_id}", tokens, trained, zeros, zeros, weights)


class ColdStart:
    """A fresh model and its training on samples; the last `sft.heldout` of them are only measured."""

    def __init__(self, config: Config, chat: Chat, samples: Sequence[Sample], display: Display) -> None:
        self.config, self.display = config, display
        count = len(samples) - config.sft.heldout
        if count < 1:
            raise UserError(f"sft.heldout {config.sft.heldout} leaves none of {len(samples)} demonstrations")
        self.samples, self.heldout = list(samples[:count]), list(samples[count:])
        self.model_config = fresh_model(config, chat)
        mesh = make_mesh(config.trainer.mesh)
        make = jax.jit(
            lambda: init_params(self.model_config, config.trainer.seed, config.trainer.policy.param_dtype),
            out_shardings=param_shardings(self.model_config, mesh),
        )
        self.epochs = [self._rows(epoch) for epoch in range(config.sft.epochs)]
        self.total = sum(len(rows) // config.trainer.policy.rows_per_micro_batch for rows in self.epochs)
        program = Program(
            config.trainer.policy, self.model_config, mesh, objective, temperature=1.0, total_steps=self.total
        )
        self.stepper = Stepper(program, make())

    def train(self) -> list[dict[str, float]]:
        """All epochs. Returns what was printed: nll, accuracy (teacher-forced, own tokens) and tokens/s along the way."""
        history: list[dict[str, float]] = []
        sums: list[Sums] = []
        self.display.print(f"{parameter_count(self.model_config):,} parameters, {self.total:,} steps")
        started, tokens = time.monotonic(), 0
        for step, packed in enumerate(self._batches(), 1):
            sums.append(self.stepper.minibatch(packed)[0])
            tokens += packed.tokens
            if step % _REPORT_EVERY == 0 or step == self.total:
                entry = {"step": float(step), **_means(jax.device_get(sums))}
                seconds = time.monotonic() - started
                entry["tokens_per_second"] = tokens / seconds
                self.display.print(
                    f"step {step:>5}/{self.total}  nll {entry['nll']:.4f}  accuracy {entry['accuracy']:.2%}  "
                    f"{entry['tokens_per_second']:,.0f} tokens/s  left {duration(seconds / step * (self.total - step))}"
                )
                history.append(entry)
                sums = []
        if self.heldout:
            measured = self.measure(self.heldout)
            self.display.print(f"held out: nll {measured['nll']:.4f}  accuracy {measured['accuracy']:.2%}")
        return history

    def measure(self, samples: Sequence[Sample]) -> dict[str, float]:
        """nll and accuracy on the own tokens of samples, without training."""
        packed = self._pack(samples, None)
        scored = zip(self.stepper.scored(packed), packed.micro_batches, strict=True)
        return _means([jax.device_get(objective(out, batch)[1]) for out, batch in scored])

    def _rows(self, epoch: int) -> list[list[int]]:
        """Every training sample in some row, shuffled: other neighbours and another order in each epoch."""
        rng = np.random.default_rng([self.config.trainer.seed, epoch])
        order = rng.permutation(len(self.samples))
        rows = assign_rows([len(self.samples[i].tokens) for i in order], self.config.trainer.policy.row_tokens)
        return [[int(order[i]) for i in rows[r]] for r in rng.permutation(len(rows))]

    def _batches(self) -> Iterator[PackedBatch]:
        size = self.config.trainer.policy.rows_per_micro_batch
        for rows in self.epochs:
            for start in range(0, len(rows) - size + 1, size):  # an epoch's last partial batch is dropped
                yield self._pack(self.samples, rows[start : start + size])

    def _pack(self, samples: Sequence[Sample], rows: list[list[int]] | None) -> PackedBatch:
        if rows is not None:
            samples = [samples[i] for row in rows for i in row]
            places = iter(range(len(samples)))
            rows = [[next(places) for _ in row] for row in rows]
        return pack_for(self.config.trainer.policy, samples, self.stepper.program.shards, rows=rows)


def fresh_model(config: Config, chat: Chat) -> ModelConfig:
    """A tied Qwen2-type model of the configured sizes over the chat's tokenizer."""
    sizes = config.sft.model
    return ModelConfig(
        model_type="qwen2",
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        tie_word_embeddings=True,
        attention_bias=True,
        eos_token_ids=tuple(sorted(chat.end_ids)),
        pad_token_id=chat.tokenizer.pad_token_id,
    )


def _means(parts: Sequence[Sums]) -> dict[str, float]:
    total = dict(parts[0])
    for part in parts[1:]:
        total = add_sums(total, part)
    own = max(float(total["own_tokens"]), 1.0)
    return {"nll": float(total["nll"]) / own, "accuracy": float(total["greedy"]) / own}
