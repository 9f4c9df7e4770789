"""Whatever stands in a model folder: it loads, or it is one LLMKitError, and soon."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.checkpoint.files import DTYPE_BITS, open_checkpoint
from llmkit.checkpoint.hub import resolve
from llmkit.checkpoint.load import load_model
from llmkit.errors import LLMKitError

from . import raw

fuzz = settings(
    max_examples=100, deadline=timedelta(seconds=5), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

SIZES = st.one_of(st.integers(0, 9), st.integers(-(2**70), 2**70), st.booleans(), st.floats(), st.none(), st.text(max_size=3))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SIZES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(DTYPE_BITS)) | VALUES,
        "shape": st.lists(SIZES, max_size=4) | VALUES,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | VALUES,
    },
)
NAMES = st.sampled_from([*raw.llama_tensors(), "lm_head.weight", "__metadata__"]) | st.text(max_size=20)


def survives(action: Callable[[], object]) -> None:
    """Nothing but an LLMKitError, and one that can be printed."""
    try:
        action()
    except LLMKitError as error:
        str(error).encode()


@cache
def whole() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return (raw.llama_folder(Path(folder)) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw.llama_folder(tmp_path_factory.mktemp("fuzz"))


@fuzz
@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 7)), max_size=4), tail=st.binary(max_size=9))
def test_damaged_safetensors(folder: Path, cut: int, flips: list[tuple[int, int]], tail: bytes) -> None:
    data = bytearray(whole()[:cut] + tail)
    for position, bit in flips:
        if position < len(data):
            data[position] ^= 1 << bit
    (folder / "model.safetensors").write_bytes(data)
    survives(lambda: load_model(folder))


@fuzz
@given(
    header=st.dictionaries(NAMES, ENTRIES | VALUES, max_size=4) | VALUES,
    data=st.binary(max_size=64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_lying_headers(folder: Path, header: Any, data: bytes, length: int | None) -> None:
    (folder / "model.safetensors").write_bytes(raw.encode(header, data, length))
    survives(lambda: load_model(folder))


@fuzz
@given(header=st.binary(max_size=60))
def test_headers_of_noise(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(raw.encode(header))
    survives(lambda: load_model(folder))


@fuzz
@given(data=st.data())
def test_indexes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sharded = tmp_path_factory.mktemp("sharded")
    raw.write_shards(sharded, {"model-1.safetensors": {"a": ("U8", [1], b"1")}, "model-2.safetensors": {"b": ("U8", [1], b"2")}})
    shards = st.sampled_from(["model-1.safetensors", "model-2.safetensors", "../model-1.safetensors"]) | st.text(max_size=9).map(
        lambda s: s + ".safetensors"
    )
    index = st.fixed_dictionaries(
        {}, optional={"weight_map": st.dictionaries(st.sampled_from("ab") | NAMES, shards | VALUES, max_size=4) | VALUES}
    )
    found = data.draw(index | VALUES)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(found))
    survives(lambda: open_checkpoint(sharded))


@fuzz
@given(
    change=st.dictionaries(
        st.sampled_from([*raw.LLAMA, "head_dim", "rope_parameters", "dtype", "quantization_config", "hidden_act"]),
        VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_configs(folder: Path, change: dict[str, Any]) -> None:
    raw.llama_folder(folder, **change)
    survives(lambda: load_model(folder))


@fuzz
@given(text=st.binary(max_size=40) | st.builds(lambda n, s: s * n, st.integers(0, 50_000), st.sampled_from([b"[", b'{"a":', b"1"])))
def test_configs_of_noise(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    survives(lambda: load_model(folder))


@fuzz
@given(name=st.text(max_size=30), revision=st.none() | st.text(max_size=10))
def test_names(name: str, revision: str | None) -> None:
    survives(lambda: resolve(name, revision))


def test_a_header_as_long_as_allowed_is_read_soon(tmp_path: Path) -> None:
    count = 50_000
    header = {f"t{i}": raw.entry("F32", [1], 4 * i, 4 * i + 4) for i in range(count)}
    (tmp_path / "model.safetensors").write_bytes(raw.encode(header, struct.pack("<f", 1.0) * count))
    assert len(open_checkpoint(tmp_path)) == count
