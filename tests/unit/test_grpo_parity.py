"""One GRPO update of the learner against torch autograd and AdamW on transformers' own models, parameter by parameter.

The learner does what it does in a run: advantages from rewards, packed rows, several micro-batches, the chunked head, PPO's
clip, mean over the minibatch's tokens, clipped gradient, AdamW. PyTorch takes one episode after the other, unpadded, with
whole logits.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_models import MODELS, write_random  # noqa: E402 (needs torch)
from transformers import AutoModelForCausalLM  # noqa: E402

from rollout.types import Trajectory  # noqa: E402
from sqlrl_jax.config_file import load  # noqa: E402
from sqlrl_jax.learner import Learner  # noqa: E402
from sqlrl_jax.mesh import make_mesh  # noqa: E402
from sqlrl_jax.model.config import ModelConfig  # noqa: E402
from sqlrl_jax.model.hf import load_hf, to_hf_tensors  # noqa: E402
from sqlrl_jax.rl.advantages import Rewards, load_estimator  # noqa: E402

TEMPERATURE, LOW, HIGH, RATE, DECAY, BOUND = 0.7, 0.2, 0.28, 1e-3, 0.1, 0.5
CONFIG = load(
    None,
    [
        "generator.max_input_length=48",
        "generator.sampling_params.max_generate_length=8",
        f"generator.sampling_params.temperature={TEMPERATURE}",
        "trainer.policy.row_tokens=96",
        "trainer.policy.rows_per_micro_batch=2",
        "trainer.policy.logprob_chunk=16",
        f"trainer.policy.optimizer_config.lr={RATE}",
        f"trainer.policy.optimizer_config.weight_decay={DECAY}",
        f"trainer.policy.optimizer_config.max_grad_norm={BOUND}",
        f"trainer.algorithm.eps_clip_low={LOW}",
        f"trainer.algorithm.eps_clip_high={HIGH}",
        "trainer.algorithm.zero_variance_filter=true",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4",
    ],
)
QUESTIONS, SAMPLES = 4, 4


def make_episodes() -> list[Trajectory]:
    """Prompts, turns, and observations between them which are not trained."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(QUESTIONS * SAMPLES):
        prompt, length = rng.integers(0, 101, rng.integers(2, 12)).tolist(), int(rng.integers(4, 40))
        mask = [int(place % 9 < 6) for place in range(length)]
        response = rng.integers(0, 101, length).tolist()
        name = f"question {i // SAMPLES}"
        out.append(
            Trajectory(name, "s", i % SAMPLES, prompt, response, mask, [0.0] * length, [], 0.0, "wrong", "solution")
        )
    return out


def make_rewards() -> np.ndarray:
    """Of the last question all episodes earn the same, so it teaches nothing and counts nowhere."""
    rewards = np.random.default_rng(1).integers(0, 2, QUESTIONS * SAMPLES).astype(float)
    rewards[: 3 * SAMPLES : SAMPLES], rewards[1 : 3 * SAMPLES : SAMPLES] = 0.0, 1.0
    rewards[3 * SAMPLES :] = 1.0
    return rewards


