"""What a decoder looks like, read from and written to a Hugging Face `config.json`.

One record serves Qwen2, Qwen3 and Llama: the families differ in data only. Nothing here overrides a checkpoint: a field
that the decoder does not implement is refused by name, and a field that is absent takes the value that transformers
itself would give it. Fields without influence on the arithmetic are carried through to an export in `extra`.
Left out: mixtures of experts, sliding windows, biases on the output projection and RoPE scalings other than Llama 3's,
because no recipe here uses them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.errors import UserError

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Fields that the decoder reads, or that an export writes anew: never carried in `extra`.
READ = frozenset(
    f"""{" ".join(_SIZES)} num_key_value_heads head_dim rms_norm_eps tie_word_embeddings max_position_embeddings
    rope_theta rope_scaling rope_parameters model_type architectures hidden_act attention_bias eos_token_id bos_token_id
    pad_token_id dtype torch_dtype transformers_version _name_or_path""".split()
)
# Read too, to refuse sliding windows, and carried through.
WINDOWS = frozenset({"layer_types", "use_sliding_window", "sliding_window", "max_window_layers"})
# Values with which a field changes nothing; any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "attention_chunk_size": (None,),
    "per_layer_config": (None, {}),
}
# Fields of transformers' classes that no code of these families reads for the logits. Together with READ, WINDOWS and
# NEUTRAL these are all their fields (a test compares), so a release that adds one is noticed. What is in none of the
# lists is a name that transformers itself does not know; it is carried.
CARRIED = frozenset(
    {"use_cache", "initializer_range", "pretraining_tp", "chunk_size_feed_forward", "return_dict", "output_attentions"}
    | {"output_hidden_states", "id2label", "label2id", "problem_type"}
)
# What transformers fills in for a field that is absent, where that differs from null.
_TOKENS = {"llama": {"bos_token_id": 1, "eos_token_id": 2}}
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class ModelConfigError(UserError):
    """A `config.json` that the decoder cannot follow exactly; the message names the field."""


def read_object(file: Path, needed: str, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in `file`. Raises `error` where there is none; `needed` says what a missing file would belong to."""
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{file} does not exist: {needed}") from None
    except ValueError as problem:
        raise error(f"{file} is not JSON: {problem}") from None
    if not isinstance(parsed, dict):
        raise error(f"{file} does not hold a JSON object")
    return parsed


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's change of the RoPE frequencies: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. Hashable, so that it can be a static argument of `jax.jit`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """A bias on q, k and v (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key (Qwen3)."""
    max_position_embeddings: int = 32768
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = field(default="float32", compare=False)
    """Type of the checkpoint's weights: what an export is written in. Masters and products have settings of their own."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of `config.json` that change nothing here and go back into an export."""

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ModelConfigError(f"model_type {self.model_type!r}: supported are {', '.join(ARCHITECTURES)}")
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelConfigError(f"{name} = {value!r}: a whole number above 0 is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads"
                f" {self.num_key_value_heads}"
            )
        if self.model_type == "llama" and self.hidden_size % self.num_attention_heads:
            raise ModelConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ModelConfigError(f"head_dim = {self.head_dim}: RoPE needs an even number")
        if self.attention_bias != (self.model_type == "qwen2") or self.qk_norm != (self.model_type == "qwen3"):
            raise ModelConfigError(
                f"{self.model_type}: attention_bias {self.attention_bias} and qk_norm {self.qk_norm} are not what"
                " transformers builds for this type (the bias is Qwen2's, the norm Qwen3's)"
            )

    @property
    def query_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The record of a parsed `config.json`. Raises ModelConfigError naming what is missing or unsupported."""
        model_type = config.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ModelConfigError(f"model_type {model_type!r} is not supported: use {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(config, model_type)
        for name in (*_SIZES, "rms_norm_eps", "max_position_embeddings"):
            if config.get(name) is None:
                raise ModelConfigError(f"{name} is missing from config.json")
        theta, scaling = _rope(config)
        tokens = {**_TOKENS.get(model_type, {}), **config}
        eos = tokens.get("eos_token_id")
        return cls(
            model_type=model_type,
            **{name: config[name] for name in _SIZES},
            num_key_value_heads=_key_value_heads(config, model_type),
            head_dim=_head_dim(config, model_type),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            max_position_embeddings=config["max_position_embeddings"],
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            bos_token_id=tokens.get("bos_token_id"),
            pad_token_id=tokens.get("pad_token_id"),
            dtype=_dtype(config),
            extra={k: v for k, v in config.items() if k not in READ},
        )

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """The record of `path/config.json`."""
        file = Path(path) / "config.json"
        parsed = read_object(file, "a Hugging Face checkpoint folder is needed", ModelConfigError)
        try:
            return cls.from_hf(parsed)
        except ModelConfigError as error:
            raise ModelConfigError(f"{file}: {error}") from None

    def to_hf(self, dtype: str | None = None) -> dict[str, Any]:
        """A `config.json` for weights of `dtype` (default: the checkpoint's own).

        RoPE stands there twice: `rope_parameters` is what transformers 5 reads, `rope_theta` and `rope_scaling` what
        everything older reads."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {"rope_type": "llama3", **vars(self.rope_scaling)}
        out: dict[str, Any] = {
            **self.extra,
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in _SIZES},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
            "dtype": dtype or self.dtype,
        }
        if self.rope_scaling is not None:
            out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if self.model_type != "qwen2":
            out["attention_bias"] = False
        return out


