"""A run of launch.py whose episodes the real SGLang plays, on a CPU, in an environment of its own: adapters are trained and
pushed, a service is killed while it generates, and every episode counts once.

Needs SQLRL_SGLANG_PYTHON, the Python of such an environment (bash tests/sglang_cpu/install.sh makes one).
"""

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_train import DEADLINE, QUESTIONS, ROOT, SAMPLES, start, train_lines

from rollout.stub import Stub

PYTHON = os.environ.get("SQLRL_SGLANG_PYTHON", "")
STEPS = 2
# What lets SGLang run without a GPU; the learner's process gets none of it.
WRAPPER = f"""#!/bin/sh
export SGLANG_USE_CPU_ENGINE=1 SGLANG_CPU_OMP_THREADS_BIND=0 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PYTHONPATH={shlex.quote(str(ROOT / "tests/sglang_cpu"))}
exec {shlex.quote(PYTHON)} "$@"
"""
ON_CPU = {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
ON_CPU |= {"lora_backend": "torch_native", "disable_cuda_graph": True, "mem_fraction_static": 0.5}
ON_CPU |= {"max_total_tokens": 16384}
SETTINGS = (
    "generator.backend=sglang",
    f"generator.inference_engine.engine_init_kwargs={json.dumps(ON_CPU)}",
    "bridge.start_timeout=400",
    f"trainer.max_steps={STEPS}",
    "trainer.ckpt_interval=0",
    "trainer.eval_before_train=false",
    "trainer.policy.optimizer_config.lr=0.003",
    "trainer.policy.model.lora.rank=4",
    "trainer.policy.model.lora.alpha=32",
)


def kill_while_it_generates(run: Path) -> None:
    """Kills the service in the second step, when tokens come from it."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, (run / "service.log").read_text()[-3000:]
            time.sleep(0.02)

    wait(lambda: train_lines(run))
    address = re.findall(r"rollout service listening on (\S+)", (run / "service.log").read_text())[-1]
    with Stub(address) as stub:
        before = stub.status().stats["generated_tokens"]
        wait(lambda: stub.status().stats["generated_tokens"] > before)
        os.kill(stub.status().pid, signal.SIGKILL)


@pytest.mark.sglang
@pytest.mark.skipif(not PYTHON, reason="needs SQLRL_SGLANG_PYTHON (see the file)")
@pytest.mark.timeout(900)
def test_a_run_on_sglang_trains_adapters_and_survives_its_death(tmp_path):
    python = tmp_path / "python"
    python.write_text(WRAPPER)
    python.chmod(0o755)
    run = tmp_path / "run"
    more = (f"generator.inference_engine.python={python}", f"data.train_data=[{tmp_path}/demo/train.jsonl]")
    process = start(run, tmp_path / "demo", *SETTINGS, *more)
    kill_while_it_generates(run)
    output, _ = process.communicate(timeout=2 * DEADLINE)
    assert process.returncode == 0, output
    assert "starting it again" in output

    steps = train_lines(run)
    assert [step["step"] for step in steps] == [1, 2]
    assert sum(step["policy/optimizer_steps"] for step in steps) > 0
    for step in steps:
        assert (
            step.get("policy/logprob_diff_max", 0.0) < 1e-4
        )  # SGLang computes with what was pushed, in its own process
        path = run / "trajectories" / f"train_{step['step']:06d}.jsonl"
        episodes = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({(e["task_id"], e["sample"]) for e in episodes}) == len(episodes) == QUESTIONS * SAMPLES
        assert {e["outcome"] for e in episodes}.isdisjoint({"infrastructure"})
        assert len({span[0] for e in episodes for span in e["spans"]}) == 1
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert (run / "service.log").read_text().count("rollout service listening on") == 2
