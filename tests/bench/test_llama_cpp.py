"""llama.cpp as the rival and as the second reader of our GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmkit
from llmkit.checkpoint.gguf.write import write_gguf
from llmkit.checkpoint.quantize import quantize_folder
from tests.bench.test_inference import SMALL, command
from tests.tiny import write_model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra llama-cpp)")


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL(ours || theirs) per row of logits, in nats."""

    def logprobs(logits: np.ndarray) -> np.ndarray:
        wide = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))

    p, q = logprobs(ours), logprobs(theirs)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def their_logits(file: Path, ids: list[int]) -> np.ndarray:
    from benchmarks.llama_cpp import LlamaCppDecoding

    return LlamaCppDecoding(file, threads=2).logits(ids)


STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog."


def test_the_embedded_model_says_the_same_in_llama_cpp(tmp_path: Path) -> None:
    llm = llmkit.load(llmkit.embedded_model(), device="cpu")
    write_gguf(llmkit.embedded_model(), tmp_path / "m.gguf")
    ids = llm.tokenizer.encode(STORY)
    ours, theirs = llm.logits(ids), their_logits(tmp_path / "m.gguf", ids)
    assert divergence(ours, theirs) < 1e-6  # llama.cpp rounds activations to float16
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.95


@pytest.mark.real
@pytest.mark.parametrize(("file_type", "limit"), [("f16", 1e-5), ("q8_0", 1e-3), ("q4_0", 0.1)])
def test_a_real_model_says_the_same_in_llama_cpp(file_type: str, limit: float, data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "models/stories260K-hf"
    llm = llmkit.load(folder, device="cpu")
    write_gguf(folder, tmp_path / "m.gguf", file_type)
    ids = llm.tokenizer.encode(STORY)
    assert divergence(llm.logits(ids), their_logits(tmp_path / "m.gguf", ids)) < limit


def test_a_quantized_folder_is_dequantized_for_llama_cpp(tmp_path: Path) -> None:
    """The file says what our 4 bits say but for the 8 bits of our activations, which is far less than what 4 bits changed."""
    quantize_folder(llmkit.embedded_model(), tmp_path / "q4", "q4")
    write_gguf(tmp_path / "q4", tmp_path / "m.gguf")
    dense, ours = (llmkit.load(folder, device="cpu") for folder in (llmkit.embedded_model(), tmp_path / "q4"))
    ids = dense.tokenizer.encode(STORY)
    theirs = their_logits(tmp_path / "m.gguf", ids)
    assert divergence(ours.logits(ids), theirs) < 0.05 * divergence(dense.logits(ids), theirs)


def test_decoding_resumes_where_the_context_is_there(tmp_path: Path) -> None:
    """A second run at depth starts from the first one's context and says the same; so does the other kind of attention."""
    from benchmarks.llama_cpp import LlamaCppDecoding

    folder = write_model(tmp_path / "model")
    write_gguf(folder, tmp_path / "m.gguf")
    side = LlamaCppDecoding(tmp_path / "m.gguf", threads=1)
    prompts = [list(range(5, 45)), list(range(15, 55))]
    said = []
    for variant in ("on", "on", "off"):
        context = side._context(2, 64, variant)
        tokens = [context.resume(prompts)]
        for position in range(40, 50):
            tokens.append(context.step(tokens[-1], position))
        said.append(tokens)
    assert said[0] == said[1] == said[2]
    single = llmkit.load(folder, device="cpu").generate(prompts, max_tokens=11, temperature=0, ignore_eos=True)
    assert [list(one) for one in zip(*said[0], strict=True)] == [list(reply.token_ids) for reply in single]


def test_command_against_llama_cpp_keeps_its_files(tmp_path: Path) -> None:
    files = ("--against", "llama.cpp", "--rival-files", str(tmp_path / "files"))
    result = command(str(llmkit.embedded_model()), *SMALL, *files, "--depth", "30", "--batch", "2")
    (file,) = (tmp_path / "files").iterdir()
    assert file.name.endswith("-f16.gguf")
    for name in (
        "prefill_ratio",
        "decode_ratio",
        "decode_ratio_depth_30",
        "decode_ratio_batch_2",
        "load_ratio",
        "first_token_ratio",
        "peak_ratio",
    ):
        assert result[name] > 0
    for name in ("prefill_tok_s", "decode_tok_s", "decode_tok_s_depth_30", "decode_tok_s_batch_2", "load_s", "first_token_s", "peak_bytes"):
        assert result[f"llama_cpp_f16_{name}"] > 0
    assert result["llama_cpp_f16_decode_tok_s_depth_30_flash_attention"] in ("on", "off")
    assert "1 threads" in result["llama_cpp_f16_flags"]
    before = file.stat().st_mtime_ns
    command(str(llmkit.embedded_model()), *SMALL, *files)
    assert file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_command_against_two_kinds_of_four_bits(tmp_path: Path) -> None:
    quantize_folder(llmkit.embedded_model(), tmp_path / "q4", "q4")
    result = command(str(tmp_path / "q4"), *SMALL, "--against", "llama.cpp")
    best = max(result[f"llama_cpp_{kind}_decode_tok_s"] for kind in ("q4_0", "q4_k_m"))
    assert result["decode_ratio"] == result["decode_tok_s"] / best
    assert result["bits_per_weight"] < result["llama_cpp_q4_0_bits_per_weight"]
