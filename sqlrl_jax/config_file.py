"""Reading, checking and saving a run's settings: YAML, `key=value` from the command line, and what to say to mistakes.

The settings themselves are in config.py. Messages name the key, the value and what is allowed, and for an unknown key
the nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError

from sqlrl_jax.config import Config, ConfigError
from sqlrl_jax.config_base import OneOfOrOwn, Section


class Setting(typing.NamedTuple):
    """One leaf of the configuration, for `launch.py config`."""

    key: str
    value: Any
    default: Any
    meaning: str
    allowed: str


def _section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    named = [m for m in metadata if isinstance(m, OneOfOrOwn)]
    if named:
        return named[0].allowed
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *more = typing.get_args(annotation)
        return _allowed(inner, more)
    if origin is Literal:
        return " | ".join(str(v) for v in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("not given" if a is type(None) else _allowed(a, []) for a in typing.get_args(annotation)) + (
            ", " + _bounds(metadata) if _bounds(metadata) else ""
        )
    if origin is dict:
        return "any names with JSON values"
    name = "list of " + _allowed(typing.get_args(annotation)[0], []) if origin is tuple else annotation.__name__
    return f"{name} {_bounds(metadata)}".strip()


def _bounds(metadata: list[Any]) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    return ", ".join(
        f"{sign} {getattr(m, a)}" for m in metadata for a, sign in signs if getattr(m, a, None) is not None
    )


def settings(config: Config) -> list[Setting]:
    """Every setting in file order: dotted key, value, default, meaning, allowed values."""
    out: list[Setting] = []

    def walk(section: Section, defaults: Section, prefix: str) -> None:
        for name, info in type(section).model_fields.items():
            value, default, key = getattr(section, name), getattr(defaults, name), prefix + name
            if isinstance(value, Section):
                walk(value, default, key + ".")
            else:
                out.append(
                    Setting(key, value, default, info.description or "", _allowed(info.annotation, info.metadata))
                )

    walk(config, Config(), "")
    return out


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file, applies `key=value` overrides, checks everything.

    Raises ConfigError naming the file or key, the value and what is allowed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}': expected key=value, for example trainer.epochs=2")
        _put(tree, key.strip(), _parse_value(key, text))
    return _checked(tree)


def _checked(tree: dict[str, Any]) -> Config:
    _refuse_unknown(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def override(config: Config, values: Sequence[tuple[str, Any]]) -> Config:
    """The configuration with some settings replaced, checked like `load`."""
    tree = config.model_dump(mode="json")
    for key, value in values:
        _put(tree, key, value)
    return _checked(tree)


def save(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML that `load` reads back to an equal one."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not valid YAML: {error}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"configuration {path}: expected sections such as 'trainer:', found {type(tree).__name__}")
    return tree or {}


def _parse_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text}: the value is not valid YAML; quote it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-6 as text because it has no dot
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return "" if value is None and not text else value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: '{name}' is not a section")
    tree[leaf] = value


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        sub = _section_of(info.annotation)
        if sub is not None:
            keys += _all_keys(sub, prefix + name + ".")
    return keys


def _refuse_unknown(tree: dict[str, Any], section: type[Section], prefix: str) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in section.model_fields:
            raise ConfigError(f"unknown setting '{key}'{_nearest(key)}. All settings: python launch.py config")
        sub = _section_of(section.model_fields[name].annotation)
        free = typing.get_origin(section.model_fields[name].annotation) is dict
        if sub is None and isinstance(value, dict) and not free:
            raise ConfigError(f"'{key}' is a setting, not a section: it has no '{next(iter(value), '')}'")
        if sub is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"'{key}' is a section of settings, not the value {value!r}")
            _refuse_unknown(value, sub, key + ".")


def _nearest(key: str) -> str:
    keys = _all_keys(Config)
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]  # right name, wrong section
    near = same_leaf or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:
        leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f"; did you mean '{near[0]}'?" if near else ""


def _explain(error: Any) -> str:
    path = [str(p) for p in error["loc"] if not isinstance(p, int)]
    key, value = ".".join(path), error["input"]
    info: Any = None
    section: type[Section] | None = Config
    for name in path:
        info = section.model_fields.get(name) if section is not None else None
        section = _section_of(info.annotation) if info is not None else None
    if info is None or section is not None:  # a rule between several settings
        rule = error["msg"].removeprefix("Value error, ")
        return f"{key}: {rule}" if key else rule
    return f"{key} = {value!r}: allowed is {_allowed(info.annotation, info.metadata)}"
