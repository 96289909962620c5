"""The launch files for clusters: their syntax, and that launch.py accepts the commands in them."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch
from sqlrl_jax import config_file

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "launch"
SCRIPTS = [FOLDER / "tpu_pod.sh", FOLDER / "slurm.sbatch"]
VALUES = {"$CONFIG": "configs/quickstart.yaml", '"$0"': "configs/quickstart.yaml", "$SHARED": "/mnt/shared"}
VALUES |= {"$SERVICES": "host:1", "${SERVICES%,}": "host:1,other:2", '"$(hostname):8700"': "host:8700"}


def commands(script: Path) -> list[list[str]]:
    text = re.sub(r"\\\n\s*", "", script.read_text())
    found = re.findall(r"python (launch\.py .*?)(?:$|\"$|' \"\$CONFIG\" &$| \|\| )", text, re.MULTILINE)
    for name, value in VALUES.items():
        found = [line.replace(name, value) for line in found]
    return [shlex.split(line)[1:] for line in found]


def jobs() -> dict[str, dict[str, Any]]:
    manifest = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    return {job["name"]: job["template"]["spec"] for job in manifest["spec"]["replicatedJobs"]}


def accepted(arguments: list[str]) -> Any:
    parsed = launch._parse(arguments)
    return parsed, config_file.load("configs/quickstart.yaml", parsed.settings)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(("script", "verbs"), [(SCRIPTS[0], ["train"]), (SCRIPTS[1], ["serve", "train"])])
def test_commands_in_scripts_are_accepted(script, verbs):
    parsed = [accepted(arguments) for arguments in commands(script)]
    assert [args.verb for args, _ in parsed] == verbs
    args, config = parsed[-1]
    assert args.coordinator == "auto"
    assert config.generator.services
    assert config.trainer.resume_mode == "latest"


def test_the_manifest_agrees_with_itself():
    learner, rollout = jobs()["learner"], jobs()["rollout"]
    container = learner["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["JAX_NUM_PROCESSES"] == str(learner["completions"]) == str(learner["parallelism"])
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith("sqlrl-learner-0-0.sqlrl:")
    _, config = accepted(container["command"][2:])
    expected = tuple(f"sqlrl-rollout-0-{i}.sqlrl:8700" for i in range(rollout["completions"]))
    assert config.generator.services == expected
    args, serving = accepted(rollout["template"]["spec"]["containers"][0]["command"][2:])
    assert args.verb == "serve"
    assert serving.bridge.trusted_network
