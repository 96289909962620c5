"""How long a schema's text may be: a number of tokens of the model that is to read it.

Left out: the rest of the prompt. trainer.max_prompt_length bounds the whole of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollout.chat import ChatError, load_tokenizer

BYTES_PER_TOKEN = 2  # of DDL with sample values, at the least; 2.5 is usual
MOST_BYTES_PER_TOKEN = 8  # a text with more of them than all its tokens could have isn't counted

_log = logging.getLogger(__name__)


class TokenBudget:
    """Whether a text has at most `max_tokens` tokens. Threads may share one.

    The tokenizer of the model folder is loaded when a text is first long enough to need it; a folder without one counts
    BYTES_PER_TOKEN bytes as a token.
    """

    def __init__(self, max_tokens: int, model_folder: str | Path) -> None:
        self.max_tokens, self._folder = max_tokens, model_folder
        self._count: Callable[[str], int] | None = None
        self._lock = threading.Lock()  # transformers' tokenizers can't encode in two threads at a time

    def fits(self, text: str) -> bool:
        size = len(text.encode())
        if size <= self.max_tokens:  # no token is less than a byte
            return True
        if size > self.max_tokens * MOST_BYTES_PER_TOKEN:
            return False
        with self._lock:
            if self._count is None:
                self._count = _counter(self._folder)
            return self._count(text) <= self.max_tokens


def _counter(folder: str | Path) -> Callable[[str], int]:
    try:
        tokenizer: Any = load_tokenizer(folder)
    except ChatError as error:
        _log.info("schemas are measured by their bytes: %s", error)
        return lambda text: -(-len(text.encode()) // BYTES_PER_TOKEN)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
