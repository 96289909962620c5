"""`launch.py check`: what a configuration costs and whether it fits, without weights and without an accelerator.

By arithmetic alone (cost.py) for every known slice; with --topology the step itself is compiled for that slice (aot.py),
and its memory and what it sends are read from the compiled program. Nothing runs on a device. Exit status: 0 fits, 1 does
not, 2 a mistake of the user's.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.errors import UserError
from sqlrl_jax.config import Config, ConfigError
from sqlrl_jax.cost import Cost, Episodes
from sqlrl_jax.data.packing import check_rows
from sqlrl_jax.mesh import mesh_sizes
from sqlrl_jax.model.config import ModelConfig, ModelConfigError
from sqlrl_jax.suggest import Change, estimate, suggest
from sqlrl_jax.topology import Slice, devices, find, slices

if TYPE_CHECKING:
    from sqlrl_jax.aot import Compiled

PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Request:
    """What was asked on the command line. Without `episode_tokens` episodes are as long as the configuration allows."""

    topology: str | None = None
    model_config: str | None = None
    episode_tokens: int | None = None
    trained_share: float = 0.25
    json: bool = False


@dataclass(frozen=True)
class Sending:
    """What one device sends for a micro-batch, by the mesh's axes."""

    measured: dict[str, float]
    ideal: dict[str, float]

    @property
    def ratio(self) -> float:
        ideal = sum(self.ideal.values())
        return sum(self.measured.values()) / ideal if ideal else 1.0


@dataclass(frozen=True)
class Proof:
    """What the compiler said of the step on a slice."""

    programs: list[Compiled]
    sending: Sending | None
    flops: float
    """Of one device for a micro-batch, outside attention kernels."""
    attention_kernels: float
    open_loops: float

    @property
    def needs(self) -> float:
        return max(p.needs for p in self.programs)

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.programs)


@dataclass(frozen=True)
class Findings:
    """All that is reported."""

    config: Config
    cost: Cost
    model_name: str
    where: Slice | None
    proof: Proof | None
    table: list[tuple[Slice, float]]
    """Known slices that the configured mesh fits, with the estimated bytes on a device."""
    suggestions: list[Change]

    @property
    def needs(self) -> float:
        return self.proof.needs if self.proof else self.cost.memory().total

    @property
    def fits(self) -> bool:
        if self.where is not None:
            return self.needs <= self.where.generation.hbm
        return any(needs <= s.generation.hbm for s, needs in self.table)


def main(config: Config, request: Request) -> int:
    """Prints the findings; returns the exit status."""
    from sqlrl_jax.check_report import as_json, show

    findings = check(config, request)
    if request.json:
        print(json.dumps(as_json(findings), indent=2))
    else:
        show(findings)
    return 0 if findings.fits else 1


def check(config: Config, request: Request) -> Findings:
    """Everything that can be said. Raises UserError for settings that do not go together."""
    name, model = find_model(config, request.model_config)
    longest = config.trainer.policy.row_tokens
    episodes = Episodes(min(request.episode_tokens or longest, longest), request.trained_share)
    if request.topology is None:
        where, count = None, max(_fixed(config), 1)
    else:
        where = find(request.topology)
        count = where.devices
    cost = Cost(config, model, mesh_sizes(config.trainer.mesh, count), episodes)
    _refuse_uneven(cost)
    if where is None:
        return Findings(config, cost, name, None, None, _where_it_fits(config, model, episodes), [])
    proof = prove(cost, where)
    scale = proof.needs / cost.memory().total if math.isfinite(proof.needs) else 1.0
    fits = proof.needs <= where.generation.hbm
    return Findings(
        config, cost, name, where, proof, [], [] if fits else suggest(config, model, where, episodes, scale)
    )


def _fixed(config: Config) -> int:
    """Devices that the mesh names; an open axis counts as one."""
    mesh = config.trainer.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor)
    out = 1
    for size in sizes:
        out *= max(size, 1)
    return out


def _refuse_uneven(cost: Cost) -> None:
    rows, policy = cost.policy.rows_per_micro_batch, cost.policy
    if rows % cost.shards:
        raise ConfigError(
            f"trainer.policy.rows_per_micro_batch {rows} must be a multiple of the {cost.shards} parts the mesh splits a "
            f"batch into (data x fsdp): give rows_per_micro_batch={-(-rows // cost.shards) * cost.shards}"
        )
    check_rows(policy.row_tokens, rows, cost.shards, policy.buckets, cost.sizes["sequence"])