def _refuse_unsupported(config: Mapping[str, Any], model_type: str) -> None:
    wanted = ARCHITECTURES[model_type]
    if config.get("architectures") and list(config["architectures"]) != [wanted]:
        raise ModelConfigError(f"architectures {config['architectures']} is not supported: {wanted} is needed")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelConfigError(f"hidden_act {config['hidden_act']!r} is not supported: silu is needed")
    if model_type != "qwen2" and config.get("attention_bias"):
        raise ModelConfigError(f"attention_bias true is not supported for {model_type} (it puts a bias on o_proj too)")
    for name, neutral in NEUTRAL.items():
        if name in config and config[name] not in neutral:
            raise ModelConfigError(f"{name} = {config[name]!r} is not supported: the decoder has no such part")
    _refuse_windows(config, model_type)


def _refuse_windows(config: Mapping[str, Any], model_type: str) -> None:
    layers, kinds = config.get("num_hidden_layers") or 0, config.get("layer_types")
    odd = sorted(set(kinds or ()) - {"full_attention"})
    if odd:
        raise ModelConfigError(f"layer_types holds {odd}: only full_attention is supported")
    if kinds is not None and len(kinds) != layers:
        raise ModelConfigError(f"layer_types holds {len(kinds)} layers, but num_hidden_layers is {layers}")
    # The defaults are those of transformers' Qwen classes; its Llama class has no window, other engines' have.
    window, first = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    if model_type == "llama":
        window, first = config.get("sliding_window"), 0
    slides = config.get("use_sliding_window", model_type == "llama") and window is not None and kinds is None
    if slides and (first is None or first < layers):
        raise ModelConfigError(
            f"sliding_window {window} (use_sliding_window) holds for layers from {first or 0} on: it is not supported"
        )


def _dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelConfigError(f"dtype {dtype!r} is not supported: float32, bfloat16 or float16 is needed")
    return dtype


def _key_value_heads(config: Mapping[str, Any], model_type: str) -> int:
    if "num_key_value_heads" not in config and model_type != "llama":
        raise ModelConfigError("num_key_value_heads is missing from config.json")
    heads = config.get("num_key_value_heads")
    return config["num_attention_heads"] if heads is None else heads


def _head_dim(config: Mapping[str, Any], model_type: str) -> int:
    if config.get("head_dim") is not None:
        return config["head_dim"]
    if model_type == "qwen3":
        raise ModelConfigError("head_dim is missing from config.json")
    return config["hidden_size"] // config["num_attention_heads"]


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """RoPE base and scaling; `rope_scaling` before `rope_parameters`, as transformers 5 resolves them."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = dict(config.get(name) or {})
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        raise ModelConfigError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    theta = 10_000.0 if theta is None else float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ModelConfigError(f"{name} of type {kind!r} is not supported: use default or llama3")
    unknown = sorted(set(rope) - _ROPE_KEYS - (set(_LLAMA3_KEYS) if kind == "llama3" else set()))
    if unknown:
        raise ModelConfigError(f"{name}.{unknown[0]} is not supported with type {kind}")
    if kind == "default":
        return theta, None
    missing = [key for key in _LLAMA3_KEYS if rope.get(key) is None]
    if missing:
        raise ModelConfigError(f"{name} of type llama3 lacks {missing[0]}")
    factor, low, high, original = (rope[key] for key in _LLAMA3_KEYS)
    return theta, Llama3Scaling(float(factor), float(low), float(high), int(original))
