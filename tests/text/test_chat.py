# ruff: noqa: E501  templates read better on one line
"""Chat templates against transformers, hostile ones against the clock, and the loss mask of training."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LLMKitError, TemplateError, UsageError
from llmkit.text.chat import ChatTemplate, encode_prompt
from llmkit.text.codec import read_settings
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.text.turns import encode_chat

from .conftest import byte_level_folder

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "the cat"}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rendered_by_transformers(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str | None:
    """transformers' text, None where it fails."""
    from transformers import PreTrainedTokenizerFast  # noqa: F401  the module below imports lazily
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return str(render_jinja_template([messages], chat_template=source, **kwargs)[0][0])
    except Exception:
        return None


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of tool calls as objects instead of strings."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


@pytest.mark.real
def test_real_templates_render_as_in_transformers(data_dir: Path) -> None:
    templates = sorted((data_dir / "tokenizers/chat_templates_llamacpp").glob("*.jinja"))
    contexts = [json.loads(path.read_text()) for path in sorted((data_dir / "tokenizers/minja_contexts").glob("*.json"))]
    assert len(templates) == 55
    rendered = 0
    for path in templates:
        template = ChatTemplate(path.read_text())
        for context in contexts:
            for prompt in (True, False):
                values = {**context, "add_generation_prompt": prompt}
                # Arguments as objects, for most templates write the JSON themselves; as strings where they do not.
                expected = rendered_by_transformers(
                    template.sources["default"], **{**values, "messages": with_objects(context["messages"])}
                )
                if expected is None or str({"condition": True}) in expected:
                    expected = rendered_by_transformers(template.sources["default"], **values)
                if expected is None:
                    with pytest.raises(TemplateError):
                        template.render(**values)
                else:
                    assert template.render(**values) == expected, path.name
                    rendered += 1
    assert rendered > 250


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages|tojson }} {{ {'b': '<é>', 'a': 1}|tojson }} {{ messages|tojson(indent=2) }} {{ [1]|tojson(separators=(',', ':')) }}",
        "{{ 'a' ~ 1 ~ none ~ [1, 'x'] }} {{ (1, 2) }} {{ {'k': [1]} }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ '%05d|%s' % (3, 'x') }}",
        "{{ '{:>5}|{}'.format(1, 'a') }} {{ 'a,b'.split(',')|join('-') }} {{ 'x'.center(5) }} {{ ' y '|trim|upper }} {{ 'ab'|replace('a', 'c') }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{{ loop.last }}{% endfor %}{{ ns.n }}",
        "{% macro f(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{% call f(2) %}c{% endcall %}{{ [f(3), f(4)]|join }}",
        "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ a }}{{ b }}{% if loop.first %}{% continue %}{% endif %}!{% break %}{% endfor %}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}{{ undefined_one }}{{ [1, 2, 3]|sum }}",
        "{{ messages|map(attribute='role')|list }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ [[1], [2]]|sum(start=[]) }}",
        "{% filter upper %}abc{{ 'd' }}{% endfilter %}{% set x %}  a{{ 1 }}{% endset %}{{ x|indent(2) }} {{ strftime_now('%Y') }}",
        "{{ '<b>'|e }} {{ '<b>'|safe }} {{ 3.7|round|int }} {{ 3.14159|round(2) }} {{ 'a\nb'|indent(2, true) }} {{ dict(a=1) }} {{ '%s'|format(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}",
        "{{ messages[0]['content'][::-1] }} {{ -3|abs }} {{ [3, 1]|sort }} {{ ['a', 'b'][1:] }} {{ 'a' in 'abc' }} {{ 1 if false }} {{ 'é'|tojson }}",
        "{% block b %}in{% endblock %}{{ self.b() }}{{ namespace(_x=1) }}",
        "{{ 2147483648|tojson }}{{ messages[0].get('n', 1) }}{{ x|default(10000000000) }}{{ [1, 2]|batch(1)|list }}",
    ],
)
def test_the_language_is_transformers(source: str) -> None:
    expected = rendered_by_transformers(source, [USER, ASSISTANT], tools=None)
    if expected is None:
        with pytest.raises(TemplateError):
            ChatTemplate(source).render([USER, ASSISTANT])
    else:
        assert ChatTemplate(source).render([USER, ASSISTANT]) == expected


