"""The demo model's tokenizer: byte-level BPE over the demo task's own text, saved as a Hugging Face folder.

Words, digits and punctuation marks are never merged with each other, so that a value like
`#paris` is the same pieces in a question, a result and a query, and copying it is a plain repetition. Not a general
tokenizer: any text can be encoded, but text unlike the demo's takes a token a letter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(
    f"<{slash}{name}>" for name in ("think", "sql", "solution", "observation", "reminder") for slash in ("", "/")
)
# The reminder is in every observation word for word; as two tokens it costs little.
PHRASES = ("You have", " turns left to complete the task.")
ROLES = "system\nuser\nassistant\n"
PIECES = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\n+|\s+"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], out_dir: str | Path, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Trains on the texts, writes tokenizer.json and its companions to `out_dir`, returns the tokenizer.

    AutoTokenizer.from_pretrained(out_dir) loads it. The same texts in the same order give the same files.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS) - len(PHRASES),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([ROLES * 1000, *_without_tags(texts)], trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in (*TAGS, *PHRASES)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )
    out.chat_template = CHAT_TEMPLATE
    out.save_pretrained(str(out_dir))
    return out


def _without_tags(texts: Iterable[str]) -> Iterable[str]:
    """Tags and phrases become tokens of their own, so they must not shape the merges."""
    for text in texts:
        for fixed in (*TAGS, *PHRASES):
            text = text.replace(fixed, "\n")
        yield text
