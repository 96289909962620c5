"""Any mesh gives the optimizer step of one device, on 8 emulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sqlrl_jax import config as configuration
from sqlrl_jax.learner import Learner
from sqlrl_jax.mesh import make_mesh

UNIT = Path(__file__).parents[1] / "unit"
MESHES = ["data=2,fsdp=2,tensor=2", "fsdp=4,sequence=2"]


@pytest.mark.timeout(580)
def test_any_mesh_gives_the_step_of_one_device() -> None:
    """In a process of its own: the number of emulated devices is fixed before jax starts."""
    paths = [str(UNIT.parents[1]), str(UNIT), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", "import test_learner_meshes as m; m.compare_meshes()"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == len(MESHES)


def compare_meshes() -> None:
    """Run in a process of its own by the test above."""
    jax.config.update("jax_num_cpu_devices", 8)
    from test_learner import MODEL, advantages, episodes, fresh, leaves, settings

    config = settings("trainer.policy.rows_per_micro_batch=8")
    batch, values = episodes(), advantages(episodes())
    results = {}
    for text in ["fsdp=1", *MESHES]:
        sizes = {k: int(v) for k, v in (part.split("=") for part in text.split(","))}
        count = int(np.prod(list(sizes.values())))
        mesh = make_mesh(configuration.MeshConfig(**sizes), jax.devices()[:count])
        subject = Learner(config, mesh, MODEL, fresh(0))
        metrics = subject.update(batch, values)
        results[text] = leaves(subject.state.opt_state[0].mu), metrics["policy/loss"]
    want, loss = results.pop("fsdp=1")
    for text, (got, got_loss) in results.items():
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
        np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
        print(text, "agrees")
