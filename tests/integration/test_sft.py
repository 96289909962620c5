"""The cold start on a few demonstrations: real episodes in, a Hugging Face folder out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rollout.chat import Chat, load_tokenizer
from rollout.errors import UserError
from rollout.types import Trajectory
from sqlrl_jax import config as configuration
from sqlrl_jax import config_file, sft
from sqlrl_jax.data.tasks import read_tasks
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import load_hf


def settings(folder: Path, *overrides: str) -> configuration.Config:
    return config_file.load(
        Path(__file__).parents[2] / "configs" / "coldstart.yaml",
        [
            f"sft.demonstrations={folder}/demo",
            f"environment.text2sql.database_root={folder}/demo/databases",
            f"sft.output={folder}/model",
            "sft.databases=12",
            "sft.heldout=16",
            "sft.epochs=15",
            "trainer.policy.optimizer_config.lr=0.01",
            "sft.model.hidden_size=32",
            "sft.model.num_hidden_layers=1",
            "sft.model.intermediate_size=64",
            "trainer.policy.optimizer_config.num_warmup_steps=2",
            "trainer.policy.rows_per_micro_batch=6",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("coldstart")
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.Display, "print", lambda self, what, style="": printed.append(str(what)))
        assert sft.main(settings(folder)) == 0
    return folder, "\n".join(printed)


def test_writes_a_model_that_learned(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    config = ModelConfig.from_dir(folder / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 1, 1024)
    assert load_hf(folder / "model", config)["embedding"].shape == (1024, 32)
    assert "playing 96 demonstrations" in printed
    nll = float(printed.partition("held out: nll ")[2].split()[0])
    assert nll < np.log(1024) - 1


def test_demonstrations_come_back_as_they_were_written(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    tasks = read_tasks(folder / "demo" / "demonstrations.jsonl")[:24]
    chat = Chat(load_tokenizer(folder / "model"))
    for task, episode in zip(tasks, sft.play(settings(folder), tasks, chat), strict=True):
        own = [i for i, m in zip(episode.response_ids, episode.loss_mask, strict=True) if m]
        assert chat.decode(own) == "".join(task.fields["actions"])
        assert [t.action for t in episode.turns] == task.fields["actions"]
        observed = [i for i, m in zip(episode.response_ids, episode.loss_mask, strict=True) if not m]
        assert chat.decode(observed).count("<observation>") == len(episode.turns) - 1
        for turn in episode.turns[:-1]:  # the last one's has nobody to read it
            assert turn.observation in chat.decode(observed)


def test_a_demonstration_that_cannot_be_played_is_named(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    tasks = read_tasks(folder / "demo" / "demonstrations.jsonl")[:24]
    chat = Chat(load_tokenizer(folder / "model"))
    with pytest.raises(UserError, match=r"demonstration demonstrations_0000\d-\d: 1 of its \d actions could be played"):
        sft.play(settings(folder, "generator.max_turns=1"), tasks, chat)


def test_an_existing_model_is_not_overwritten(trained: tuple[Path, str]) -> None:
    with pytest.raises(UserError, match=r"sft.output .*model exists already"):
        sft.main(settings(trained[0]))


def test_weights_of_a_sample() -> None:
    episode = Trajectory("t", "s", 0, [5, 6], [7, 8, 9], [1, 0, 1], [0.0] * 3, [], 1.0, "correct", "solution")
    sample = sft.sample_of(episode, 0.25)
    np.testing.assert_array_equal(sample.tokens, [5, 6, 7, 8, 9])
    np.testing.assert_allclose(sample.weights, [0.25, 0.25, 1, 0.25, 1])
    np.testing.assert_array_equal(sample.trained, [False, True, True, True, True])
    np.testing.assert_array_equal(sft.sample_of(episode, 0.0).trained, [False, False, True, False, True])
