"""Checkpoints: the same bits back, damage found, the one before used, the best one kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learner import MODEL, advantages, assert_same, episodes, learner, leaves

from sqlrl_jax.checkpoint import CheckpointError, Checkpoints
from sqlrl_jax.checkpoint_model import load_params
from sqlrl_jax.checkpoint_record import best_of, checksums
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.export import export_checkpoint
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import in_host_memory, make_mesh, replicated
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import load_hf
from sqlrl_jax.model.params import nest, param_specs
from sqlrl_jax.step import State


def subject(tmp_path: Path, *overrides: str, seed: int = 0) -> Learner:
    return learner(f"trainer.policy.model.path={model_folder(tmp_path)}", *overrides, seed=seed)


def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    return folder


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

    other = subject(tmp_path, f"trainer.policy.optimizer_config.name={'muon' if optimizer == 'adamw' else 'adamw'}")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    with pytest.raises(CheckpointError, match="none of the checkpoints fits this run"):
        checkpoints.restore_latest(other, warn=pytest.fail)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    checkpoints.close()


@dataclass
class Toy:
    """A state without a learner: weights of MODEL, and as the optimizer the same once more."""

    state: State
    tokenizer_dir: Path
    model_config: ModelConfig = MODEL
    lora: LoraConfig = field(default_factory=LoraConfig)
    critic: None = None
    kl_coef: float = 0.0

    def abstract_state(self) -> State:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state)


def toy(tmp_path: Path, step: int, dtype: str = "float32") -> Toy:
    rng = np.random.default_rng(step)
    values = {path: jnp.asarray(rng.normal(size=s.shape), dtype) for path, s in param_specs(MODEL).items()}
    moments = {path: value + 1 for path, value in values.items()}
    return Toy(State(nest(values), nest(moments), jnp.int32(step), jnp.int32(0)), model_folder(tmp_path))


def save(tmp_path: Path, scores: dict[int, float | None], **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", **{"max_to_keep": 3, **options})
    for step, score in scores.items():
        checkpoints.save(step, toy(tmp_path, step), score)
    checkpoints.wait()
    return checkpoints


def flip(folder: Path) -> None:
    """Changes one byte in the middle of the largest file."""
    file = largest(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    largest(folder).write_bytes(largest(folder).read_bytes()[:100])


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def other_checksum(folder: Path) -> None:
    """What damage looks like that the files themselves do not betray."""
    file = folder / "record" / "metadata"
    record = json.loads(file.read_text())
    record["checksums"]["['params']['layers']['q']"] ^= 1
    file.write_text(json.dumps(record))


DAMAGES = {
    "flipped byte": flip,
    "truncated file": truncate,
    "missing file": lambda folder: largest(folder).unlink(),
    "missing item": lambda folder: shutil.rmtree(folder / "optimizer"),
    "missing record": lambda folder: (folder / "record" / "metadata").unlink(),
    "torn record": lambda folder: (folder / "record" / "metadata").write_text('{"step": 2'),
    "another value": other_checksum,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    save(tmp_path, {1: 0.5, 2: 0.6}).close()
    DAMAGES[damage](tmp_path / "checkpoints" / "2")
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    trained = toy(tmp_path, 9)
    assert checkpoints.restore_latest(trained, warn=told.append) == 1
    assert_same(trained.state, toy(tmp_path, 1).state)
    assert len(told) == 1
    assert "checkpoint 2 cannot be read" in told[0]
    assert "it is now damaged-2. Going on from 1" in told[0]
    assert checkpoints.best() == (1, 0.5)
    checkpoints.save(2, toy(tmp_path, 2))  # its place is free again
    checkpoints.wait()
    assert checkpoints.latest() == 2
    checkpoints.close()


def test_a_torn_save_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, {1: None, 2: None}).close()
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "3.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(folder, 3)
    assert checkpoints.restore_latest(toy(tmp_path, 9), warn=pytest.fail) == 1
    checkpoints.close()


def test_no_checkpoint_is_step_zero(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    assert checkpoints.restore_latest(toy(tmp_path, 9), warn=pytest.fail) == 0
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    checkpoints.close()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = save(tmp_path, {1: 0.5, 2: 0.75, 3: 0.6, 4: None, 5: 0.7}, max_to_keep=2)
    assert {p.name for p in folder.iterdir() if p.name.isdecimal()} == {"2", "4", "5"}
    assert checkpoints.best() == (2, 0.75)
    checkpoints.close()
    checkpoints = save(tmp_path, {6: 0.75}, max_to_keep=2)  # another process goes on; of equals the newest is the best
    assert {p.name for p in folder.iterdir() if p.name.isdecimal()} == {"5", "6"}
    assert checkpoints.best() == (6, 0.75)
    checkpoints.close()
    save(tmp_path, {7: 0.1, 8: 0.1}, max_to_keep=2, keep_best=False).close()
    assert {p.name for p in folder.iterdir() if p.name.isdecimal()} == {"7", "8"}
    assert best_of([7, 8], {7: float("nan"), 8: None}) is None


def test_weights_from_run_folder_step_or_best(tmp_path: Path) -> None:
    save(tmp_path, {1: 0.9, 2: 0.8}).close()
    (tmp_path / "checkpoints" / "damaged-7").mkdir()
    for path, step in (
        ("", 2),
        ("checkpoints", 2),
        ("checkpoints/2", 2),
        ("checkpoints/1", 1),
        ("checkpoints/best", 1),
    ):
        params, config, tokenizer = load_params(tmp_path / path)
        assert config == MODEL
        assert (tokenizer / "tokenizer.json").read_text() == "{}"
        assert_same(params, toy(tmp_path, step).state.params)
    export_checkpoint(tmp_path, tmp_path / "best", best=True)
    assert_same(load_hf(tmp_path / "best"), toy(tmp_path, 1).state.params)
    assert export_checkpoint(tmp_path, tmp_path / "half", "bfloat16").dtype == "bfloat16"
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 7"):
        load_params(tmp_path / "checkpoints" / "7")
    with pytest.raises(CheckpointError, match="expected a run folder"):
        load_params(tmp_path / "nowhere")
    flip(tmp_path / "checkpoints" / "1" / "params")
    with pytest.raises(CheckpointError, match="checkpoints/1 cannot be read"):
        export_checkpoint(tmp_path, tmp_path / "again", best=True)
    assert not (tmp_path / "again").exists()


def test_bfloat16_masters_come_back(tmp_path: Path) -> None:
    trained = toy(tmp_path, 1, "bfloat16")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(1, trained)
    checkpoints.close()
    params, _, _ = load_params(tmp_path)
    assert_same(params, trained.state.params)
    with pytest.raises(CheckpointError, match="was evaluated"):
        load_params(tmp_path / "checkpoints" / "best")


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


def test_what_lies_in_the_hosts_memory_is_saved_and_checked_too(tmp_path: Path) -> None:
    everywhere = replicated(make_mesh(MeshConfig(), jax.devices()[:1]))
    far = jax.device_put(jnp.arange(12.0), in_host_memory([everywhere])[0])
    assert checksums([far]) == checksums([jnp.arange(12.0)])
    trained = toy(tmp_path, 1)
    trained.state = trained.state._replace(opt_state={"far": far})
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(1, trained)
    assert checkpoints.restore_latest(trained, warn=pytest.fail) == 1
    assert trained.state.opt_state["far"].sharding == far.sharding
    assert_same(trained.state.opt_state, {"far": far})
    checkpoints.close()


def test_a_save_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, {1: None})
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    with pytest.raises(CheckpointError, match=r"a checkpoint could not be written .*resume_mode=latest"):
        checkpoints.save(2, toy(tmp_path, 2))


FULL = """
import resource, sys
from pathlib import Path
import test_checkpoint as t
folder = Path(sys.argv[1])
checkpoints = t.save(folder, {1: None})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # no file may grow further
try:
    checkpoints.save(2, t.toy(folder, 2))
    checkpoints.wait()
except t.CheckpointError as error:
    print(error)
"""


def test_a_disk_that_fills_while_writing_is_told_once_and_by_us(tmp_path: Path) -> None:
    """In a process of its own: what Orbax's threads print goes past pytest."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "a checkpoint could not be written" in line
    assert line.endswith("Make room or mend the folder, then go on with trainer.resume_mode=latest")
    assert Checkpoints(tmp_path / "checkpoints", 3).restore_latest(toy(tmp_path, 9), warn=pytest.fail) == 1


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = toy(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("sqlrl_jax.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs .* MB and the disk has 0 MB left.*resume_mode=latest"):
        checkpoints.save(1, trained)
    monkeypatch.undo()
    checkpoints.save(1, trained)
    checkpoints.wait()
    assert checkpoints.latest() == 1


def test_leaves_are_copied_before_they_change(tmp_path: Path) -> None:
    """The writer must not see what the next step does to the same buffers."""
    trained = toy(tmp_path, 1)
    before = leaves(trained.state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(1, trained)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0, tree), donate_argnums=0)
    trained.state = overwrite(trained.state)
    assert checkpoints.restore_latest(trained, warn=pytest.fail) == 1
    assert_same(trained.state, before)
    checkpoints.close()
