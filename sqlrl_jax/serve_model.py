"""`launch.py serve --model`: a trained model behind SGLang's own OpenAI-compatible server, for whoever only wants the model.

Nothing of training is in it: no bridge, no episodes, no pushes. A checkpoint is exported first, beside the run's other
exports; that needs the learner's environment, and the server SGLang's, so with `generator.inference_engine.python` this
program goes on in that one. Settings of `generator.inference_engine` apply; the model's own config.json names its type.

Left out: TLS, for which a reverse proxy is put in front.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rollout.channel import split_address
from rollout.engine.sglang_arguments import model_arguments
from rollout.engine.sglang_runtime import require_sglang
from rollout.engine.sglang_server import serve
from rollout.errors import UserError
from sqlrl_jax.config import Config
from sqlrl_jax.config_file import override
from sqlrl_jax.local_services import LAUNCH, interpreter
from sqlrl_jax.meeting import is_loopback
from sqlrl_jax.model.peft_config import CONFIG as ADAPTER


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line. `key_variable` names the environment variable of a key that requests must show;
    `settings` are what the configuration was made of, to say it once more to another interpreter."""

    model: str
    listen: str
    name: str
    key_variable: str
    settings: tuple[str, ...]


def main(config: Config, request: Request) -> int:
    """Serves until it is stopped. Raises UserError."""
    host, port = split_address(request.listen)
    key = _key(request, host)
    name = request.name or served_name(Path(request.model))
    folder = model_folder(Path(request.model))
    python = interpreter(config)
    if python != sys.executable:
        again = replace(request, model=str(folder), name=name)
        os.execv(python, [python, str(LAUNCH), *command(again)])
    config = override(config, [("trainer.policy.model.path", str(folder))])
    arguments = {**model_arguments(config), "host": host, "port": port, "served_model_name": name}
    require_sglang(arguments)
    return serve(arguments | ({"api_key": key} if key else {}))


def command(request: Request) -> list[str]:
    """The arguments of launch.py that ask for the same in SGLang's own environment."""
    key = ["--api-key-env", request.key_variable] if request.key_variable else []
    places = ["--model", request.model, "--listen", request.listen, "--served-model", request.name]
    return ["serve", *places, *key, *request.settings, "generator.inference_engine.python="]


def _key(request: Request, host: str) -> str:
    """The key that requests must show, "" for none. Raises UserError where anybody could ask without one."""
    key = os.environ.get(request.key_variable, "") if request.key_variable else ""
    if request.key_variable and not key:
        raise UserError(f"--api-key-env {request.key_variable}: there is no such variable in the environment")
    if not key and not is_loopback(host):
        raise UserError(
            f"--listen {request.listen}: other machines reach this address, and nobody would be asked for a key: put one "
            f"into an environment variable and name it with --api-key-env, or listen on 127.0.0.1"
        )
    return key


def model_folder(given: Path) -> Path:
    """The Hugging Face folder that `given` is, or a run's export/, or that of a checkpoint, made where it is not there yet.

    Raises UserError.
    """
    if (given / "config.json").is_file() and any(given.glob("*.safetensors")):
        return given
    if (given / ADAPTER).is_file():
        raise UserError(f"{given} holds adapters alone: give the run's export/, which has them merged into their model")
    if (given / "export" / "config.json").is_file():
        return given / "export"
    if not given.is_dir():
        raise UserError(f"--model {given}: there is no such folder")
    try:
        from sqlrl_jax.checkpoint_model import locate
        from sqlrl_jax.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise UserError(
            f"{given} is not a model folder, and this environment cannot export a checkpoint ({error}): export it where the "
            f"learner is installed, python launch.py export --checkpoint {given} --out DIR, and serve DIR"
        ) from None
    checkpoints, step = locate(given)
    out = checkpoints.parent / "exports" / f"step_{step}"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        print(f"exported {export_checkpoint(checkpoints / str(step), out)}", flush=True)
    return out


def served_name(given: Path) -> str:
    """The folder's name, or that of the run where the folder is only its export."""
    path = given.absolute()
    return path.parent.name if path.name in ("export", "checkpoints") else path.name
