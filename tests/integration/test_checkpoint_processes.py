"""Checkpoints and exports of several real processes: written by four, read by one, by two, and by two with damage."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sqlrl_jax import config as configuration
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import Reader, load_hf, save_hf
from sqlrl_jax.model.params import nest, param_specs, parameter_count

MODEL = ModelConfig("qwen2", 64, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True, attention_bias=True)
UNIT = Path(__file__).parents[1] / "unit"
MESHES = {"write": "fsdp=2,tensor=2", "one": "data=2,fsdp=2,tensor=2", "two": "fsdp=2"}
DEVICES = {"write": 1, "one": 8, "two": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder in which four processes have saved steps 1, 2 and 3 and exported; with the losses of what followed each."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    params = nest(
        {
            p: rng.normal(1.0 if s.stddev is None else 0.0, 0.1, s.shape).astype(np.float32)
            for p, s in param_specs(MODEL).items()
        }
    )
    save_hf(folder / "model", params, MODEL, tokenizer_source=folder / "tokenizer")
    return folder, start("write", 4, folder)[0]


def start(part: str, processes: int, folder: Path) -> list[dict[str, float]]:
    """Runs `part` below in so many processes. What each of them printed last."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = [str(UNIT.parents[1]), str(UNIT), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "test_checkpoint_processes", part, str(processes), str(i), str(port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outs = [process.communicate(timeout=550) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, outs, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outs]


@pytest.mark.timeout(580)
def test_one_process_with_eight_devices_goes_on(run: tuple[Path, dict[str, float]]) -> None:
    folder, losses = run
    (got,) = start("one", 1, folder)
    assert got.pop("step") == 3
    for name, value in got.items():
        np.testing.assert_allclose(value, losses[name], rtol=2e-7, atol=2e-7, err_msg=name)


@pytest.mark.timeout(580)
def test_two_processes_agree_on_the_checkpoint_before_the_damaged(run: tuple[Path, dict[str, float]]) -> None:
    folder, losses = run
    # Each of the four wrote files of its own: damage that only one of the two readers comes upon.
    victim = max((f for f in (folder / "checkpoints/2/params/ocdbt.process_3").rglob("*") if f.is_file()), key=size)
    victim.write_bytes(victim.read_bytes()[: size(victim) // 2])
    (folder / "checkpoints/3/record/metadata").unlink()
    for got in start("two", 2, folder):
        assert got["step"] == 1
        for name in ("loss 2", "value loss 2"):
            np.testing.assert_allclose(got[name], losses[name], rtol=2e-7, atol=2e-7)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"1", "damaged-2", "damaged-3", "model"}


def test_four_processes_export_what_one_does(run: tuple[Path, dict[str, float]]) -> None:
    folder, _ = run
    several, single = folder / "export", folder / "export-of-one"
    names = {p.name for p in several.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 4
    params = load_hf(several)
    save_hf(single, params, ModelConfig.from_dir(several), None, several, shard_bytes=10_000)
    assert {p.name for p in single.iterdir()} == names >= {"tokenizer.json", "config.json"}
    for name in names:
        assert (single / name).read_bytes() == (several / name).read_bytes(), name
    assert all(
        np.isfinite(v).all() for n in names if n.endswith(".safetensors") for v in load_file(several / n).values()
    )


def size(file: Path) -> int:
    return file.stat().st_size


def main(part: str, processes: int, index: int, port: int, folder: Path) -> dict[str, float]:
    """One process of `start`."""
    jax.config.update("jax_num_cpu_devices", DEVICES[part])
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=index)
    from test_learner import settings

    from sqlrl_jax.checkpoint import Checkpoints
    from sqlrl_jax.critic import Critic
    from sqlrl_jax.learner import Learner
    from sqlrl_jax.mesh import make_mesh

    config = settings(
        "trainer.policy.rows_per_micro_batch=4",
        "trainer.policy.remat=none",
        f"trainer.policy.model.path={folder / 'model'}",
    )
    sizes = {k: int(v) for k, v in (text.split("=") for text in MESHES[part].split(","))}
    mesh = make_mesh(configuration.MeshConfig(**sizes))
    model = ModelConfig.from_dir(folder / "model")
    read = count_reads()
    params = load_hf(folder / "model", model, mesh, piece_bytes=10_000)
    learner = Learner(config, mesh, model, params, critic=Critic(config, mesh, model, params))
    assert sum(read) <= 4 * parameter_count(model) * DEVICES[part] / mesh.size * 1.1  # small ones lie everywhere
    checkpoints = Checkpoints(folder / "checkpoints", 3)
    out: dict[str, float] = {}
    first = 0
    if part == "write":
        last = 5
    else:
        told: list[str] = []
        first = checkpoints.restore_latest(learner, told.append)
        assert len(told) == 3 - first
        out["step"], last = first, first + (2 if part == "one" else 1)
    for step in range(first, last):
        out |= {f"{name} {step + 1}": loss for name, loss in train(learner, step).items()}
        if part == "write" and step < 3:
            checkpoints.save(step + 1, learner, score=step / 10)
            checkpoints.wait()
        if part == "write" and step == 2:
            save_hf(folder / "export", learner.params, model, None, folder / "tokenizer", shard_bytes=10_000)
    checkpoints.close()
    return out


def count_reads() -> list[int]:
    """Grows by the bytes of every slice that is read."""
    sizes: list[int] = []
    whole = Reader.read

    def read(*args: Any, **kwargs: Any) -> np.ndarray:
        value = whole(*args, **kwargs)
        sizes.append(value.nbytes)
        return value

    Reader.read = read  # type: ignore[method-assign]
    return sizes


def train(learner, step: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """One step of policy and critic."""
    from test_learner import advantages, episodes

    batch = episodes(seed=step)
    values = learner.critic.values(batch)
    returns = [np.linspace(i % 3, i, len(part)) for i, part in enumerate(values)]
    value_loss = learner.critic.update(batch, values, returns)["critic/value_loss"]
    return {"loss": learner.update(batch, advantages(batch))["policy/loss"], "value loss": value_loss}


if __name__ == "__main__":
    part, processes, index, port, folder = sys.argv[1:]
    print(json.dumps(main(part, int(processes), int(index), int(port), Path(folder))))