class Peer:
    """The same update in PyTorch."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim == 2]
        vectors = [p for p in self.parameters.values() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)

    def logprobs(self, episode: Trajectory) -> torch.Tensor:
        """Of the sampled tokens."""
        ids = torch.tensor([episode.prompt_ids + episode.response_ids])
        logits = self.model(ids).logits[0, len(episode.prompt_ids) - 1 : -1]
        table = torch.log_softmax(logits / TEMPERATURE, -1)
        return table.gather(-1, torch.tensor(episode.response_ids)[:, None])[:, 0][np.flatnonzero(episode.loss_mask)]

    def step(self, episodes: list[Trajectory], rewards: np.ndarray) -> dict[str, float]:
        """Gradients stay in the parameters, as AdamW saw them."""
        grouped = rewards.reshape(QUESTIONS, SAMPLES)
        centred = grouped - grouped.mean(1, keepdims=True)
        advantages = (centred / (grouped.std(1, ddof=1, keepdims=True) + 1e-6)).ravel()
        kept = [(e, a) for e, a, g in zip(episodes, advantages, np.repeat(grouped.std(1), SAMPLES), strict=True) if g]
        count = sum(sum(e.loss_mask) for e, _ in kept)
        self.optimizer.zero_grad()
        loss, clipped = 0.0, 0
        for episode, advantage in kept:
            old = torch.tensor(episode.logprobs)[np.flatnonzero(episode.loss_mask)]
            ratio = torch.exp(self.logprobs(episode) - old)
            plain, bounded = -advantage * ratio, -advantage * torch.clamp(ratio, 1 - LOW, 1 + HIGH)
            part = torch.maximum(plain, bounded).sum() / count
            part.backward()
            loss, clipped = loss + part.item(), clipped + int((bounded > plain).sum())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), BOUND)
        self.optimizer.step()
        return {"loss": loss, "clip_frac": clipped / count, "grad_norm": float(norm)}

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: p.grad.numpy() for name, p in self.parameters.items()}

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy().copy() for name, p in self.parameters.items()}


def drawn_by(peer: Peer, episodes: list[Trajectory]) -> list[Trajectory]:
    """With the log-probabilities of a rollout whose policy was another: some ratios end beyond either bound."""
    rng, out = np.random.default_rng(2), []
    for episode in episodes:
        logprobs = np.zeros(len(episode.response_ids), np.float32)
        places = np.flatnonzero(episode.loss_mask)
        with torch.no_grad():
            logprobs[places] = peer.logprobs(episode).numpy() + rng.uniform(-0.4, 0.4, len(places))
        out.append(dataclasses.replace(episode, logprobs=logprobs.tolist()))
    return out


def furthest(got: dict[str, Any], want: dict[str, np.ndarray]) -> float:
    """The largest |got - want| / |want| (Euclidean) over tensors; the names must be the same."""
    assert got.keys() == want.keys()
    return max(float(np.linalg.norm(got[n] - want[n]) / np.linalg.norm(want[n])) for n in want)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "llama3-tied"])
def test_two_updates_equal_those_of_torch(name: str, tmp_path: Path) -> None:
    folder = write_random(MODELS[name], tmp_path)
    model_config, peer = ModelConfig.from_dir(folder), Peer(folder)
    learner = Learner(CONFIG, make_mesh(CONFIG.trainer.mesh), model_config, load_hf(folder, model_config))
    episodes, rewards = drawn_by(peer, make_episodes()), make_rewards()
    algorithm = CONFIG.trainer.algorithm
    batch = Rewards(rewards, [e.task_id for e in episodes], np.array([sum(e.loss_mask) for e in episodes]))
    advantages = load_estimator(algorithm.advantage_estimator)(batch, algorithm)
    to_theirs = jax.jit(lambda tree: to_hf_tensors(tree, model_config, "float32"))
    before = peer.weights()

    metrics, want = learner.update(episodes, advantages), peer.step(episodes, rewards)
    for key, value in want.items():
        assert metrics[f"policy/{key}"] == pytest.approx(value, rel=1e-4)
    assert 0.1 < want["clip_frac"] < 0.5
    assert want["grad_norm"] > BOUND
    after_one = jax.tree.map(lambda moment: moment / (1 - 0.9), learner.state.opt_state[0].mu)
    gradients = peer.gradients()
    difference = furthest(to_theirs(after_one), gradients)
    print(f"{name}: largest relative difference of a tensor's gradient {difference:.1e}")
    assert difference <= 1e-4

    # Adam divides a gradient by its own size, so where that is rounding (a key's bias under slow RoPE) its step is noise.
    real = {n: np.abs(g) > 1e-3 * np.abs(g).max() for n, g in gradients.items()}
    assert np.mean(np.concatenate([part.ravel() for part in real.values()])) > 0.8
    for step in (1, 2):
        weights, theirs = to_theirs(learner.state.params), peer.weights()
        moved = {n: np.where(real[n], theirs[n] - before[n], 0.0) for n in theirs}
        difference = furthest({n: np.where(real[n], weights[n] - before[n], 0.0) for n in theirs}, moved)
        print(f"{name}: largest relative difference of a tensor's change after step {step} {difference:.1e}")
        assert difference <= 2e-4  # float32 holds a weight to 5e-5 of a step
        learner.update(episodes, advantages)
        peer.step(episodes, rewards)
