"""What a run is about to do, in a dozen lines. A pure function of figures."""

from __future__ import annotations

from sqlrl_jax.config import Config
from sqlrl_jax.config_algorithm import CORRECTED_BY_THEMSELVES
from sqlrl_jax.config_lora import describe


def plan_rows(
    config: Config,
    *,
    parameters: int,
    trained: int,
    devices: str,
    mesh: dict[str, int],
    questions: tuple[int, int],
    steps: tuple[int, int],
    run_dir: str,
) -> list[tuple[str, str]]:
    """Name and value of each line. `trained` counts the numbers that change, which are the model's `parameters` or adapters
    beside them; `questions` is (training, held-out), `steps` is (done, total)."""
    trainer, generator, policy = config.trainer, config.generator, config.trainer.policy
    used = " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"
    width = {"float32": 4, "bfloat16": 2}
    shards = max(1, mesh["fsdp"] * mesh["tensor"])
    state = trained * (2 * width[policy.param_dtype] + 2 * 4) / shards  # weights, gradients and two moments
    adapters, kept = [], policy.param_dtype
    if policy.model.lora.rank:
        kept = policy.compute_dtype
        state += parameters * width[kept] / shards
        what = f"{describe(policy.model.lora)}: {trained / 1e6:,.2f}M numbers, {policy.param_dtype}"
        adapters = [("training", f"{what}; the model itself stays as it is")]
    if trainer.algorithm.needs_critic:  # which computes no gradients while the policy does
        state += parameters * (width[policy.param_dtype] + 2 * 4) / shards
        optimizer = trainer.critic.optimizer_config
        path = trainer.critic.model.path or policy.model.path
        adapters.append(("critic", f"layers of {path}, {optimizer.name} at {optimizer.lr:g}"))
    services = ", ".join(generator.services) or "one for each process, started here"
    sampling = generator.sampling_params
    return [
        ("model", f"{policy.model.path}, {parameters / 1e6:,.2f}M parameters, {kept}"),
        *adapters,
        ("devices", f"{devices}; mesh: {used}"),
        ("memory", f"{state / 2**20:,.0f} MiB a device for weights, gradients and optimizer state"),
        ("rollouts", f"{generator.backend} engine, services: {services}"),
        *([("asynchrony", asynchrony(config))] if trainer.max_staleness else []),
        ("questions", f"{questions[0]:,} for training, {questions[1]:,} held out"),
        (
            "batch",
            f"{trainer.train_batch_size} questions x {generator.n_samples_per_prompt} episodes of up to "
            f"{generator.max_turns} turns, temperature {sampling.temperature:g}",
        ),
        (
            "update",
            f"{trainer.algorithm.policy_loss_type}, {policy.optimizer_config.name} at {policy.optimizer_config.lr:g}, "
            f"{trainer.train_batch_size // trainer.policy_mini_batch_size * trainer.update_epochs_per_batch} a step, "
            f"rows of {policy.row_tokens} tokens",
        ),
        ("steps", f"{steps[1]}" + (f", {steps[0]} done" if steps[0] else "")),
        ("evaluation", f"every {trainer.eval_interval} steps" if trainer.eval_interval else "at the end"),
        ("run folder", run_dir),
        ("seed", str(trainer.seed)),
    ]


def correction(config: Config) -> str:
    """What weighs tokens that were sampled with other weights than those they train; empty when nothing does."""
    algorithm = config.trainer.algorithm
    settings, loss = algorithm.off_policy_correction, algorithm.policy_loss_type
    if settings.tis_ratio_type == "token":
        return f"importance sampling by token, up to {settings.token_tis_ratio_clip_high:g}"
    if settings.tis_ratio_type == "sequence":
        return f"importance sampling by episode, up to {settings.sequence_tis_ratio_clip_high:g}"
    if settings.enabled and loss not in CORRECTED_BY_THEMSELVES:  # its ratio is to the learner's own policy
        return ""
    return f"{loss}'s ratio to the policy that sampled each token"


def asynchrony(config: Config) -> str:
    """How far behind episodes may be, and what corrects it."""
    bound = config.trainer.max_staleness
    return (
        f"episodes up to {bound} version{'s' if bound > 1 else ''} of the weights behind; "
        f"{'corrected by ' + correction(config) if correction(config) else 'nothing corrects that'}"
    )
