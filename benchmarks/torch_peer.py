"""The same update in eager PyTorch: what benchmarks/update.py compares with.

A plain Qwen2-type decoder over a dictionary of Hugging Face tensors, PPO's clipped loss, gradient clipping and fused AdamW,
in float32. Two layouts. "padded" is TRL's: sequences in the order they come, padded to the longest of the batch, the head
on every completion column. By length is the best of eager PyTorch that we could write: sequences sorted, each micro-batch
padded to its own longest, the head on trained tokens only. Both pad on the right, so causal attention needs no mask
(cheaper than transformers' and TRL's own; transformers_peer.py is that model itself). `mixed` is what suits a GPU: bfloat16
autocast, and layers recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sqlrl_jax.data.packing import Sample
from sqlrl_jax.model.config import ModelConfig


class TorchUpdate:
    """Parameters, optimizer and one update over samples in micro-batches of `size` sequences."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        config: ModelConfig,
        *,
        size: int,
        by_length: bool,
        device: str = "cpu",
        mixed: bool = False,
    ) -> None:
        self.config, self.size, self.by_length, self.device, self.mixed = config, size, by_length, device, mixed
        self.weights = {n: torch.nn.Parameter(torch.from_numpy(np.array(t)).to(device)) for n, t in tensors.items()}
        matrices = [p for p in self.weights.values() if p.ndim == 2]
        vectors = [p for p in self.weights.values() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.frequencies = (config.rope_theta**-half).to(device)

    def update(self, samples: Sequence[Sample]) -> tuple[float, float]:
        """One optimizer step on all samples. Returns the mean loss over trained tokens and the gradient norm."""
        order = list(range(len(samples)))
        if self.by_length:
            order.sort(key=lambda i: -len(samples[i].tokens))
        longest = None if self.by_length else max(len(s.tokens) for s in samples)
        count = sum(int(s.trained.sum()) for s in samples)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(order), self.size):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.mixed):
                loss = self._loss([samples[i] for i in order[start : start + self.size]], longest) / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        return total, float(norm)

    def _loss(self, samples: Sequence[Sample], longest: int | None) -> torch.Tensor:
        width = longest or max(len(s.tokens) for s in samples)

        def padded(name: str, dtype: torch.dtype) -> torch.Tensor:
            rows = [np.pad(getattr(s, name), (0, width - len(s.tokens))) for s in samples]
            return torch.from_numpy(np.stack(rows)).to(self.device, dtype)

        tokens, trained = padded("tokens", torch.long), padded("trained", torch.bool)[:, 1:]
        lengths = torch.tensor([len(s.tokens) for s in samples], device=self.device)
        new = self._logprobs(tokens, lengths, trained)
        old, advantage = (padded(n, torch.float32)[:, 1:][trained] for n in ("rollout_logprobs", "advantages"))
        ratio = torch.exp(torch.clamp(new - old, -20, 20))
        return torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.2)).sum()

    def _logprobs(self, tokens: torch.Tensor, lengths: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        """Of the trained tokens, which are those of tokens[:, 1:] that `trained` marks, in one row."""
        hidden, targets, head = self._hidden(tokens)[:, :-1], tokens[:, 1:], self.weights["model.embed_tokens.weight"].T
        if self.by_length:
            return logprobs_of(hidden[trained] @ head, targets[trained])
        first = first_column(trained)
        return logprobs_of(hidden[:, first:] @ head, targets[:, first:])[trained[:, first:]]

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        c, w = self.config, self.weights
        angles = torch.arange(tokens.shape[1], device=self.device)[:, None] * self.frequencies
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.rms_norm(x, (c.hidden_size,), w[name].to(x.dtype), c.rms_norm_eps)

        def heads(x: torch.Tensor, name: str, count: int, rotate: bool) -> torch.Tensor:
            out = F.linear(x, w[name + ".weight"], w[name + ".bias"]).unflatten(-1, (count, c.head_dim)).transpose(1, 2)
            if not rotate:
                return out
            first, second = out.chunk(2, -1)
            return out * cos.to(out.dtype) + torch.cat([-second, first], -1) * sin.to(out.dtype)

        def block(x: torch.Tensor, i: int) -> torch.Tensor:
            p = f"model.layers.{i}."
            y = norm(x, p + "input_layernorm.weight")
            q = heads(y, p + "self_attn.q_proj", c.num_attention_heads, True)
            k = heads(y, p + "self_attn.k_proj", c.num_key_value_heads, True)
            v = heads(y, p + "self_attn.v_proj", c.num_key_value_heads, False)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).flatten(2), w[p + "self_attn.o_proj.weight"])
            y = norm(x, p + "post_attention_layernorm.weight")
            gated = F.silu(F.linear(y, w[p + "mlp.gate_proj.weight"])) * F.linear(y, w[p + "mlp.up_proj.weight"])
            return x + F.linear(gated, w[p + "mlp.down_proj.weight"])

        x = F.embedding(tokens, w["model.embed_tokens.weight"])
        if self.mixed:
            x = x.to(torch.bfloat16)
        for i in range(c.num_hidden_layers):
            x = checkpoint(block, x, i, use_reentrant=False) if self.mixed else block(x, i)
        return norm(x, "model.norm.weight")


def first_column(trained: torch.Tensor) -> int:
    """Where the completions begin."""
    return int(trained.any(0).nonzero()[0])


def logprobs_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[..., vocabulary] and [...] to [...], without a second array of the logits' size."""
    return torch.gather(logits, -1, targets[..., None])[..., 0] - torch.logsumexp(logits, -1)
