"""Settings of a run as the arguments of SGLang's Engine. No SGLang needed.

What is not set here is SGLang's own choice, and free to be set in generator.inference_engine.engine_init_kwargs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollout.engine.base import EngineError
from sqlrl_jax.config_lora import MATRICES, LoraConfig, targets

if TYPE_CHECKING:
    from sqlrl_jax.config import Config

MARGIN = 6
"""Tokens of a context that SGLang keeps for itself: a prompt may have 6 fewer, prompt and output together 2 fewer."""
LORA_VERSIONS = 4
"""Versions of the adapters that one batch may mix: turns end on the adapters they began with. Each takes GPU memory."""
_FUSED = (("q", "k", "v"), ("gate", "up"))  # one matrix each in SGLang
# What this engine decides itself, or cannot work with.
_RESERVED = frozenset(
    {"model_path", "tokenizer_path", "context_length", "dtype", "tp_size", "max_running_requests", "weight_version"}
    | {"skip_tokenizer_init", "dp_size", "tokenizer_worker_num", "enable_lora", "max_lora_rank", "lora_target_modules"}
    | {"lora_paths", "max_loaded_loras"}
)


def engine_arguments(config: Config, max_context: int) -> dict[str, Any]:
    """The arguments of SGLang's Engine. Raises EngineError for one that is not free to be set."""
    engine = config.generator.inference_engine
    out: dict[str, Any] = {
        "context_length": max_context + MARGIN,
        "dtype": engine.dtype,
        "max_running_requests": engine.max_sequences,
        "weight_version": "0",
    }
    lora = config.trainer.policy.model.lora
    if lora.rank:
        modules = list(whole_groups(lora).target_modules)
        out |= {"enable_lora": True, "max_lora_rank": lora.rank, "lora_target_modules": modules}
        out |= {"max_loras_per_batch": LORA_VERSIONS}
    return out | model_arguments(config)


def model_arguments(config: Config) -> dict[str, Any]:
    """Those that say which model is computed on what, for training and serving alike. Raises EngineError."""
    engine = config.generator.inference_engine
    taken = sorted(_RESERVED & engine.engine_init_kwargs.keys())
    if taken:
        raise EngineError(
            f"generator.inference_engine.engine_init_kwargs: {taken[0]} is not free: it follows from other settings"
        )
    out: dict[str, Any] = {
        "model_path": config.trainer.policy.model.path,
        "tp_size": engine.tensor_parallel_size,
        "log_level": "warning",
    }
    if engine.gpu_memory_utilization is not None:
        out["mem_fraction_static"] = engine.gpu_memory_utilization
    if engine.quantization:
        out["quantization"] = engine.quantization
    return out | engine.engine_init_kwargs


def whole_groups(lora: LoraConfig) -> LoraConfig:
    """`lora` with adapters on all of the matrices that SGLang keeps as one, where any of them has some: the others' are zero.

    SGLang 0.5.23 does not load q without v, k alone or up without gate.
    """
    names = set(targets(lora))
    for group in _FUSED:
        names |= set(group) if names & set(group) else set()
    return lora.model_copy(update={"target_modules": tuple(f"{name}_proj" for name in MATRICES if name in names)})
