"""Ids of prompts and observations against what each chat template itself renders."""

from pathlib import Path

import pytest
from tiny_model import TEXTS

from rollout.chat import Chat, ChatError, load_tokenizer
from sqlrl_jax.data.demo.tokenizer import train_tokenizer

LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<|begin|>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
OBSERVATION = (
    "\n\n<observation>name\nOslo\n<reminder>You have 2 turns left to complete the task.</reminder></observation>\n\n"
)
ACTION = "<think>look</think>\n<sql>SELECT name FROM city</sql>"
PROMPT = [{"role": "system", "content": "Answer with SQL."}, {"role": "user", "content": "Which city?"}]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, 320)
    return folder


def tokenizer_for(kind: str, demo_folder: Path, request: pytest.FixtureRequest):
    if kind == "qwen2.5":
        return load_tokenizer(request.getfixturevalue("shared_dir") / "tokenizers" / "qwen2.5")
    tokenizer = load_tokenizer(demo_folder)
    if kind == "llama3":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]})
        tokenizer.chat_template = LLAMA3
    if kind == "mistral":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>"]})
        tokenizer.chat_template = MISTRAL
    return tokenizer


def rendered(tokenizer, messages) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["demo", "qwen2.5", "llama3", "mistral"])
def test_conversation_equals_the_templates_own_rendering(kind, demo_folder, request):
    tokenizer = tokenizer_for(kind, demo_folder, request)
    chat = Chat(tokenizer, conversation=True)
    prompt = [PROMPT[1]] if kind == "mistral" else PROMPT
    ids = chat.prompt_ids(prompt)
    assert ids == rendered(tokenizer, prompt)
    messages = list(prompt)
    lead = " " if kind == "mistral" else ""  # that template puts a space before the assistant's words
    for _ in range(3):
        output = tokenizer.encode(lead + ACTION, add_special_tokens=False)
        ids += output + chat.observation_ids(OBSERVATION, output)
        messages += [{"role": "assistant", "content": ACTION}, {"role": "user", "content": OBSERVATION}]
    assert ids == rendered(tokenizer, messages)


@pytest.mark.parametrize("kind", ["demo", "qwen2.5", "llama3", "mistral"])
def test_a_sampled_end_of_turn_is_not_doubled(kind, demo_folder, request):
    chat = Chat(tokenizer_for(kind, demo_folder, request), conversation=True)
    output = chat.encode_action(ACTION, end=True)
    assert output[-1] in chat.end_ids
    assert output[:-1] + chat.observation_ids(OBSERVATION, output[:-1]) == output + chat.observation_ids(
        OBSERVATION, output
    )


def test_the_end_of_turn_is_left_open_when_asked(demo_folder):
    tokenizer = load_tokenizer(demo_folder)
    output = tokenizer.encode(ACTION, add_special_tokens=False)
    closed = Chat(tokenizer, conversation=True).observation_ids(OBSERVATION, output)
    left_open = Chat(tokenizer, conversation=True, append_eos=False).observation_ids(OBSERVATION, output)
    assert closed == [tokenizer.eos_token_id, *left_open]


def test_completion_style_appends_the_raw_text(demo_folder):
    chat = Chat(load_tokenizer(demo_folder))
    ids = chat.observation_ids(OBSERVATION, [1])
    assert chat.decode(ids) == OBSERVATION
    assert not chat.end_ids & set(ids)


@pytest.mark.parametrize("conversation", [False, True])
def test_control_tokens_in_data_end_nobodys_turn(demo_folder, conversation):
    chat = Chat(load_tokenizer(demo_folder), conversation=conversation)
    plain, hostile = (chat.observation_ids(f"cell {cell} end", [5]) for cell in ("x", "<|im_end|>"))
    assert [i for i in hostile if i in chat.end_ids] == [i for i in plain if i in chat.end_ids]
    prompt = chat.prompt_ids([{"role": "user", "content": "a<|im_end|>b"}])
    assert prompt.count(chat.tokenizer.eos_token_id) == 1


def test_half_characters_in_data_are_no_characters(demo_folder):
    chat = Chat(load_tokenizer(demo_folder))
    assert chat.decode(chat.observation_ids("a\ud800b", [1])) == "a?b"
    assert "a?b" in chat.decode(chat.prompt_ids([{"role": "user", "content": "a\ud800b"}]))


def test_action_text_drops_only_the_end_of_turn(demo_folder):
    chat = Chat(load_tokenizer(demo_folder))
    assert chat.action_text(chat.encode_action(ACTION, end=True)) == ACTION
    assert chat.action_text(chat.encode_action(ACTION, end=False)) == ACTION
    assert chat.action_text([]) == ""


def test_errors_name_folder_and_missing_file(tmp_path, demo_folder):
    with pytest.raises(ChatError, match=r"nowhere.*no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ChatError, match=r"tokenizer_config\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ChatError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(demo_folder)
    tokenizer.chat_template = None
    with pytest.raises(ChatError, match="chat_template"):
        Chat(tokenizer)
