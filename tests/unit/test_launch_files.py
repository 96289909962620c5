"""The launch files for clusters: their syntax, and that launch.py accepts the commands in them."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch
from rollout.security import TOKEN_VARIABLE, Security
from sqlrl_jax import config_file

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "launch"
SCRIPTS = [FOLDER / "tpu_pod.sh", FOLDER / "slurm.sbatch"]
VALUES = {"$CONFIG": "configs/quickstart.yaml", '"$0"': "configs/quickstart.yaml", "$SHARED": "/mnt/shared"}
VALUES |= {"$SERVICES": "host:1", "${SERVICES%,}": "host:1,other:2", '"$(hostname):8700"': "host:8700"}
VALUES |= {"$BRIDGE": "bridge.tls_ca=gpu.pem bridge.token_file=token"}
VALUES |= {'"$SECRETS': '"secrets', '"$1/': '"secrets/'}


def commands(script: Path) -> list[list[str]]:
    text = re.sub(r"\\\n\s*", "", script.read_text())
    found = re.findall(r"python (launch\.py .*?)(?:$|\"$|' \"\$CONFIG\" .*&$| \|\| )", text, re.MULTILINE)
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


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_the_learners_manifest_agrees_with_itself():
    learner = jobs()["learner"]
    container = learner["template"]["spec"]["containers"][0]
    variables = environment(container)
    assert variables["JAX_NUM_PROCESSES"] == str(learner["completions"]) == str(learner["parallelism"])
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith("sqlrl-learner-0-0.sqlrl:")
    accepted(container["command"][2:])


def test_the_learners_find_the_services_and_trust_them():
    learner = jobs()["learner"]["template"]["spec"]
    service, deployment = documents("rollout.yaml")
    pod = deployment["spec"]["template"]
    _, training = accepted(learner["containers"][0]["command"][2:])
    args, serving = accepted(pod["spec"]["containers"][0]["command"][2:])
    assert args.verb == "serve"
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert training.generator.services == (f"dns:///{name}:{port}",)
    assert serving.bridge.listen == f"0.0.0.0:{port}"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > serving.bridge.drain_timeout
    token = environment(pod["spec"]["containers"][0])[TOKEN_VARIABLE]
    assert token == environment(learner["containers"][0])[TOKEN_VARIABLE]
    protected = Security(b"certificate", b"key", token="from the secret")
    assert (serving.bridge.tls_cert, serving.bridge.tls_key) == ("/secrets/tls.crt", "/secrets/tls.key")
    protected.require_allowed(serving.bridge.listen)
    assert training.bridge.tls_ca == "/secrets/ca.crt"


def test_on_slurm_the_services_are_protected():
    (_, serving), (_, training) = (accepted(arguments) for arguments in commands(SCRIPTS[1]))
    assert (serving.bridge.tls_cert, serving.bridge.tls_key) == ("secrets/cert.pem", "secrets/key.pem")
    assert training.bridge.tls_ca == serving.bridge.tls_cert, "the certificate is its own authority"
    assert training.bridge.token_file == serving.bridge.token_file == "secrets/token"