def doubled(step: str, times: int = 60, start: str = "'ab'") -> str:
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "range of range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "written without end": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "written into a buffer": "{% set t %}{% for a in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}{{ t }}",
    "value into a buffer": "{% set s = 'x' * 999999 %}{% set t %}{% for a in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    "text times": "{{ 'a' * 10 ** 9 }}",
    "list times": "{{ ([1] * 1000000000)|length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": doubled("ns.x * ns.x", start="3"),
    "plus": doubled("ns.x + ns.x"),
    "tilde": doubled("ns.x ~ ns.x"),
    "join": doubled("[ns.x, ns.x]|join"),
    "join method": doubled("''.join([ns.x, ns.x])"),
    "join of a generator": "{% set s = 'x' * 999999 %}{{ range(99999)|map('replace', '', s)|join }}{{ [s]|map('string')|join }}",
    "replace": doubled("ns.x|replace('a', ns.x)"),
    "replace method": doubled("ns.x.replace('a', ns.x)"),
    "format": doubled("'%s%s' % (ns.x, ns.x)"),
    "format filter": doubled("'%s%s'|format(ns.x, ns.x)"),
    "format method": doubled("'{0}{0}'.format(ns.x)"),
    "shared lists": doubled("[ns.x, ns.x]") + "{{ ns.x }}",
    "shared dicts": doubled("{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}",
    "shared lists compared": doubled("[ns.x, ns.x]") + doubled("[ns.x, ns.x]").replace("ns", "nt") + "{{ ns.x == nt.x }}",
    "deep list": doubled("[ns.x]", 99999) + "{{ ns.x }}",
    "many values alive": doubled("ns.x + [i|string ~ 'a' * 5000000]", 9999, "[]"),
    "width": "{{ '%1000000000d' % 1 }}",
    "width by argument": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:>1000000000}'.format('a') }}",
    "format width by argument": "{{ '{:>{}}'.format('a', 1000000000) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 999999).expandtabs(999999) }}",
    "translate": "{{ ('a' * 999999).translate({97: 'b' * 99999}) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "punycode": "{{ ('ü' * 999999).encode('punycode') }}",
    "indent": "{{ ('a\n' * 999999)|indent(999999) }}",
    "tojson indent": "{{ [[[[[[[[1]]]]]]]]|tojson(indent=999999999) }}",
    "round": "{{ 1.5|round(1000000000) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "sum of lists": "{{ ([[1, 2, 3]] * 99999)|sum(start=[]) }}",
    "macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "block that calls itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "redefined checkpoints": "{% set environment = 1 %}{% set step = 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "condition of a loop": "{% for a in range(99999) if range(99999)|sum < 0 %}{% endfor %}",
    "sorting": "{% for a in range(99999) %}{% set x = range(99999)|sort(reverse=true) %}{% endfor %}",
    "strftime": "{{ strftime_now('%c' * 999999) }}",
    "namespace in itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns, ns.x]|tojson }}",
    "deep source": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "long source": "{{ 1 }}" * 100_000,
    "not a template": "{% for %}",
    "division": "{{ 1 / 0 }}",
    "includes": "{% include 'x' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    """In a thread that is not the main one, in about two seconds, without gigabytes."""
    ended: list[BaseException | str] = []

    def render() -> None:
        try:
            ended.append(ChatTemplate(HOSTILE[name]).render([USER]))
        except BaseException as error:
            ended.append(error)

    ChatTemplate("").render([USER])  # the import of Jinja is not the template's time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(ended[0], TemplateError), ended
    assert time.process_time() - began < 2.5
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 900e6


@settings(max_examples=150, deadline=None)
@given(source=st.lists(st.sampled_from(["{{", "}}", "{%", "%}", " for ", " in ", "messages", "|", "join", "(", ")", "[0]", "*", "9", "'", "if ", "endfor", "\n", "generation", ".x"]), max_size=14).map("".join))  # fmt: skip
def test_any_source_only_raises_our_errors(source: str) -> None:
    with contextlib.suppress(LLMKitError):
        ChatTemplate(source).render([USER])


def test_long_conversations_are_no_attack() -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 200} for n in range(4000)]
    assert len(ChatTemplate(CHATML).render(messages)) > 4_000_000


def test_messages_are_checked_and_normalised() -> None:
    template = ChatTemplate("{{ messages|tojson }}{{ bos_token }}{{ documents }}{{ extra }}", {"bos_token": "<s>"})
    assert (
        template.render([{"role": "user", "content": None}], documents=[{"title": "t"}], extra=3)
        == "[{\"role\": \"user\"}]<s>[{'title': 't'}]3"
    )
    assert "reasoning_content" in template.render([{**ASSISTANT, "reasoning": "r"}])
    for wrong in ([], "text", [1], {"role": "user"}):
        with pytest.raises(UsageError):
            template.render(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Tools"):
        template.render([USER], tools=["x"])  # type: ignore[list-item]


def test_template_sources(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    assert load_tokenizer(folder).chat_template is None
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "bos_token": "<|endoftext|>"}))
    template = load_tokenizer(folder).chat_template
    assert template is not None
    assert (template.render([USER]), template.render([USER], tools=[{}])) == ("d", "t")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}j")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("r")
    template = load_tokenizer(folder).chat_template
    assert template is not None
    assert (template.render([USER]), template.render([USER], template="rag")) == ("<|endoftext|>j", "r")
    with pytest.raises(TemplateError, match="default, rag, tool_use"):
        template.render([USER], template="other")


@pytest.mark.real
def test_real_configurations_are_read(data_dir: Path) -> None:
    folders = [
        path.parent for path in (data_dir / "tokenizers").rglob("*.json") if path.name in ("tokenizer_config.json", "chat_template.json")
    ]
    assert len(folders) >= 14
    for folder in folders:
        for source in read_settings(folder).templates.values():
            assert "Hello" in ChatTemplate(source, {"bos_token": "", "eos_token": ""}).render([USER])


def chat_tokenizer(tmp_path: Path, template: str) -> Tokenizer:
    folder = byte_level_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


CONVERSATION = [USER, ASSISTANT, {"role": "user", "content": "and the dog"}, {"role": "assistant", "content": "the ball\n"}]


def learned(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i if keep else tokenizer.token_id("<|endoftext|>") or 0 for i, keep in zip(ids, mask, strict=True)], False)


@pytest.mark.parametrize("source", [CHATML, GENERATION])
def test_mask_of_the_assistants_tokens(tmp_path: Path, source: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, source)
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    said = learned(tokenizer, ids, mask).replace("<|endoftext|>", "")
    assert said == "the cat<|im_end|>the ball\n<|im_end|>"  # with the end of the turn, without the line end after it
    for k in (1, 3):  # what is trained is what is served
        prompt = encode_prompt(tokenizer, CONVERSATION[:k])
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt)]
        assert not mask[len(prompt) - 1]
    assert tokenizer.token_id("<|endoftext|>") not in ids  # the template has no BOS, so none is added
    prompt, mask = encode_chat(tokenizer, CONVERSATION[:3], add_generation_prompt=True)
    assert prompt == encode_prompt(tokenizer, CONVERSATION[:3])
    assert len(mask) == len(prompt)


def test_generation_mask_is_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = chat_tokenizer(tmp_path, GENERATION)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=GENERATION)
    told = theirs.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    n = len(told["input_ids"])  # the file's truncation cuts theirs
    assert ids[:n] == told["input_ids"]
    assert [int(m) for m in mask[:n]] == told["assistant_masks"]


def test_template_with_a_tail(tmp_path: Path) -> None:
    """Phi-3's template closes every conversation, but not every turn, with the end-of-text token."""
    tokenizer = chat_tokenizer(tmp_path, CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}")
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    assert learned(tokenizer, ids, mask).replace("<|endoftext|>", "") == "the cat<|im_end|>the ball\n<|im_end|>"


@pytest.mark.parametrize(
    "turn",
    [
        "{% if loop.last %}<think></think>{% endif %}{{ message.content }}",  # Qwen 3
        "{% if loop.last %}{{ message.content }}{% endif %}",
    ],
)
def test_ambiguous_turns_are_an_error(tmp_path: Path, turn: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML.replace("{{ message.content }}", turn))
    with pytest.raises(TemplateError, match="message 1 the assistant wrote cannot be told"):
        encode_chat(tokenizer, [USER, ASSISTANT, USER, ASSISTANT])


def test_generation_inside_a_macro_is_an_error(tmp_path: Path) -> None:
    source = "{% macro f() %}{% generation %}x{% endgeneration %}{% endmacro %}abc{% set t = f() %}def{{ t }}"
    with pytest.raises(TemplateError, match="inside of a macro"):
        ChatTemplate(source).render([USER])


def test_no_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        encode_chat(load_tokenizer(byte_level_folder(tmp_path)), [USER])
