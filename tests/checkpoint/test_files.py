"""Safetensors headers that tell the truth are mapped; all others are one clear error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint.files import DTYPE_BITS, load_config, open_checkpoint, open_safetensors, read_json
from llmkit.errors import CheckpointError, ConfigError

from . import raw


def test_single_file(tmp_path: Path) -> None:
    raw.write(tmp_path / "model.safetensors", {"a": ("F32", [2], struct.pack("<2f", 1, 2)), "b": ("BF16", [1, 1], b"\x80\x3f")})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["a", "b"]
    assert (checkpoint["a"].dtype, checkpoint["a"].shape, bytes(checkpoint["a"].data)) == ("F32", (2,), struct.pack("<2f", 1, 2))
    assert (checkpoint["b"].dtype, checkpoint["b"].shape, checkpoint.nbytes) == ("BF16", (1, 1), 10)


def test_pages_are_private_and_writable(tmp_path: Path) -> None:
    path = raw.write(tmp_path / "model.safetensors", {"a": ("U8", [3], b"abc")})
    before = path.read_bytes()
    tensor = open_safetensors(path)["a"]
    tensor.data[0] = 0
    assert bytes(tensor.data) == b"\0bc"
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_and_zero_sizes(tmp_path: Path, dtype: str) -> None:
    data = bytes(range(8 * DTYPE_BITS[dtype] // 8))
    path = raw.write(
        tmp_path / "x.safetensors", {"eight": (dtype, [2, 4], data), "none": (dtype, [0, 7], b""), "scalars": (dtype, [8], data)}
    )
    tensors = open_safetensors(path)
    assert bytes(tensors["eight"].data) == data == bytes(tensors["scalars"].data)
    assert (tensors["none"].shape, tensors["none"].nbytes) == ((0, 7), 0)


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    arrays = {"w": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "scalar": numpy.float16(3), "flag": numpy.array([True, False])}
    save_file({name: numpy.asarray(array) for name, array in arrays.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in checkpoint.items()} == {
        "w": ("F32", (2, 3)),
        "scalar": ("F16", ()),
        "flag": ("BOOL", (2,)),
    }
    for name, array in arrays.items():
        assert bytes(checkpoint[name].data) == numpy.asarray(array).tobytes()


F32 = raw.entry("F32", [1], 0, 4)
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Cannot map"),
    "cut in the length": (b"\1\0\0", "cut off after 3 bytes"),
    "cut in the header": (raw.encode({"a": F32})[:20], "claims a header of"),
    "header of 100 GB": (raw.encode({"a": F32}, b"1234", length=100 * 10**9), "claims a header of 100000000000 bytes"),
    "header of 2**64-1": (raw.encode({"a": F32}, b"1234", length=2**64 - 1), "claims a header of"),
    "cut in the data": (raw.encode({"a": F32}, b"12"), "points outside the file's 2 data bytes"),
    "not UTF-8": (raw.encode(b'{"\xff": 1}'), "not JSON"),
    "not JSON": (raw.encode(b"{"), "not JSON"),
    "not an object": (raw.encode([1]), "JSON list, not an object"),
    "nested without end": (raw.encode(b"[" * 100_000), "not JSON"),
    "an endless number": (raw.encode(b'{"a": ' + b"1" * 5000 + b"}"), "not JSON"),
    "twice the same name": (raw.encode(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), b"1234"), "'a' twice"),
    "entry is no object": (raw.encode({"a": 3}), "is not an object"),
    "unknown dtype": (raw.encode({"a": raw.entry("F31", [1], 0, 4)}, b"1234"), "unknown dtype 'F31'"),
    "dtype is a list": (raw.encode({"a": F32 | {"dtype": ["F32"]}}, b"1234"), "unknown dtype"),
    "negative size": (raw.encode({"a": raw.entry("F32", [-1, -1], 0, 4)}, b"1234"), "no usable shape"),
    "float size": (raw.encode({"a": F32 | {"shape": [1.0]}}, b"1234"), "no usable shape"),
    "boolean size": (raw.encode({"a": F32 | {"shape": [True]}}, b"1234"), "no usable shape"),
    "size of 2**64": (raw.encode({"a": raw.entry("F32", [2**64], 0, 4)}, b"1234"), "no usable shape"),
    "huge product": (raw.encode({"a": raw.entry("F32", [2**62] * 64, 0, 4)}, b"1234"), "claims shape"),
    "too many sizes": (raw.encode({"a": raw.entry("F32", [1] * 65, 0, 4)}, b"1234"), "no usable shape"),
    "shape and bytes disagree": (raw.encode({"a": raw.entry("F32", [2], 0, 4)}, b"1234"), r"claims shape \[2\] in F32, 8 bytes, but has 4"),
    "dtype and bytes disagree": (raw.encode({"a": raw.entry("F64", [1], 0, 4)}, b"1234"), "8 bytes, but has 4"),
    "half a byte": (raw.encode({"a": raw.entry("F4", [1], 0, 1)}, b"1"), "claims shape"),
    "offsets backwards": (raw.encode({"a": raw.entry("F32", [1], 4, 0)}, b"1234"), "points outside"),
    "offsets past the end": (raw.encode({"a": raw.entry("F32", [1], 4, 8)}, b"1234"), "points outside"),
    "three offsets": (raw.encode({"a": F32 | {"data_offsets": [0, 4, 4]}}, b"1234"), "points outside"),
    "no offsets": (raw.encode({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "points outside"),
    "overlap": (raw.encode({"a": raw.entry("U8", [3], 0, 3), "b": raw.entry("U8", [2], 2, 4)}, b"1234"), "'b' overlaps"),
    "gap": (raw.encode({"a": raw.entry("U8", [1], 0, 1), "b": raw.entry("U8", [2], 2, 4)}, b"1234"), "'b' leaves a gap of 1 bytes"),
    "bytes left over": (raw.encode({"a": F32}, b"123456"), "2 bytes after its last tensor"),
    "a name no terminal can print": (raw.encode({"\ud800": raw.entry("F32", [2], 0, 4)}, b"1234"), r"\\ud800"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(tmp_path: Path, lie: str) -> None:
    data, message = LIES[lie]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)
    str(caught.value).encode()  # can be printed


ONE, TWO = {"a": ("U8", [1], b"1")}, {"b": ("U8", [1], b"2")}
NAMES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards(tmp_path: Path) -> None:
    raw.write_shards(tmp_path, {NAMES[0]: ONE, NAMES[1]: TWO})
    assert {name: (bytes(t.data), t.file.name) for name, t in open_checkpoint(tmp_path).items()} == {
        "a": (b"1", NAMES[0]),
        "b": (b"2", NAMES[1]),
    }


def test_shard_problems_are_all_named(tmp_path: Path) -> None:
    raw.write_shards(tmp_path, {NAMES[0]: ONE | TWO, NAMES[1]: TWO}, lost=NAMES[0], a=NAMES[1])
    with pytest.raises(CheckpointError, match=r"'b' is in .*00001.* and in .*00002") as caught:
        open_checkpoint(tmp_path)
    assert f"'lost' is not in {NAMES[0]}" in str(caught.value)
    assert f"'a' is in {NAMES[0]}, not in {NAMES[1]}" in str(caught.value)


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    raw.write_shards(tmp_path, {NAMES[0]: ONE, NAMES[1]: TWO}, c="model-x.safetensors", d="n" * 300 + ".safetensors")
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 3 of 4 shards: {NAMES[1]}, model-x.safetensors, nnn"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "x\0.safetensors", "\ud800.safetensors", "x.bin", 3],
)
def test_shard_names_stay_in_the_folder(tmp_path: Path, shard: Any) -> None:
    raw.write(tmp_path / "x.safetensors", ONE)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"not a plain .safetensors file name"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{", ""])
def test_broken_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index.json"):
        open_checkpoint(tmp_path)


def test_no_file_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    raw.write(tmp_path / "model.safetensors", ONE | TWO)
    raw.write_shards(tmp_path, {NAMES[0]: ONE, NAMES[1]: TWO})
    assert open_checkpoint(tmp_path)["a"].file.name == "model.safetensors"
    shard = tmp_path / NAMES[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=NAMES[1]):
        open_checkpoint(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Cannot map"):
        open_checkpoint(tmp_path)


def test_pointers_and_broken_links_are_damaged_files(tmp_path: Path) -> None:
    raw.write_shards(tmp_path, {"model-1.safetensors": {"a": ("U8", [1], b"1")}})
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(tmp_path)
    single.unlink()
    single.symlink_to(tmp_path / "gone")  # the shards could stand in
    with pytest.raises(CheckpointError, match=r"Cannot map .*model.safetensors"):
        open_checkpoint(tmp_path)


def test_a_folder_of_gguf_says_so(tmp_path: Path) -> None:
    (tmp_path / "m-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"has m-Q4_0.gguf and no model.safetensors. GGUF files are not read yet"):
        open_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import pickle

    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=f"only pickle files \\({name}\\).*save_pretrained"):
        open_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file at all"):
        open_checkpoint(tmp_path)
    raw.write(tmp_path / NAMES[0], ONE)
    with pytest.raises(CheckpointError, match=f"{NAMES[0]}, but no model.safetensors.index.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="Cannot read the folder"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 10**5, b"null"])
def test_config_that_is_no_json_object(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config.json"):
        load_config(tmp_path)


def test_missing_config_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read .*config.json: No such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_config(tmp_path / "config.json")


def test_remote_code_of_an_unknown_family_is_mentioned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama", "auto_map": {"AutoModel": "modeling_x.X"}}))
    with pytest.raises(ConfigError, match=r"did you mean 'llama'.*auto_map.*never runs code"):
        load_config(tmp_path)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, llmkit.checkpoint.files, llmkit.checkpoint.hub; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
