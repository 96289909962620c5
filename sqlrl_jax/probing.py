"""What the learner tries out after every push: the log-probabilities that its weights give to a few sequences.

The sequences are the last batch's first episodes, before there are any the first evaluation questions as plain text. They are
scored by the learner at temperature 1 and, on the new weights, by every engine (rollout/probe.py). One forward pass of a few
hundred tokens a push; it changes no state, so runs repeat as before.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.chat import load_tokenizer
from rollout.probe import Probe
from rollout.types import Task, Trajectory
from sqlrl_jax.config import Config
from sqlrl_jax.learner import Learner

TOKENS = 256
"""Of each sequence, from its beginning; fewer where the learner's rows or the engines' contexts are shorter."""

# Mean difference, in nats a token, that rounding alone does not make, while other weights make several. A bfloat16 engine
# rounds logits of 16 to 32 to multiples of an eighth: 0.13 was seen for random ids on a 135M model.
_FLOAT32, _BFLOAT16, _QUANTIZED = 1e-3, 0.5, 1.0


class Prober:
    """Chooses the sequences and gives the learner's side of them. `questions` serve until episodes have been seen."""

    def __init__(self, config: Config, learner: Learner, questions: Sequence[Task]) -> None:
        self._learner, self._count = learner, config.bridge.probe_sequences
        policy = config.trainer.policy
        fits = learner.model_config.max_position_embeddings // 2, config.generator.max_input_length
        self._tolerance, self._length = tolerance(config), min(TOKENS, policy.row_tokens, *policy.buckets, *fits)
        tokenizer = load_tokenizer(policy.model.path)
        texts = (" ".join(map(str, task.fields.values())) for task in questions[: self._count])
        self._sequences = [tokenizer.encode(text, add_special_tokens=False)[: self._length] for text in texts]

    def see(self, episodes: Sequence[Trajectory]) -> None:
        """From now on the first episodes of these are the sequences."""
        seen: dict[str, list[int]] = {}
        for episode in episodes:
            if episode.response_ids and len(seen) < self._count:
                seen.setdefault(episode.task_id, (episode.prompt_ids + episode.response_ids)[: self._length])
        self._sequences = list(seen.values()) or self._sequences

    def probe(self) -> Probe | None:
        """The sequences with the present weights' log-probabilities; None without sequences. All processes call it."""
        sequences = [ids for ids in self._sequences if len(ids) > 1]
        return Probe(sequences, self._learner.score(sequences), self._tolerance) if sequences else None


def tolerance(config: Config) -> float:
    """bridge.probe_tolerance, or what the coarser of the two sides' types calls for."""
    if config.bridge.probe_tolerance is not None:
        return config.bridge.probe_tolerance
    engine = config.generator.inference_engine
    if engine.quantization:
        return _QUANTIZED
    return _BFLOAT16 if "bfloat16" in (engine.dtype, config.trainer.policy.compute_dtype) else _FLOAT32
