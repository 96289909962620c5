"""From messages to token ids, and from sampled ids to the text that an environment reads.

Token ids are the truth: sampled ids are never decoded and encoded again. What is encoded here is only what the model did
not write: the prompt, and the observations. There are two styles. Completion: one assistant message grows, observations are
raw text inside it. Conversation: an observation is a user message, so the model's turn is closed and a new one is opened
with the separators of the model's own chat template. Those are found by rendering a short conversation through the
template and taking what follows the assistant's words, which works for any template that writes messages in order.

Step by step (`step_wise`) each turn is trained on by itself, so its context need not be what the turns before it said to
the letter: a template that drops the thoughts of earlier turns, such as Qwen3's, is then asked to render the whole
conversation before each turn. The earlier turns' text is encoded anew there, as context only.

Left out: tools and images in templates, and slow (Python) tokenizers that lack a `tokenizer.json` or vocabulary files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollout.errors import UserError
from rollout.text import whole
from rollout.types import Message

_ASSISTANT_WORDS = "Words-of-the-assistant-0451"


class ChatError(UserError):
    """A tokenizer folder or chat template cannot be used; the message names it and what is missing."""


def load_tokenizer(folder: str | Path) -> Any:
    """The Hugging Face tokenizer of a model folder, without torch and without the network.

    Raises ChatError naming the folder and the missing file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ChatError(
            f"tokenizer folder {path}: no such folder; expected tokenizer.json and tokenizer_config.json in it"
        )
    if not (path / "tokenizer_config.json").exists():
        raise ChatError(f"tokenizer folder {path}: tokenizer_config.json is missing; save the model's tokenizer there")
    vocabularies = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
    if not any((path / name).exists() for name in vocabularies):
        raise ChatError(
            f"tokenizer folder {path}: none of {', '.join(vocabularies)} is there; tokenizer.json is missing"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it announces that torch is absent, as intended here
    from transformers import AutoTokenizer  # takes seconds to import, so only when a tokenizer is really needed

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ChatError(f"tokenizer folder {path} cannot be loaded: {error}") from error


class Chat:
    """A tokenizer with its chat template, in one of the two styles.

    `end_ids` are the tokens that end a turn: the tokenizer's end of sequence and whatever its template closes an assistant
    message with. `rewrites_history`: a turn's context is `prompt_ids` of all messages before it.
    """

    def __init__(
        self, tokenizer: Any, *, conversation: bool = False, append_eos: bool = True, step_wise: bool = False
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            folder = getattr(tokenizer, "name_or_path", "?")
            raise ChatError(
                f"tokenizer folder {folder}: no chat_template in tokenizer_config.json or chat_template.jinja"
            )
        self.tokenizer = tokenizer
        self.conversation = conversation
        self.append_eos = append_eos
        self._special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        closing = self._encode(self._after_assistant("x"))
        special_ids = set(tokenizer.all_special_ids)
        self._turn_end: int | None = closing[0] if closing and closing[0] in special_ids else None
        ends = {tokenizer.eos_token_id, self._turn_end}
        self.end_ids: frozenset[int] = frozenset(i for i in ends if i is not None)
        self.rewrites_history = step_wise and conversation and self._drops_thoughts()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation so far with the opening of the assistant's turn."""
        safe = [{"role": m["role"], "content": self._neutral(m["content"])} for m in messages]
        return list(self.tokenizer.apply_chat_template(safe, add_generation_prompt=True, return_dict=False))

    def observation_ids(self, text: str, output_ids: Sequence[int]) -> list[int]:
        """Ids that follow the sampled `output_ids` so that the model's next turn can begin; all of them have mask 0."""
        ended = bool(output_ids) and output_ids[-1] in self.end_ids
        if not self.conversation:
            return self._encode(self._neutral(text))
        ids = self._encode(self._after_assistant(self._neutral(text)))
        closed_by_template = self._turn_end is not None and ids[:1] == [self._turn_end]
        if closed_by_template and (ended or not self.append_eos):
            return ids[1:]
        return ids

    def action_text(self, output_ids: Sequence[int]) -> str:
        """The text of one turn, without the end-of-turn token. For the environment and for people, never encoded again."""
        ids = list(output_ids)
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        return self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids, special tokens shown."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def encode_action(self, text: str, *, end: bool) -> list[int]:
        """Ids of a turn that somebody else wrote (a demonstration), closed with the end-of-turn token if `end`."""
        ids = self._encode(text)
        if end and self._turn_end is not None:
            ids.append(self._turn_end)
        return ids

    def _drops_thoughts(self) -> bool:
        """Whether the template leaves the thoughts of earlier turns out."""
        thought = f"<think>\n{_ASSISTANT_WORDS}\n</think>\n\nx"
        roles = ("user", "x"), ("assistant", thought), ("user", "x")
        conversation = [{"role": role, "content": content} for role, content in roles]
        text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return _ASSISTANT_WORDS not in str(text)

    def _after_assistant(self, observation: str) -> str:
        conversation = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": _ASSISTANT_WORDS},
            {"role": "user", "content": observation},
        ]
        text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        _, found, after = str(text).partition(_ASSISTANT_WORDS)
        if not found:
            folder = getattr(self.tokenizer, "name_or_path", "?")
            raise ChatError(f"tokenizer folder {folder}: its chat template does not repeat what the assistant said")
        return after

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _neutral(self, text: str) -> str:
        """Breaks up control tokens inside data: a database cell that says <|im_end|> must not end anybody's turn."""
        text = whole(text)
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
