"""Training examples of chats: what is learned stands after exactly what the model is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import TemplateError
from llmkit.text.chat import ChatTemplate, encode_prompt
from llmkit.text.codec import read_settings
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.text.turns import Example, encode_turns

from .conftest import byte_level_folder
from .test_chat import CHATML, GENERATION

Messages = list[dict[str, Any]]
TALK: Messages = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "the ball"},
]


def with_template(tokenizer: Tokenizer, source: str | dict[str, str], roles: dict[str, str] | None = None) -> Tokenizer:
    tokenizer.chat_template = ChatTemplate(source, {**tokenizer.special_tokens, **(roles or {})})
    return tokenizer


def check_served(tokenizer: Tokenizer, messages: Messages, tools: Any = None, **kwargs: Any) -> list[Example]:
    """Every turn is learned once, straight after the ids of its prompt; returns the examples."""
    examples = encode_turns(tokenizer, messages, tools, **kwargs)
    starts = [(n, k) for n, (_, mask) in enumerate(examples) for k in range(1, len(mask)) if mask[k] and not mask[k - 1]]
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant" and k]
    assert len(starts) == len(turns)
    for (n, k), turn in zip(starts, turns, strict=True):
        ids, mask = examples[n]
        assert ids[:k] == encode_prompt(tokenizer, messages[:turn], tools, **kwargs)
        said = ids[k : (mask[k:].index(False) + k) if False in mask[k:] else len(ids)]
        content = messages[turn].get("content") or ""
        assert content.strip() in tokenizer.decode(said, skip_special=False)
    assert all(mask[-1] for _, mask in examples)
    return examples


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path))


@pytest.mark.parametrize("source", [CHATML, GENERATION, CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"])
def test_one_example_where_every_turn_is_as_served(tokenizer: Tokenizer, source: str) -> None:
    assert len(check_served(with_template(tokenizer, source), TALK)) == 1


@pytest.mark.parametrize(
    "turn",
    [
        "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}",  # Qwen 3
        "{% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}{{ message.content[:2] }}{% endif %}",
    ],
)
def test_a_turn_that_looks_different_later_gets_its_own_example(tokenizer: Tokenizer, turn: str) -> None:
    assert len(check_served(with_template(tokenizer, CHATML.replace("{{ message.content }}", turn)), TALK)) == 2


def test_a_token_across_the_end_of_a_prompt(tokenizer: Tokenizer) -> None:
    """The prompt ends with a space, and vocabularies join a space to the word after it."""
    source = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant: {% endif %}").replace(
        "{{ message.role }}\n", "{{ message.role }}{{ ': ' if message.role == 'assistant' else '\n' }}"
    )
    tokenizer = with_template(tokenizer, source)
    whole = tokenizer.encode("assistant: the cat", bos=False)
    assert whole[: len(tokenizer.encode("assistant: ", bos=False))] != tokenizer.encode("assistant: ", bos=False)
    assert len(check_served(tokenizer, TALK)) == 2
    ids, mask = encode_turns(tokenizer, TALK[:2])[0]
    assert tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep], skip_special=False) == "the cat<|im_end|>"
    assert tokenizer.decode(ids, skip_special=False).endswith("assistant: the cat<|im_end|>")


def test_a_prompt_that_opens_a_thought(tokenizer: Tokenizer) -> None:
    """DeepSeek R1: finished turns show no thought, and a prompt begins one."""
    source = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = with_template(tokenizer, source)
    assert len(check_served(tokenizer, TALK)) == 2
    thoughtful = [*TALK[:3], {**TALK[3], "reasoning_content": "which toy?"}]
    for k, expected in ((1, "<think>\n\n</think>\n\nthe cat<|im_end|>"), (3, "<think>\nwhich toy?\n</think>\n\nthe ball<|im_end|>")):
        ids, _ = encode_turns(tokenizer, thoughtful, turns=[k])[0]
        assert tokenizer.decode(ids, skip_special=False).endswith(expected)


def test_a_closed_thought_and_reasoning_do_not_go_together(tokenizer: Tokenizer) -> None:
    turn = "{% if message.thinking %}<think>{{ message.thinking }}</think>{% endif %}{{ message.content }}"
    source = CHATML.replace("{{ message.content }}", turn).replace(
        "assistant\n{% endif %}", "assistant\n{% if not think %}<think></think>{% endif %}{% endif %}"
    )
    tokenizer = with_template(tokenizer, source)
    assert len(check_served(tokenizer, TALK)) == 2
    thoughtful = [TALK[0], {**TALK[1], "thinking": "hm"}]
    with pytest.raises(TemplateError, match="chat_template_kwargs"):
        encode_turns(tokenizer, thoughtful)
    assert len(check_served(tokenizer, thoughtful, think=True)) == 1


def test_the_end_is_always_learned(tokenizer: Tokenizer) -> None:
    """Outside of the generation block, as a token without a role, or not in the template at all."""
    outside = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert outside != GENERATION
    for source in (outside, CHATML.replace("<|im_end|>", "<|endoftext|>"), CHATML.replace("<|im_end|>", "")):
        for ids, mask in encode_turns(with_template(tokenizer, source), TALK[:2]):
            assert mask[-1]
            assert ids[-1] in {*tokenizer.eos_ids, *tokenizer.special_ids}


def test_a_call_that_the_template_leaves_out_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="leaves out that message 1 calls 'look'"):
        encode_turns(with_template(tokenizer, CHATML), CALLS)


def test_chosen_turns_and_first_messages(tokenizer: Tokenizer) -> None:
    tokenizer = with_template(tokenizer, CHATML)
    ((ids, mask),) = encode_turns(tokenizer, TALK, turns=[3])
    assert tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep], skip_special=False) == "the ball<|im_end|>"
    ((ids, mask),) = encode_turns(tokenizer, [TALK[1], *TALK])  # nothing leads to the first message
    assert sum(mask) == sum(encode_turns(tokenizer, TALK)[0][1])
    assert encode_turns(tokenizer, TALK[:1]) == []
    assert encode_turns(tokenizer, TALK[1:2]) == []


@settings(max_examples=30, deadline=None)
@given(said=st.lists(st.text(alphabet="a \n\té<|\u3000", max_size=6), min_size=2, max_size=6), source=st.sampled_from([CHATML, GENERATION]))
def test_any_content_is_trained_as_it_is_served(tokenizers: dict[str, Tokenizer], said: list[str], source: str) -> None:
    """White space at the seams of turns, where tokens like to join."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    prompts = len(messages) // 2
    for name, tokenizer in tokenizers.items():
        with_template(tokenizer, source)
        examples = encode_turns(tokenizer, messages)
        starts = [(ids, k) for ids, mask in examples for k in range(1, len(mask)) if mask[k] and not mask[k - 1]]
        assert len(starts) == prompts, name
        for (ids, k), turn in zip(starts, range(1, len(messages), 2), strict=True):
            assert ids[:k] == encode_prompt(tokenizer, messages[:turn]), name
        assert tokenizer.chat_template is not None
        text = tokenizer.chat_template.render(messages[: 2 * prompts], add_generation_prompt=False)
        trained = tokenizer.decode(examples[-1][0], skip_special=False)
        assert "".join(trained.split()) == "".join(text.split()), name  # but for the spaces that vocabularies add or swallow


