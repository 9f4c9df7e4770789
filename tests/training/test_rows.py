"""Every layout of a row, and what is said of rows that have none."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.training.data.formats import Document, parse_row, read_row

ASK = {"role": "user", "content": "Hi"}
TELL = {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
TOOL = {"name": "look", "parameters": {"type": "object"}}


def simple(messages: Any) -> list[tuple[str, str]]:
    return [(m["role"], m.get("content", "")) for m in messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, {"text": "a"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "response": "b", "id": 1}, {"prompt": "a", "completion": "b"}),
        ({"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
        ({"query": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "input": "c", "output": "b"}, {"prompt": "a\n\nc", "completion": "b"}),
        ({"instruction": "a", "input": "", "output": "b", "text": "### a b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "context": None, "response": "b"}, {"prompt": "a", "completion": "b"}),
        ({"system_prompt": "s", "question": "a", "response": "b"}, {"system": "s", "prompt": "a", "completion": "b"}),
        ({"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}),
        ({"messages": [ASK, TELL], "text": "a"}, {"messages": (ASK, TELL)}),
        ({"messages": json.dumps([ASK, TELL])}, {"messages": (ASK, TELL)}),
        ({"prompt": [ASK], "completion": [TELL]}, {"messages": (ASK, TELL), "context": 1}),
        ({"prompt": [ASK], "completion": "Hello."}, {"messages": (ASK, TELL), "context": 1}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "rejected": "c"}),
        ({"conversations": [{"role": "user", "content": "Hi"}, TELL]}, {"messages": (ASK, TELL)}),
    ],
)  # fmt: skip
def test_layouts(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_row(row, "here") == Document("here", **expected)
    assert parse_row(json.dumps(row), "here") == Document("here", **expected)


def test_sharegpt_with_system_tools_and_calls() -> None:
    call = json.dumps({"name": "look", "arguments": {"at": "sea"}})
    turns = [("human", "Hi"), ("function_call", call), ("observation", "a boat"), ("gpt", "A boat.")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns], "system": "Be brief.", "tools": json.dumps([TOOL])}
    document = read_row(row, "here")
    assert document.messages is not None
    assert simple(document.messages) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", ""),
        ("tool", "a boat"),
        ("assistant", "A boat."),
    ]
    assert document.messages[2]["tool_calls"] == [CALL]
    assert document.tools == ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize("arguments", [{"at": "sea"}, '{"at": "sea"}'])
def test_tool_calls_in_every_notation(arguments: Any) -> None:
    function = {"name": "look", "arguments": arguments}
    for message in (
        {"role": "assistant", "tool_calls": [function]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function, "type": "function"}]},
        {"role": "assistant", "content": None, "function_call": function},
    ):
        document = read_row({"messages": [ASK, message]}, "here")
        assert document.messages is not None
        assert document.messages[1]["tool_calls"] == [{"type": "function", "function": function}]
    assert "look" in document.target


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    document = read_row({"messages": [{"role": "user", "content": parts}, TELL]}, "here")
    assert simple(document.messages)[0] == ("user", "ab")


WORSE = {"role": "assistant", "content": "Go."}


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"prompt": [ASK], "chosen": [TELL], "rejected": [WORSE]}, [ASK]),
        ({"prompt": "Hi", "chosen": [TELL], "rejected": [WORSE]}, [ASK]),
        ({"prompt": [ASK], "chosen": "Hello.", "rejected": "Go."}, [ASK]),
        ({"chosen": [ASK, TELL], "rejected": [ASK, WORSE]}, [ASK]),
        ({"prompt": "Hi", "chosen": [ASK, TELL], "rejected": [ASK, WORSE], "messages": [ASK, TELL]}, [ASK]),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello."}, "rejected": WORSE}, [ASK]),
        ({"chosen": [ASK, TELL, ASK, TELL], "rejected": [ASK, TELL, ASK, WORSE]}, [ASK, TELL, ASK]),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL]}, [ASK]),
    ],
)
def test_preference_rows(row: dict[str, Any], context: list[dict[str, str]]) -> None:
    chosen, rejected = read_row(row, "here", preference=True).pair()
    assert chosen.rejected is None
    assert chosen.context == rejected.context == len(context)
    assert list(chosen.messages or ()) == [*context, TELL]
    expected = TELL if row["chosen"] == row["rejected"] else WORSE
    assert list(rejected.messages or ()) == [*context, expected]


def test_preference_rows_of_strings() -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "chosen": "c", "rejected": "d", "system": "s"}
    chosen, rejected = read_row(row, "here", preference=True).pair()
    assert (chosen.prompt, chosen.completion, chosen.system) == ("a\n\nb", "c", "s")
    assert (rejected.prompt, rejected.completion, rejected.system) == ("a\n\nb", "d", "s")
    with pytest.raises(UsageError, match="one answer"):
        read_row({"prompt": "a", "completion": "b"}, "here", preference=True).pair()


def test_columns_name_what_a_row_calls_otherwise() -> None:
    assert read_row({"story": "a"}, "here", columns={"text": "story"}).text == "a"
    document = read_row({"in": "a", "out": "b"}, "here", columns={"prompt": "in", "completion": "out"})
    assert (document.prompt, document.completion) == ("a", "b")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"messages": [null]}', "messages.0 is a NoneType"),
        ('{"messages": [{"content": "a"}]}', "messages.0 has the keys content and no role"),
        ('{"messages": [{"role": null, "content": "a"}]}', "and no role"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages.0 has no content"),
        ('{"messages": [{"role": "assistant"}]}', "has no content and calls no tool"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content is 5, not text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "part of type 'image_url'"),
        ('{"messages": "hello"}', "messages is not JSON"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}', "tool call without a name"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}]}', "the arguments of f is not JSON"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]}', "are no JSON object"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [1]}', "tools is no list"),
        ('{"conversations": [{"from": "function_call", "value": "look"}]}', "is not JSON"),
        ('{"prompt": "a", "completion": ["b"]}', "completion.0 is a str"),
        ('{"question": "a", "answer": 4}', "answer is 4, not text"),
        ('{"text": null}', "has the keys text"),
        ('{"text": 1}', "text is 1, not text"),
        ('{"chosen": "a", "rejected": "b"}', "no prompt"),
        ('{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}', "do not begin with the same"),
        ('{"instruction": "a", "output": "b", "history": [["x"]]}', "history is no list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(line: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_row(line, "rows.jsonl:7")
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7")
    assert said in message
    assert message.endswith(".")


INNER = ["role", "content", "from", "value", "name", "arguments", "function", "tool_calls", "type", "text"]
OUTER = ["messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "question", "answer"]
OUTER += ["chosen", "rejected", "tools", "system", "history"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(OUTER), VALUES, max_size=4), preference=st.booleans())
def test_any_row_is_a_document_or_our_error(row: dict[str, Any], preference: bool) -> None:
    with contextlib.suppress(UsageError):
        document = parse_row(json.dumps(row), "here", preference)
        assert sum(part is not None for part in (document.text, document.prompt, document.messages)) == 1
        assert isinstance(document.target, str)
        if document.rejected is not None:
            document.pair()


@settings(max_examples=100, deadline=None)
@given(line=st.text(max_size=40))
def test_any_line_is_a_document_or_our_error(line: str) -> None:
    with contextlib.suppress(UsageError):
        parse_row(line, "here")


def test_a_row_of_other_keys_is_told_how_to_be_read() -> None:
    with pytest.raises(UsageError, match=r"has the keys story, which make no document.*columns says .* as in \{text: story\}\.$"):
        read_row({"story": "a"}, "a.jsonl:1")
    assert read_row({"story": "a"}, "a.jsonl:1", columns={"text": "story"}).text == "a"
    with pytest.raises(UsageError, match=r"has the keys prompt, completion \(without a value\), which make no document"):
        read_row({"prompt": "a", "completion": None}, "a.csv:3")  # a short line of a table
