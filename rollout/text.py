"""Text that comes from outside: JSON, a model's server, somebody's environment.

Left out: markup inside of it, which rollout.sql.observation and rollout.chat break up, each its own.
"""

from __future__ import annotations


def whole(text: str) -> str:
    """The text with "?" for lone surrogates, which JSON can carry, but neither UTF-8 nor tokenizers nor protobuf."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
