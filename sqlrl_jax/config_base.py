"""What every section of the configuration is made of. The settings are in config.py and config_algorithm.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from rollout.errors import UserError


class ConfigError(UserError):
    """A setting is unknown or out of range; the message names key, value and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


@dataclass(frozen=True)
class OneOfOrOwn:
    """Restricts a text to one of `names`, or package.module:function of a function of the user's own."""

    names: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return " | ".join((*self.names, "package.module:function"))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        module, colon, name = value.partition(":")
        own = colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if value not in self.names and not own:
            raise ValueError(f"allowed is {self.allowed}")
        return value
