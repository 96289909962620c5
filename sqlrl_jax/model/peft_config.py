"""adapter_config.json of a PEFT folder, read and written without jax: the learner and the rollout side both need it.

A variant whose arithmetic is another one (rsLoRA, DoRA, trained biases, ranks that differ from layer to layer) is refused
by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sqlrl_jax.config_lora import LoraConfig, describe, targets
from sqlrl_jax.model.config import read_object
from sqlrl_jax.model.hf_files import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields of adapter_config.json that would change the arithmetic, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (False, None),
}


def adapter_config(lora: LoraConfig, base: str | Path) -> dict[str, Any]:
    """The contents of adapter_config.json for adapters of the model in folder `base`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).absolute()),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": [f"{name}_proj" for name in targets(lora)],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_adapter_config(directory: str | Path) -> tuple[LoraConfig, Path]:
    """Settings and base model of a PEFT folder. Raises CheckpointError naming the field that is not supported."""
    file = Path(directory) / CONFIG
    parsed = read_object(file, "a PEFT adapter folder is needed", CheckpointError)
    for name, neutral in _NEUTRAL.items():
        if parsed.get(name, neutral[0]) not in neutral:
            raise CheckpointError(f"{file}: {name} = {parsed[name]!r} is not supported (only {neutral[0]!r})")
    try:
        lora = LoraConfig(
            rank=parsed.get("r"), alpha=parsed.get("lora_alpha"), target_modules=parsed.get("target_modules")
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = {"rank": "r", "alpha": "lora_alpha"}.get(str(first["loc"][0]), "target_modules")
        raise CheckpointError(f"{file}: {name} = {parsed.get(name)!r} is not supported: {first['msg']}") from None
    return lora, Path(parsed.get("base_model_name_or_path") or "")


def require_adapter(directory: str | Path, lora: LoraConfig) -> None:
    """Raises CheckpointError unless the PEFT folder is of the rank, alpha and modules that `lora` asks for."""
    found, _ = read_adapter_config(directory)
    if describe(found) != describe(lora):
        raise CheckpointError(
            f"{directory} holds {describe(found)}; trainer.policy.model.lora asks for {describe(lora)}: make them agree"
        )