def find_model(config: Config, asked: str | None) -> tuple[str, ModelConfig]:
    """The model's name and sizes: of a published model or a config.json that was asked for, of the configured checkpoint,
    or of the published model that the checkpoint's folder is named after."""
    names = {file.stem: file for file in sorted(PUBLISHED.glob("*.json"))}
    if asked is None:
        advice = f"; name the model's sizes with --model-config FILE, or one of {', '.join(names)}"
        file = _sizes_of("trainer.policy.model.path", config.trainer.policy.model.path, advice)
    else:
        file = names.get(_plain(asked), Path(asked))
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"--model-config {asked}: expected a config.json or one of {', '.join(names)}")
    return (file.stem if file.parent == PUBLISHED else str(file)), _read_model(file)


def find_critic(config: Config) -> ModelConfig | None:
    """The sizes of gae's critic where trainer.critic.model.path names a model; otherwise it has the policy's."""
    path = config.trainer.critic.model.path
    if not path or not config.trainer.algorithm.needs_critic:
        return None
    return _read_model(_sizes_of("trainer.critic.model.path", path))


def _sizes_of(key: str, path: str, advice: str = "") -> Path:
    """The config.json of a checkpoint's folder, or the published one of its name."""
    file, published = Path(path) / "config.json", PUBLISHED / f"{_plain(Path(path).name)}.json"
    if not file.is_file() and not published.is_file():
        raise UserError(f"{key} {path} holds no config.json{advice}")
    return file if file.is_file() else published


def _plain(name: str) -> str:
    return name.lower().removesuffix("-instruct")


def _read_model(file: Path) -> ModelConfig:
    try:
        return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a model's config.json: {error}") from error
    except ModelConfigError as error:
        raise UserError(f"{file}: {error}") from error


def _where_it_fits(config: Config, model: ModelConfig, episodes: Episodes) -> list[tuple[Slice, float]]:
    """Known slices the mesh can be laid over, rows given to each device where the file gives fewer than there are parts."""
    out = []
    for where in slices():
        try:
            sizes = mesh_sizes(config.trainer.mesh, where.devices)
        except ConfigError:
            continue
        shards = sizes["data"] * sizes["fsdp"]
        rows = -(-config.trainer.policy.rows_per_micro_batch // shards) * shards
        needs = estimate(config, model, where, episodes, (("trainer.policy.rows_per_micro_batch", rows),))
        if needs is not None:
            out.append((where, needs))
    return out


def prove(cost: Cost, where: Slice) -> Proof:
    """Compiles the step for a slice and reads the program. A step refused for memory is not applied."""
    found = devices(where.name)
    from sqlrl_jax import aot, hlo
    from sqlrl_jax.mesh import make_mesh

    mesh = make_mesh(cost.config.trainer.mesh, found)
    programs = []
    for compiled in aot.compile_step(cost.config, cost.model, mesh, find_critic(cost.config)):
        programs.append(compiled)
        if compiled.refused:
            return Proof(programs, None, 0.0, 0.0, 0.0)
    chosen = cost.local_tokens * cost.sizes["sequence"] * cost.episodes.trained_share
    summary = hlo.summarize(programs[0].text, mesh.size, open_trips=-(-chosen // cost.policy.logprob_chunk))
    sending = Sending(aot.sent_by_axis(summary, cost.sizes), cost.ideal_sent())
    kernels = summary.kernels.get(aot.ATTENTION_KERNEL, 0.0)
    slim = [replace(p, text="") for p in programs]
    return Proof(slim, sending, summary.flops, kernels, float(len(summary.open_loops)))


def proof_as_dict(proof: Proof) -> dict[str, Any]:
    """For --json."""
    programs = [
        {k: v for k, v in asdict(p).items() if k not in ("text", "own")}
        | {"own": _finite(p.own), "needs": _finite(p.needs)}
        for p in proof.programs
    ]
    sending = None
    if proof.sending is not None:
        sending = asdict(proof.sending) | {"ratio": proof.sending.ratio}
    return {
        "needs_bytes_per_device": _finite(proof.needs),
        "programs": programs,
        "sent_bytes_per_micro_batch": sending,
        "flops_per_device_per_micro_batch": proof.flops,
        "attention_kernels": proof.attention_kernels,
        "compile_seconds": proof.seconds,
    }


def _finite(count: float) -> float | None:
    """JSON has no word for what the compiler did not say."""
    return count if math.isfinite(count) else None