def test_batches_equal_single_texts(tokenizers: dict[str, Tokenizer]) -> None:
    texts = ["Hello world", "", " the cat\n", "<|im_start|>x<|im_end|>", "Füße 你好"]
    for tokenizer in tokenizers.values():
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_spans_batch(texts) == [tokenizer.encode_spans(text) for text in texts]


def test_a_continuation_is_the_text_and_nothing_more(tokenizers: dict[str, Tokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        for text in ("the cat", " the cat", "\nthe cat", "s.", "  two"):
            ids = tokenizer.encode("Hello") + tokenizer.encode_continuation(text)
            assert tokenizer.decode(ids) == "Hello" + text, name


# -- real templates --------------------------------------------------------------------------------------------------

CALL = {"id": "call_1___", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
CALLS: Messages = [
    {"role": "user", "content": "What is there?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1___", "name": "look", "content": '{"seen": "a boat"}'},
    {"role": "assistant", "content": "There is a boat."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "It is gone."},
]
# Templates that need variables of their own, or ask for a reply after every conversation.
NEED_MORE = {"fireworks-ai-llama-3-firefunction-v2", "MiroThinker", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"}
NEED_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}


def real_templates(data_dir: Path) -> dict[str, tuple[str | dict[str, str], dict[str, str]]]:
    folder = data_dir / "tokenizers"
    found: dict[str, tuple[Any, dict[str, str]]] = {
        path.stem: (path.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
        for path in sorted((folder / "chat_templates_llamacpp").glob("*.jinja"))
    }
    for path in (*sorted((folder / "configs_only").iterdir()), *(folder / name for name in ("llama2", "phi-3-mini", "minimind"))):
        settings = read_settings(path)
        if settings.templates:
            found[path.name] = (dict(settings.templates), dict(settings.roles))
    return found


@pytest.mark.real
@pytest.mark.parametrize(("kind", "step"), [("minimind", 1), ("phi-3-mini", 6), ("llama3", 6), ("mistral/mistral_v3.model", 6)])
def test_real_templates_train_what_they_serve(data_dir: Path, kind: str, step: int) -> None:
    """Each template, and some with a tokenizer of every kind; its special tokens are then plain text, which is the harder case."""
    tokenizer = load_tokenizer(data_dir / "tokenizers" / kind)
    templates = real_templates(data_dir)
    assert len(templates) >= 65
    examples = {}
    for name, (source, roles) in list(templates.items())[::step]:
        with_template(tokenizer, source, roles)
        if name in NEED_MORE:
            with pytest.raises(TemplateError):
                encode_turns(tokenizer, TALK)
            continue
        if name not in NEED_TOOLS:
            examples[name] = len(check_served(tokenizer, TALK))
    assert sum(count == 1 for count in examples.values()) > 40 / step
    if step == 1:
        assert examples["Qwen-Qwen3-0.6B"] == 2


@pytest.mark.real
def test_real_templates_train_system_messages_and_tool_calls(data_dir: Path) -> None:
    """What a template refuses or leaves out is an error; what it shows is trained as it is served."""
    tokenizer = load_tokenizer(data_dir / "tokenizers" / "minimind")
    trained: dict[str, list[str]] = {"system": [], "tool_use": []}
    for kind, names in trained.items():
        context = json.loads((data_dir / "tokenizers" / "minja_contexts" / f"{kind}.json").read_text(encoding="utf-8"))
        messages, tools = context.pop("messages"), context.pop("tools", None)
        variables = {key: value for key, value in context.items() if key not in ("add_generation_prompt", "bos_token", "eos_token")}
        for name, (source, roles) in real_templates(data_dir).items():
            try:
                examples = check_served(with_template(tokenizer, source, roles), messages, tools, **variables)
            except TemplateError:
                continue
            names.append(name)
            if tools:
                said = "".join(tokenizer.decode([i for i, keep in zip(*e, strict=True) if keep], skip_special=False) for e in examples)
                assert "ipython" in said, name
                assert "{'code'" not in said, name  # Python's notation
                assert "Truth is definitely true." in said, name
                assert '"stdout"' not in said, name  # a tool's answer
    assert len(trained["system"]) > 55
    assert len(trained["tool_use"]) > 40
    assert "mistralai-Mistral-Nemo-Instruct-2407" in trained["system"]  # shows the system message only until a turn follows
    assert "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use" in trained["tool_use"]  # ends a tool's answer in two ways


@pytest.mark.real
@pytest.mark.parametrize("name", ["phi-3-mini", "minimind"])
def test_real_tokenizers_with_their_own_templates(data_dir: Path, name: str) -> None:
    tokenizer = load_tokenizer(data_dir / "tokenizers" / name)
    check_served(tokenizer, TALK)
    rows = json.loads((data_dir / "instruct" / "dummy_conversation.json").read_text(encoding="utf-8"))
    roles = {"human": "user", "gpt": "assistant"}
    for row in rows[:15]:
        check_served(tokenizer, [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]])
