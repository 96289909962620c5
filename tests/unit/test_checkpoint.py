"""Checkpoints: the same bits back, damage found, the one before used."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learner import MODEL, advantages, assert_same, episodes, learner, leaves

from sqlrl_jax.checkpoint import CheckpointError, Checkpoints
from sqlrl_jax.checkpoint_model import load_params
from sqlrl_jax.checkpoint_record import checksums
from sqlrl_jax.learner import Learner


def subject(tmp_path: Path, *overrides: str, seed: int = 0) -> Learner:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_text("{}")
    return learner(f"trainer.policy.model.path={model}", *overrides, seed=seed)


def train(learner: Learner, start: int, stop: int) -> list[dict[str, float]]:
    out = []
    for step in range(start, stop):
        batch = episodes(seed=step)
        metrics = learner.update(batch, advantages(batch))
        metrics.pop("policy/compiles")
        out.append(metrics)
    return out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    name = f"trainer.policy.optimizer_config.name={optimizer}"
    whole = subject(tmp_path, name)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    train(whole, 0, 2)
    checkpoints.save(2, whole)
    later = train(whole, 2, 4)  # overwrites the buffers while the save is under way
    checkpoints.wait()
    checkpoints.close()

    resumed = subject(tmp_path, name, seed=9)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.restore_latest(resumed, warn=pytest.fail) == 2
    assert train(resumed, 2, 4) == later
    assert_same(resumed.state, whole.state)
    checkpoints.close()


def two_saves(tmp_path: Path) -> tuple[Learner, list[np.ndarray]]:
    """Saves steps 1 and 2; returns the learner and its state at step 1."""
    first = subject(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    train(first, 0, 1)
    state = leaves(first.state)
    checkpoints.save(1, first)
    train(first, 1, 2)
    checkpoints.save(2, first)
    checkpoints.close()
    return first, state


def flip(folder: Path) -> None:
    """Changes one byte in the middle of the largest file."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])


def remove_record(folder: Path) -> None:
    next(folder.rglob("record/*")).unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove_record])
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    trained, state = two_saves(tmp_path)
    damage(tmp_path / "checkpoints" / "2")
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    assert checkpoints.restore_latest(trained, warn=told.append) == 1
    assert_same(trained.state, state)
    assert len(told) == 1
    assert "checkpoint 2 cannot be read" in told[0]
    assert "Going on from 1" in told[0]
    train(trained, 1, 2)
    checkpoints.save(2, trained)  # its place is free again
    checkpoints.wait()
    assert checkpoints.latest() == 2
    checkpoints.close()


def test_a_torn_save_does_not_count(tmp_path: Path) -> None:
    trained, _ = two_saves(tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "3.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(folder, 3)
    assert checkpoints.restore_latest(trained, warn=pytest.fail) == 1
    checkpoints.close()


def test_another_model_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    two_saves(tmp_path)
    other = subject(tmp_path, "trainer.policy.optimizer_config.name=muon")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    with pytest.raises(CheckpointError, match="none of the checkpoints fits this run"):
        checkpoints.restore_latest(other, warn=pytest.fail)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    checkpoints.close()


def test_no_checkpoint_is_step_zero(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    assert checkpoints.restore_latest(subject(tmp_path), warn=pytest.fail) == 0
    assert checkpoints.latest() is None
    checkpoints.close()


def test_load_params_from_run_folder_or_step(tmp_path: Path) -> None:
    trained, state = two_saves(tmp_path)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        params, config, tokenizer = load_params(path)
        assert config == MODEL
        assert (tokenizer / "tokenizer.json").read_text() == "{}"
        assert_same(params, trained.params)
    first = leaves(load_params(tmp_path / "checkpoints" / "1")[0])
    for a, b in zip(first, state, strict=False):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 7"):
        load_params(tmp_path / "checkpoints" / "7")
    with pytest.raises(CheckpointError, match="expected a run folder"):
        load_params(tmp_path / "nowhere")


def test_a_checksum_changes_with_any_bit_and_any_swap() -> None:
    base = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
    value = checksums({"a": base})
    words = np.array(jax.lax.bitcast_convert_type(base, jnp.uint32))
    for place in np.ndindex(base.shape):
        changed = words.copy()
        changed[place] ^= 1 << (sum(place) % 32)
        assert checksums({"a": jnp.asarray(changed.view(np.float32))}) != value
    assert checksums({"a": base[::-1]}) != value
    assert checksums({"a": base.astype(jnp.bfloat16)}) != value


def test_a_save_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    trained = subject(tmp_path)
    checkpoints = Checkpoints(tmp_path / "full", 2)
    checkpoints.save(1, trained)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "full")
    (tmp_path / "full").write_text("a file where the folder was")

    def save() -> None:
        checkpoints.save(2, trained)
        checkpoints.wait()

    with pytest.raises(CheckpointError, match=r"full: a checkpoint could not be written .*resume_mode=latest"):
        save()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = subject(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("sqlrl_jax.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs .* MB and the disk has 0 MB left.*resume_mode=latest"):
        checkpoints.save(1, trained)
    monkeypatch.undo()
    checkpoints.save(1, trained)
    checkpoints.wait()
    assert checkpoints.latest() == 1
