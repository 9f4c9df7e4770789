"""Files, folders and data sets to documents."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.training.data.documents import is_held_out, read_documents
from llmkit.training.recipe import Source

ROWS = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(3)]


def completions(path: Path | str, **keys: Any) -> list[str | None]:
    return [document.completion for document in read_documents(Source(str(path), **keys))]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


EXPECTED = ["It is 0.", "It is 1.", "It is 2."]


def test_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    files = [tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "a.json", "b.json", "c.json", "a.csv", "a.parquet")]
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    files[0].write_text(lines)
    files[1].write_bytes(gzip.compress(lines.encode()))
    files[2].write_text(json.dumps(ROWS, indent=1))
    files[3].write_text(json.dumps({"version": 1, "data": ROWS}))
    files[4].write_text(lines)  # as many data sets are published
    with files[5].open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[6])
    for file in files:
        assert completions(file) == EXPECTED, file
        assert completions(file, limit=2) == EXPECTED[:2]
    (tmp_path / "row.json").write_text(json.dumps(ROWS[0]))
    assert completions(tmp_path / "row.json") == EXPECTED[:1]


def test_arrow_nulls_are_keys_that_a_row_has_not(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"b": 2}}}]}
    rows = [{"messages": [{"role": "user", "content": "Hi"}, message]} for message in (call, other)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents = list(read_documents(Source(str(tmp_path / "a.parquet"))))
    assert [d.messages[1]["tool_calls"][0]["function"]["arguments"] for d in documents if d.messages] == [{"a": 1}, {"b": 2}]


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for name, row in zip(("train", "valid", "test"), ROWS, strict=True):
        write_lines(tmp_path / f"{name}.jsonl", [row])
    source = Source(str(tmp_path))
    documents = list(read_documents(source))
    assert [(d.completion, is_held_out(d, source, 0.9)) for d in documents] == [("It is 0.", False), ("It is 1.", True)]
    assert completions(tmp_path, split="test") == ["It is 2."]
    with pytest.raises(UsageError, match="no split eval, only"):
        completions(tmp_path, split="eval")
    write_lines(tmp_path / "alone" / "train.jsonl", ROWS)  # without valid, a share of train is held out as anywhere
    alone = Source(str(tmp_path / "alone"))
    assert [is_held_out(d, alone, 1.0) for d in read_documents(alone)] == [True] * 3


def test_a_folder_of_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", ROWS[:1])
    write_lines(tmp_path / "b.jsonl", ROWS[1:])
    (tmp_path / "notes.json").write_text('{"author": "me"}')  # beside rows it is none
    assert sorted(map(str, completions(tmp_path))) == EXPECTED
    assert completions(tmp_path / "*.jsonl") == EXPECTED[1:]
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.json").write_text(json.dumps(ROWS))
    assert completions(only) == EXPECTED


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_list(ROWS)
    part.save_to_disk(str(tmp_path / "one"))
    assert completions(tmp_path / "one") == EXPECTED
    datasets.DatasetDict({"train": part, "validation": part.select([0])}).save_to_disk(str(tmp_path / "two"))
    source = Source(str(tmp_path / "two"))
    assert [is_held_out(d, source, 0.0) for d in read_documents(source)] == [False, False, False, True]
    assert completions(tmp_path / "two", split="validation") == EXPECTED[:1]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, split: str | None, streaming: bool) -> Any:
        asked.append((path, name, split, streaming))
        part = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
        return part if split else datasets.IterableDatasetDict({"train": part, "test": part})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert completions("someone/rows", name="main", streaming=True, limit=2) == EXPECTED[:2]
    assert completions("someone/rows", split="train[:3]") == EXPECTED
    assert asked == [("someone/rows", "main", None, True), ("someone/rows", None, "train[:3]", False)]


def test_a_data_set_that_cannot_be_had() -> None:
    with pytest.raises(UsageError, match=r"someone/rows-that-are-not in data is no file or folder.*HF_HUB_OFFLINE"):
        completions("someone/rows-that-are-not")
    with pytest.raises(UsageError, match="no id of a data set"):
        completions("rows.jsonl", format="hub")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\xff\xfe{\x00", "not UTF-8"),
        ("a.jsonl.gz", b"{}", "cannot be read"),
        ("a.json", b"", "is not JSON"),
        ("a.json", b"[{]", "is not JSON"),
        ("a.json", b'"text"', "is a JSON str"),
        ("a.json", b'{"a": [1]}', "has the keys a"),
        ("a.json", b'[{"text": "fine"}, {"text": NaN}]', "row 2 is not JSON"),
        ("a.json", rb'[{"text": "\ud800"}]', "row 1 is not JSON"),
        ("a.csv", b'a,b\n"x', "no CSV table"),
        ("a.csv", b"a,b\nx,y\n", "a.csv:2 has the keys a, b"),
        ("a.parquet", b"nothing", "no Parquet file"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        completions(tmp_path / name)
    assert name in str(caught.value)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ending=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]), at=st.integers(0, 10**6), junk=st.binary(max_size=4))
def test_any_bytes_are_documents_or_our_error(tmp_path: Path, ending: str, at: int, junk: bytes) -> None:
    """Each kind of file with a few bytes changed."""
    import pyarrow
    import pyarrow.parquet

    whole = tmp_path / "whole.parquet"
    if not whole.exists():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), whole)
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    table = b"prompt,completion\na,b\n"
    good = {
        ".jsonl": lines,
        ".json": json.dumps(ROWS).encode(),
        ".csv": table,
        ".parquet": whole.read_bytes(),
        ".jsonl.gz": gzip.compress(lines),
    }
    content = good[ending]
    at %= len(content) + 1
    path = tmp_path / f"a{ending}"
    path.write_bytes(content[:at] + junk + content[at + len(junk) :])
    with contextlib.suppress(UsageError):
        completions(path)


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    for key, value in (("name", "main"), ("split", "train"), ("streaming", True)):
        with pytest.raises(UsageError, match=f"{key} of .* has no effect"):
            completions(path, **{key: value})


def test_bad_rows_may_be_dropped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], {"x": 1}, ROWS[2]])
    dropped: list[UsageError] = []
    documents = list(read_documents(Source(str(path), bad_rows="drop"), dropped=dropped))
    assert [d.completion for d in documents] == ["It is 0.", "It is 2."]
    assert "a.jsonl:2" in str(dropped[0])
    with pytest.raises(UsageError, match=r"a\.jsonl:2"):
        completions(path)


@pytest.mark.real
def test_the_real_files_are_read(data_dir: Path) -> None:
    counts = {"instruction-data.json": 1100, "dummy_conversation.json": 500, "gsm8k_train.jsonl": 7473, "gpteacher_roleplay.json": 1923}
    for name, count in counts.items():
        documents = list(read_documents(Source(str(data_dir / "instruct" / name))))
        assert len(documents) == count
        assert all(document.target.strip() for document in documents) or name == "gpteacher_roleplay.json"
    pairs = [
        d.pair() for d in read_documents(Source(str(data_dir / "instruct" / "instruction-data-with-preference.json")), preference=True)
    ]
    assert len(pairs) == 1100
    assert all(chosen.prompt == rejected.prompt and chosen.completion for chosen, rejected in pairs)
