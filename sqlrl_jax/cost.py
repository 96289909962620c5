"""What a training step costs by arithmetic: FLOPs, bytes of HBM, memory of a device, and the least it has to send.

All of it follows from the sizes of model, rows and mesh; nothing is compiled. FLOPs are of matrix products, two for a
multiplication and addition. What a step must do ("needed") is one forward and one backward pass over the tokens, the
head on trained tokens alone, attention from each token to its own episode; what it does do ("spent") adds what is computed
again to save memory and attention over whole rows, because a kernel skips what is after a token but not what is before
its episode. Memory is an estimate to within a fifth or so; `launch.py check --topology` asks the compiler instead.
Left out: the CPU's attention, which holds scores in memory as the kernels of accelerators do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from jax.sharding import AbstractMesh

from sqlrl_jax.config import Config, PolicyConfig
from sqlrl_jax.critic import value_specs
from sqlrl_jax.mesh import AXES, RULES, split_axes
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.lora import frozen_specs, trained_specs
from sqlrl_jax.model.params import ParamSpec, param_specs

_WIDTH = {"float32": 4, "bfloat16": 2}
# Products of an attention kernel for each pair of a query and a key: two forward; backward the scores again and four.
_ATTENTION_FORWARD, _ATTENTION_BACKWARD, _ATTENTION_NEEDED = 2, 5, 6


@dataclass(frozen=True)
class Episodes:
    """What the configuration cannot know: how long the mean episode is, and which part of its tokens is trained."""

    tokens: int
    trained_share: float


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch, on all devices together."""

    six_n: float
    """6 · N · tokens, N being all matrices that a token meets, the head among them."""
    needed: float
    matrices: float
    """Spent on products with weights."""
    attention: float
    """Spent on attention."""

    @property
    def spent(self) -> float:
        return self.matrices + self.attention


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while gradients are computed."""

    weights: float
    optimizer: float
    gradients: float
    reference: float
    """Weights of a KL term's reference model, where it is another copy."""
    critic: float
    """Weights and optimizer of gae's critic, which rest meanwhile."""
    saved: float
    """Activations kept from the forward for the backward pass."""
    working: float
    """What one layer, or the head, needs at its busiest."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Step:
    """One training step, as the reader meets it: passes over packed rows and what they add up to."""

    episodes: int
    tokens: float
    micro_batches: int
    optimizer_steps: int
    flops: float
    """Spent, on all devices."""
    bytes: float
    """Read and written in the HBM of one device."""


class Cost:
    """The arithmetic for one configuration and model on a mesh of `sizes`."""

    def __init__(self, config: Config, model: ModelConfig, sizes: Mapping[str, int], episodes: Episodes) -> None:
        self.config, self.model, self.episodes = config, model, episodes
        self.sizes = dict(sizes)
        self.policy: PolicyConfig = config.trainer.policy
        self.mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
        lora = self.policy.model.lora
        self.all = param_specs(model)
        self.trained, self.frozen = trained_specs(model, lora), frozen_specs(model, lora)
        self.width = _WIDTH[self.policy.compute_dtype]
        self.shards = math.prod(sizes[axis] for axis in RULES["batch"])
        self.devices = math.prod(sizes.values())
        self.tokens = self.policy.rows_per_micro_batch * self.policy.row_tokens
        self.local_tokens = self.tokens / self.shards / sizes["sequence"]
        self.attends_again = self.policy.remat == "full"
        self.remat = self.policy.remat != "none"

    # Parameters.

    @property
    def parameters(self) -> int:
        """Numbers in the model; a tied output matrix counts once."""
        return sum(math.prod(spec.shape) for spec in self.all.values())

    @property
    def trained_parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.trained.values())

    def _local(self, spec: ParamSpec, skip: tuple[str, ...] = ()) -> float:
        """Numbers of a parameter on one device; axes of the mesh in `skip` do not split it."""
        return math.prod(spec.shape) / math.prod(self.sizes[a] for a in self._split(spec) if a not in skip)

    def _split(self, spec: ParamSpec) -> tuple[str, ...]:
        parts = zip(spec.axes, spec.units, strict=True)
        return tuple(axis for name, units in parts for axis in split_axes(self.mesh, name, units))

    # FLOPs.

    def _head(self) -> int:
        return self.model.hidden_size * self.model.vocab_size

    def _computed_again(self) -> int:
        """Numbers in the matrices that the backward pass multiplies with a second time. Not those that end a layer: their
        result is the next layer's input, which is kept; where attention's values are kept, only the MLP's first two."""
        kept = {"none": "", "attention": "q k v o down q_b k_b v_b o_b down_b", "full": "down down_b"}[
            self.policy.remat
        ]
        matrices = {p: s for p, s in (self.all | self.trained).items() if p.startswith("layers.") and s.is_matrix}
        kept_paths = {f"layers.{name}" for name in kept.split()}
        return sum(math.prod(s.shape) for p, s in matrices.items() if p not in kept_paths) if self.remat else 0

    def _pairs(self, length: float) -> float:
        """Pairs of query and key in a micro-batch whose rows are cut into causal parts of `length` tokens."""
        return self.tokens * (length + 1) / 2

    def flops(self) -> Flops:
        layers = sum(math.prod(s.shape) for p, s in self.all.items() if p.startswith("layers.") and s.is_matrix)
        adapters = self.trained_parameters if self.frozen else 0
        head, chosen = self._head(), self.tokens * self.episodes.trained_share
        weight_gradient = 0 if self.frozen else 2
        forward = 2 * (layers + adapters) * self.tokens
        backward = forward + (weight_gradient * layers + 2 * adapters) * self.tokens
        again = 2 * self._computed_again() * self.tokens
        at_head = (4 + weight_gradient) * head * chosen
        pair = 2 * self.model.num_attention_heads * self.model.head_dim * self.model.num_hidden_layers
        own = self._pairs(min(self.episodes.tokens, self.policy.row_tokens))
        passes = _ATTENTION_FORWARD * (1 + self.attends_again) + _ATTENTION_BACKWARD
        return Flops(
            six_n=6.0 * (layers + adapters + head) * self.tokens,
            needed=forward + backward + at_head + _ATTENTION_NEEDED * pair * own,
            matrices=forward + again + backward + at_head + 2.0 * head * chosen,
            attention=float(passes * pair * self._pairs(self.policy.row_tokens)),
        )

    # Memory and its traffic.

    def memory(self) -> Memory:
        master = _WIDTH[self.policy.param_dtype]
        trained = sum(map(self._local, self.trained.values()))
        frozen = sum(map(self._local, self.frozen.values())) * self.width
        copies = self.config.trainer.algorithm.needs_reference and not self.frozen
        return Memory(
            weights=trained * master + frozen,
            optimizer=0.0 if self.policy.offload_optimizer else self._optimizer() * master,
            gradients=trained * 4,
            reference=sum(map(self._local, self.all.values())) * self.width if copies else 0.0,
            critic=self._critic() * master if self.config.trainer.algorithm.needs_critic else 0.0,
            saved=self._saved(),
            working=max(self._layer_work(), self._head_work()) + trained * self._more_gradients(),
        )

    def _optimizer(self) -> float:
        name = self.policy.optimizer_config.name
        return sum(self._local(spec) * self._moments(name, path, spec) for path, spec in self.trained.items())

    def _critic(self) -> float:
        """Numbers of a critic with the policy's sizes, and of its moments."""
        name = self.config.trainer.critic.optimizer_config.name
        specs, offloaded = value_specs(self.model), self.policy.offload_optimizer
        return sum(
            self._local(spec) * (1 + (0 if offloaded else self._moments(name, path, spec)))
            for path, spec in specs.items()
        )

    def _moments(self, optimizer: str, path: str, spec: ParamSpec) -> int:
        muon = optimizer == "muon" and spec.is_matrix and path.startswith("layers.")
        return 1 if muon else 2

    def _more_gradients(self) -> int:
        """Bytes a trained number: a micro-batch's gradient before it is added, and the weights in the compute dtype."""
        return 4 + (self.width if self.width < _WIDTH[self.policy.param_dtype] else 0)

    def _wide(self) -> tuple[float, float]:
        """Numbers a token in a layer's attention (q, k, v, output) and in its MLP (one of gate, up, their product)."""
        c, tensor = self.model, self.sizes["tensor"]
        heads = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        return heads / tensor, c.intermediate_size / tensor

    def _saved(self) -> float:
        (attention, mlp), width = self._wide(), self.model.hidden_size
        more = {"full": 0.0, "attention": width + attention, "none": 3 * width + attention + 2 * mlp}
        a_layer = width + more[self.policy.remat]
        return self.model.num_hidden_layers * self.local_tokens * a_layer * self.width

    def _layer_work(self) -> float:
        attention, mlp = self._wide()
        activations = self.width * (2 * attention + 6 * mlp + 4 * self.model.hidden_size) + 8 * self.model.hidden_size
        return self.local_tokens * activations + 3 * self._whole_layer() * self.width

    def _whole_layer(self) -> float:
        """Numbers of one layer's weights as a device computes with them: gathered, split over tensor only."""
        gathered = tuple(a for a in AXES if a != "tensor")
        layers = [s for p, s in self.all.items() if p.startswith("layers.")]
        return sum(self._local(s, gathered) for s in layers) / self.model.num_hidden_layers

    def _head_work(self) -> float:
        vocabulary = self.model.vocab_size / self.sizes["tensor"]
        logits = 3 * 4 * self.policy.logprob_chunk * vocabulary
        matrix = self.model.hidden_size * vocabulary * (self.width + (0 if self.frozen else 4))
        return logits + matrix + 3 * self.local_tokens * self.model.hidden_size * self.width

    def traffic(self) -> float:
        """Bytes that a micro-batch reads and writes in one device's HBM, activations between fused operations included."""
        attention, mlp = self._wide()
        passes = 3 + self.remat
        a_token = self.width * (8 * self.model.hidden_size + 2 * attention + 5 * mlp)
        layers = (
            self.model.num_hidden_layers * passes * (self.local_tokens * a_token + 2 * self._whole_layer() * self.width)
        )
        chosen = self.local_tokens * self.episodes.trained_share
        head = chosen * self.model.vocab_size / self.sizes["tensor"] * 4 * 4
        return layers + head + 2 * self._saved() + 16 * sum(map(self._local, self.trained.values()))

    # What has to be sent.

    def ideal_sent(self) -> dict[str, float]:
        """Bytes that one device must send for a micro-batch, by axes of the mesh.

        fsdp, and sequence with it: each weight gathered for the forward and for the backward pass, its gradient scattered,
        all in the compute dtype; of the embedding whatever is less, that or the rows that were looked up. data: the
        gradients' sum. sequence: heads for tokens around each attention. tensor: two sums of activations a layer forward
        and two backward, one more where the layer is computed again.
        """
        out = dict.fromkeys(AXES, 0.0)
        for path, spec in (self.frozen | self.trained).items():
            split = self._split(spec)
            over = [axis for axis in split if axis != "tensor"]
            group, whole = math.prod(self.sizes[a] for a in over), self._local(spec, tuple(over))
            passes = 3 if path in self.trained else 2
            sent = passes * whole * self.width * (group - 1) / group
            if path == "embedding" and not self.model.tie_word_embeddings:
                looked_up = 2 * self.local_tokens * self.model.hidden_size * self.width * (group - 1) / group
                sent = min(sent, looked_up)
            if over:
                out["+".join(over)] = out.get("+".join(over), 0.0) + sent
            if path in self.trained:
                for axis in ("data", "sequence"):
                    n = self.sizes[axis]
                    out[axis] += 0 if axis in split else 2 * (n - 1) / n * whole / group * self.width
        out["sequence"] += self._exchanged()
        n, layers = self.sizes["tensor"], self.model.num_hidden_layers
        residual = self.local_tokens * self.model.hidden_size * self.width
        out["tensor"] += 2 * (n - 1) / n * residual * (layers * (4 + self.remat) + 2)
        return out

    def _exchanged(self) -> float:
        """Queries, keys, values and what attention makes of them, from all heads of some tokens to some heads of all."""
        n, c = self.sizes["sequence"], self.model
        passes = 2 + self.attends_again
        return c.num_hidden_layers * passes * self.local_tokens * self._wide()[0] * self.width * (n - 1) / n

    # A whole training step.

    def step(self) -> Step:
        trainer, generator = self.config.trainer, self.config.generator
        count = trainer.train_batch_size * generator.n_samples_per_prompt
        rows = math.ceil(count / max(self.policy.row_tokens // self.episodes.tokens, 1))
        updates = trainer.train_batch_size // trainer.policy_mini_batch_size
        a_pass = math.ceil(rows / updates / self.policy.rows_per_micro_batch) * updates
        micro_batches = a_pass * trainer.update_epochs_per_batch
        flops, forward = self.flops(), 0.0
        if trainer.algorithm.needs_reference:
            forward += flops.six_n / 3
        applied = 7 * 4 * sum(map(self._local, self.trained.values()))
        steps = updates * trainer.update_epochs_per_batch
        return Step(
            episodes=count,
            tokens=float(count * self.episodes.tokens),
            micro_batches=micro_batches,
            optimizer_steps=steps,
            flops=flops.spent * micro_batches + forward * a_pass,
            bytes=self.traffic() * micro_batches + applied * steps,
        )
