"""GGUF files: read back with the `gguf` package, against the Hugging Face weights under llama.cpp's own names for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.gguf.metadata import ARCHITECTURES
from llmkit.checkpoint.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, read_vocabulary
from llmkit.checkpoint.gguf.write import write_gguf
from llmkit.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from llmkit.families import MODEL_TYPES
from llmkit.text.codec_tiktoken import LLAMA3
from tests.families.tiny import SIZES, VARIANTS, hf_config, our_config, tiny_folder
from tests.tiny import write_model, write_tokenizer

# Variants that llama.cpp's graphs cannot express, and what the error says.
CANNOT = {
    "llama-yarn-mscale": "yarn",
    "gemma2-uncapped": "soft cap",
    "gpt2-unscaled": "relu",
    "olmo2-biases": "a bias after attention",
    "phi3-partial-odd": "odd number",
    "qwen3-window": "bias after attention",
    "qwen3-moe": "mix of dense",
    "qwen3-moe-window": "bias after attention",
    "smollm3-window": "RoPE",
}


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Dequantized, in Hugging Face's order of axes."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in GGUFReader(path).tensors}


def supported() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a case -> variant and changes, of all that llama.cpp can express."""
    found = {variant: (variant, {}) for variant in VARIANTS if variant not in CANNOT}
    found["qwen3-moe"] = ("qwen3-moe", {"decoder_sparse_step": 1})
    found["olmo2-tied"] = ("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True})
    return found


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is its row i, row 2i + 1 its row i + half."""
    size = len(weight) // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def expected(folder: Path) -> dict[str, np.ndarray]:
    """The Hugging Face tensors, renamed by the table of the gguf package and changed as llama.cpp's converter documents."""
    config = load_config(folder)
    architecture = ARCHITECTURES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    out: dict[str, Any] = {}
    for name, stored in load_file(folder / "model.safetensors").items():
        weight = stored
        if architecture.name == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T
        if architecture.interleaved_rope and ".q_proj." in name:
            weight = permuted(weight, config.attention(0).num_heads)
        if architecture.interleaved_rope and ".k_proj." in name:
            weight = permuted(weight, config.attention(0).num_kv_heads)
        if name.startswith("model") and "norm" in name and architecture.name.startswith("gemma"):
            weight = weight + 1
        if ".experts." in name:
            body, _, expert = name.partition(".experts.")
            index, _, which = expert.partition(".")
            which = {"w1.weight": "gate_proj.weight", "w2.weight": "down_proj.weight", "w3.weight": "up_proj.weight"}.get(which, which)
            layer = body.split(".")[2]
            out.setdefault(f"blk.{layer}.ffn_{which.removesuffix('_proj.weight')}_exps.weight", {})[int(index)] = weight
            continue
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        out[mapped] = weight
    return {name: np.stack([w[i] for i in range(len(w))]) if isinstance(w, dict) else w for name, w in out.items()}


@pytest.mark.parametrize("case", supported())
def test_weights_are_those_of_hugging_face(case: str, tmp_path: Path) -> None:
    variant, changes = supported()[case]
    folder = tiny_folder(tmp_path / "model", variant, **changes)
    write_gguf(folder, tmp_path / "m.gguf")
    found, wanted = tensors(tmp_path / "m.gguf"), expected(folder)
    extra = {name for name in found if name.startswith("rope_")}
    tied = {"output.weight"} if "output.weight" not in wanted and "output.weight" in found else set()
    assert found.keys() - extra - tied == wanted.keys()
    for name in tied:
        np.testing.assert_array_equal(found[name], found["token_embd.weight"])
    config = load_config(folder)
    for name, weight in wanted.items():
        folded = {"gemma2": "attn_q.weight", "gemma3_text": "attn_q_norm.weight"}.get(config.model_type)
        if folded is not None and name.endswith(folded):
            weight = weight * np.float32((10 / 20) ** 0.5)  # head_dim 10, query_pre_attn_scalar 20
        if variant == "gpt2-by-depth" and "attn_qkv" in name:
            weight = np.concatenate([weight[:24] / (int(name.split(".")[1]) + 1), weight[24:]])
        np.testing.assert_allclose(found[name], weight, rtol=1e-3, atol=1e-6, err_msg=name)


def test_every_family_has_an_architecture() -> None:
    assert set(MODEL_TYPES) == set(ARCHITECTURES)
    covered = {our_config(hf_config(variant)).model_type for variant, _ in supported().values()}
    assert covered | {"gemma3"} == set(MODEL_TYPES)


@pytest.mark.parametrize(("variant", "reason"), CANNOT.items())
def test_what_llama_cpp_cannot_express_is_an_error(variant: str, reason: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", variant)
    with pytest.raises(ConfigError, match=reason):
        write_gguf(folder, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["model"]


def test_metadata(tmp_path: Path) -> None:
    write_gguf(tiny_folder(tmp_path / "a", "llama-linear"), tmp_path / "a.gguf")
    found = fields(tmp_path / "a.gguf")
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "a"
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 3.0)
    assert found["llama.rope.freq_base"] == 500.0
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (3, 1)
    assert found["llama.context_length"] == SIZES["max_position_embeddings"]
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(found["tokenizer.ggml.tokens"]) == 97

    write_gguf(tiny_folder(tmp_path / "g", "gemma3"), tmp_path / "g.gguf")
    found = fields(tmp_path / "g.gguf")
    assert found["gemma3.attention.sliding_window"] == 7
    assert found["gemma3.attention.sliding_window_pattern"] == [True, True, False, True]
    assert (found["gemma3.rope.freq_base"], found["gemma3.rope.freq_base_swa"]) == (500.0, 100.0)
    assert found["gemma3.attention.key_length"] == 10

    write_gguf(tiny_folder(tmp_path / "n", "granite"), tmp_path / "n.gguf")
    found = fields(tmp_path / "n.gguf")
    scales = [found[f"granite.{name}"] for name in ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")]
    assert scales == pytest.approx([3.0, 0.2, 0.7, 5.0])

    write_gguf(tiny_folder(tmp_path / "p", "phi3-longrope"), tmp_path / "p.gguf")
    found, stored = fields(tmp_path / "p.gguf"), tensors(tmp_path / "p.gguf")
    assert found["phi3.rope.scaling.original_context_length"] == 48
    assert found["phi3.rope.scaling.attn_factor"] > 1
    np.testing.assert_allclose(stored["rope_factors_long.weight"], [1.5, 2.5, 4.0, 7.0])
    assert found["phi3.attention.sliding_window"] == 0

    write_gguf(tiny_folder(tmp_path / "l", "llama-llama3"), tmp_path / "l.gguf")
    factors = tensors(tmp_path / "l.gguf")["rope_freqs.weight"]
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(8.0)


def test_dynamic_rope_keeps_the_original_context(tmp_path: Path) -> None:
    report = write_gguf(tiny_folder(tmp_path / "a", "llama-dynamic"), tmp_path / "a.gguf")
    assert fields(tmp_path / "a.gguf")["llama.context_length"] == 48
    assert any("dynamic" in note for note in report.notes)


def test_a_window_that_is_not_kept_is_said(tmp_path: Path) -> None:
    report = write_gguf(tiny_folder(tmp_path / "a", "mistral"), tmp_path / "a.gguf")
    assert any("beyond 7 tokens" in note for note in report.notes)


@pytest.mark.parametrize("file_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_types(file_type: str, tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "tie_word_embeddings": tied}
    folder = tiny_folder(tmp_path / "model", "llama", **sizes)
    report = write_gguf(folder, tmp_path / "m.gguf", file_type)
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    head = "token_embd.weight" if tied else "output.weight"
    assert types[head] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == types["blk.3.ffn_down.weight"] == file_type.upper()
    assert types["token_embd.weight"] == ("Q8_0" if tied else file_type.upper())
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert fields(tmp_path / "m.gguf")["general.file_type"] == {"q8_0": 7, "q4_0": 2}[file_type]
    assert report.types[file_type.upper()] >= 28
    found = tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert error < {"q8_0": 0.01, "q4_0": 0.15}[file_type]
    # Blocks of 32 are those of a row: the first one's scale is the row's first 32 weights alone.
    np.testing.assert_allclose(found[3, :32], weight[3, :32], atol=np.abs(weight[3, :32]).max() / (127 if file_type == "q8_0" else 7.9))


def test_rows_that_do_not_fill_blocks_stay_f16(tmp_path: Path) -> None:
    report = write_gguf(tiny_folder(tmp_path / "model"), tmp_path / "m.gguf", "q4_0")
    assert report.types.keys() == {"F16", "F32"}
    assert any("stay f16" in note for note in report.notes)


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model", "mixtral")
    write_gguf(folder, tmp_path / "a.gguf")
    monkeypatch.setattr("llmkit.checkpoint.gguf.tensors.CHUNK", 100)
    write_gguf(folder, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_tokenizer_is_padded_to_the_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    known = json.loads((folder / "tokenizer.json").read_text())
    found = read_vocabulary(folder, 100, {})
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert len(found.tokens) == len(found.types) == 100
    assert found.tokens[known["model"]["vocab"]["Ġdog"]] == "Ġdog"
    assert found.tokens[-1] == "[PAD99]"
    assert found.types[-1] == UNUSED
    assert found.types[:5] == [CONTROL] * 5
    assert found.types[known["model"]["vocab"]["Ġdog"]] == NORMAL
    assert found.special == {"bos": 0, "eos": 1}
    assert not found.add_bos
    assert found.merges is not None
    assert len(found.merges) == len(known["model"]["merges"])
    assert "default" in found.templates
    write_gguf(folder, tmp_path / "m.gguf")
    written = fields(tmp_path / "m.gguf")
    assert written["tokenizer.ggml.eos_token_id"] == 1
    assert "assistant" in written["tokenizer.chat_template"]


def test_a_tokenizer_larger_than_the_model_is_cut_and_said(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    found = read_vocabulary(tmp_path, 50, {"eos_token_id": [49, 3]})
    assert len(found.tokens) == 50
    assert any("left out" in note for note in found.notes)


def test_no_tokenizer_gives_placeholders(tmp_path: Path) -> None:
    found = read_vocabulary(tmp_path, 300, {})
    assert len(found.tokens) == len(set(found.tokens)) == 300
    assert found.notes


def test_unknown_pre_tokenizer_is_a_warning(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    found = read_vocabulary(tmp_path, 100, {})
    assert found.pre == "default"
    assert r"\d+|\D+" in found.notes[0]

    for ignore, name in ((True, "llama-bpe"), (False, "dbrx")):
        split["pattern"] = {"Regex": LLAMA3.pattern}
        description["model"]["ignore_merges"] = ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(description))
        found = read_vocabulary(tmp_path, 100, {})
        assert (found.pre, found.notes) == (name, [])

    description["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert read_vocabulary(tmp_path, 100, {}).pre == "smollm"


def test_a_kind_llama_cpp_does_not_read_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    description = json.loads((tmp_path / "model/tokenizer.json").read_text())
    vocab = sorted(description["model"]["vocab"].items(), key=lambda item: item[1])
    description["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[token, -1.0] for token, _ in vocab]}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match="--no-tokenizer"):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", tokenizer=False)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("name", "theirs"), [("gpt2", "gpt-2"), ("phi-3-mini", "phi-3"), ("llama2", "llama-spm")])
def test_real_tokenizers_are_as_llama_cpp_converted_them(name: str, theirs: str, data_dir: Path) -> None:
    wanted = fields(data_dir / f"tokenizers/gguf_vocab/ggml-vocab-{theirs}.gguf")
    found = read_vocabulary(data_dir / "tokenizers" / name, len(wanted["tokenizer.ggml.tokens"]), {})
    assert found.model == wanted["tokenizer.ggml.model"]
    assert found.pre == wanted["tokenizer.ggml.pre"]
    assert found.merges == wanted.get("tokenizer.ggml.merges")
    texts = [(n, a, b) for n, (a, b) in enumerate(zip(found.tokens, wanted["tokenizer.ggml.tokens"], strict=True)) if a != b]
    assert not [one for one in texts if not one[1].startswith("[PAD")]
    assert found.special["bos"] == wanted["tokenizer.ggml.bos_token_id"]
    if found.model == "llama":
        assert found.add_bos == (name == "llama2")  # Phi-3's tokenizer_config.json has changed since
        assert found.add_space_prefix
        assert [found.types[i] for i in (3, 258, 300)] == [BYTE, BYTE, NORMAL]


@pytest.mark.real
def test_scores_from_merges_order_tokens_as_sentencepiece_did(data_dir: Path, tmp_path: Path) -> None:
    spm = read_vocabulary(data_dir / "tokenizers/llama2", 32000, {})
    only_json = tmp_path / "t"
    only_json.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (only_json / name).write_bytes((data_dir / "tokenizers/llama2" / name).read_bytes())
    derived = read_vocabulary(only_json, 32000, {})
    assert derived.tokens == spm.tokens
    assert derived.types == spm.types
    assert derived.scores is not None
    assert spm.scores is not None
    # Runs of spaces share one score in sentencepiece.
    merged = [i for i in range(32000) if derived.scores[i] < 0 and derived.tokens[i].strip("▁")]
    assert len(merged) > 25000
    order = sorted(merged, key=lambda i: derived.scores[i])
    assert order == sorted(merged, key=lambda i: spm.scores[i])


@pytest.mark.slow
@pytest.mark.real
def test_merges_from_ranks_give_the_same_tokens(data_dir: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = read_vocabulary(data_dir / "tokenizers/qwen", 151936, {})
    assert (found.model, found.pre) == ("gpt2", "qwen2")
    assert found.types[151643] == CONTROL
    assert found.tokens[151643] == "<|endoftext|>"
    assert found.merges is not None
    merges = [tuple(merge.split(" ")) for merge in found.merges]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(found.tokens[:151643])}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = bpe.encode("Once upon a time there was a tokenizer, größer als zuvor.").ids
    assert "".join(found.tokens[i] for i in ids).startswith("OnceĠuponĠaĠtime")
    assert len(ids) < 20


@pytest.mark.real
def test_a_real_model(data_dir: Path, tmp_path: Path) -> None:
    write_gguf(data_dir / "models/stories260K-hf", tmp_path / "m.gguf")
    theirs = next(path for path in sorted((data_dir / "models/stories260K-gguf").glob("*.gguf")) if "f32" in path.name)
    found, wanted = tensors(tmp_path / "m.gguf"), tensors(theirs)
    for name in found.keys() & wanted.keys():
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert len(found.keys() & wanted.keys()) > 40


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    (tmp_path / "m.gguf").write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "precious"
    with pytest.raises(UsageError, match="is a folder"):
        write_gguf(folder, tmp_path, overwrite=True)
    write_gguf(folder, tmp_path / "m.gguf", overwrite=True)
    assert fields(tmp_path / "m.gguf")["general.architecture"] == "llama"
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "model"]


@pytest.mark.parametrize(
    ("value", "file_type", "message"),
    [
        (1e6, "f16", r"1e\+06, which F16 cannot hold. Use q8_0"),
        (1e6, "q4_0", r"1e\+06, which Q4_0 cannot hold. Use q8_0"),
        (-1e7, "q8_0", r"1e\+07, which Q8_0 cannot hold. Keep the model in safetensors"),
        (np.nan, "q8_0", "not finite"),
    ],
)
def test_values_that_cannot_be_stored(tmp_path: Path, value: float, file_type: str, message: str) -> None:
    folder = tiny_folder(tmp_path / "model", hidden_size=96)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][1, 1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers\.2\.mlp\.up_proj.*{message}"):
        write_gguf(folder, tmp_path / "m.gguf", file_type)
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_gguf(folder, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["model"]


def test_unknown_file_type(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="f16, q8_0, q4_0"):
        write_gguf(tmp_path, tmp_path / "m.gguf", "q6_k")
