"""Scores of a text against plain arithmetic on the logits, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import llmkit
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.errors import LLMKitError, UsageError
from llmkit.evaluate import perplexity as measure
from llmkit.evaluate.perplexity import Evaluation, evaluate, load_pair, read_texts
from llmkit.kernels import native_problem
from llmkit.llm.api import LLM
from tests.tiny import BOS, TEXT, write_model

TEXTS = [TEXT, "The dog ran to the ball.", "T"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("eval")
    model = write_model(root / "model")
    quantize_folder(model, root / "q4")
    return root / "q4", model


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> tuple[LLM, LLM]:
    llm, reference = load_pair(*folders, device="cpu")
    assert reference is not None
    return llm, reference


def log_probabilities(llm: LLM, ids: Sequence[int]) -> np.ndarray:
    logits = llm.logits(ids).astype(np.float64)[:-1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_definition(llm: LLM, reference: LLM, windows: Sequence[Sequence[int]]) -> dict[str, float]:
    nats, kl, same = [], [], []
    for ids in windows:
        ours, true = (log_probabilities(model, ids) for model in (llm, reference))
        nats += (-ours[np.arange(len(ids) - 1), ids[1:]]).tolist()
        kl += (np.exp(true) * (true - ours)).sum(-1).tolist()
        same += (ours.argmax(-1) == true.argmax(-1)).tolist()
    return {
        "perplexity": float(np.exp(np.mean(nats))),
        "mean_kl": float(np.mean(kl)),
        "kl_99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(np.mean(same)),
    }


def check(found: Evaluation, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


def test_against_the_definition(pair: tuple[LLM, LLM]) -> None:
    llm, reference = pair
    windows = [[BOS, *llm.tokenizer.encode(text, bos=False)] for text in TEXTS]
    found = evaluate(llm, TEXTS, reference)
    check(found, by_definition(llm, reference, windows))
    assert found.tokens == sum(len(ids) - 1 for ids in windows)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.documents == 3
    assert found.bits_per_byte == pytest.approx(np.log2(found.perplexity) * found.tokens / found.bytes)
    assert 4.25 < found.bits_per_weight < 32
    assert found.mean_kl is not None
    assert found.mean_kl > 1e-3
    score = reference.score(windows[0])
    assert evaluate(reference, TEXTS[:1]).bits_per_byte == pytest.approx(score.bits_per_byte, rel=1e-6)


def test_chunks_of_logits_make_no_difference(pair: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(pair[0], TEXTS, pair[1])
    monkeypatch.setattr(measure, "LOGITS", 1)  # 16 rows a step
    monkeypatch.setattr(measure, "_SLICE", 1)
    chunks = evaluate(pair[0], TEXTS, pair[1])
    check(chunks, {name: getattr(whole, name) for name in ("perplexity", "mean_kl", "kl_99", "top1_agreement")})


def test_long_documents_are_cut_into_windows(pair: tuple[LLM, LLM]) -> None:
    llm, reference = pair
    ids = llm.tokenizer.encode(TEXT, bos=False)
    windows = [[BOS, *ids[start : start + 9]] for start in range(0, len(ids), 9)]
    found = evaluate(llm, [TEXT], reference, ctx_size=10)
    check(found, by_definition(llm, reference, windows))
    assert (found.tokens, found.bytes, found.documents) == (len(ids), len(TEXT.encode()), 1)


def test_max_tokens(pair: tuple[LLM, LLM]) -> None:
    llm, reference = pair
    ids = [llm.tokenizer.encode(text, bos=False) for text in TEXTS]
    for count in (1, 5, len(ids[0]), len(ids[0]) + 2):
        found = evaluate(llm, TEXTS, reference, max_tokens=count)
        windows = [[BOS, *ids[0][:count]]] + [[BOS, *ids[1][:2]]] * (count > len(ids[0]))
        check(found, by_definition(llm, reference, windows))
        assert (found.tokens, found.documents) == (count, len(windows))
        assert found.bytes == sum(len(llm.tokenizer.decode(window[1:]).encode()) for window in windows)
    assert evaluate(llm, TEXTS, max_tokens=10**6).tokens == sum(map(len, ids))


def test_without_bos_the_first_token_of_a_window_is_not_scored(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", bos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = llmkit.load(folder, device="cpu")
    assert llm.bos_id is None
    ids = llm.tokenizer.encode(TEXT)
    found = evaluate(llm, [TEXT, "T"], ctx_size=10)
    windows = [ids[start : start + 10] for start in range(0, len(ids), 10)]
    check(found, {"perplexity": by_definition(llm, llm, [window for window in windows if len(window) > 1])["perplexity"]})
    assert found.documents == 1  # "T" is one token, and nothing comes before it
    assert evaluate(llm, [TEXT], max_tokens=7).tokens == 7
    with pytest.raises(UsageError, match="no token that could be scored"):
        evaluate(llm, ["T"])


def test_a_model_agrees_with_itself(pair: tuple[LLM, LLM]) -> None:
    found = evaluate(pair[1], TEXTS, pair[1])
    assert (found.mean_kl, found.kl_99, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.bits_per_byte == found.reference_bits_per_byte


def test_progress(pair: tuple[LLM, LLM]) -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(pair[0], TEXTS, progress=lambda *state: seen.append(state))
    assert seen == sorted(seen)
    assert seen[-1] == (found.tokens, found.tokens)


@pytest.mark.skipif(native_problem() is not None, reason="PyTorch has one cache")
def test_caches_are_compared(folders: tuple[Path, Path]) -> None:
    found = []
    for bits in (32, 16, 8):
        llm, reference = load_pair(folders[1], folders[1], device="cpu", kv_bits=bits)
        found.append(evaluate(llm, TEXTS, reference).mean_kl or 0.0)
        assert reference is not None
        assert "32-bit cache" in reference.backend.path
    assert found[0] == 0.0
    assert 0 < found[1] < found[2] < 1e-2


def test_reading_texts(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\n<|endoftext|>\n\n<|endoftext|>two<|endoftext|>")
    assert read_texts(str(text)) == ["one", "two"]
    assert read_texts(str(text), "o") == ["ne\n<|end", "ftext|>\n\n<|end", "ftext|>tw", "<|end", "ftext|>"]
    assert read_texts(str(text), "") == [text.read_text().strip()]
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "one <|endoftext|>"}\n\n{"text": "two", "id": 7}\n')
    assert read_texts(str(rows)) == ["one <|endoftext|>", "two"]
    rows.write_text('{"prompt": "one", "completion": "two"}')
    with pytest.raises(UsageError, match=r'b\.jsonl:1 has no "text"'):
        read_texts(str(rows))
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UsageError, match="has no text"):
        read_texts(str(tmp_path / "c.txt"))


def test_what_cannot_be_compared(pair: tuple[LLM, LLM], folders: tuple[Path, Path], tmp_path: Path) -> None:
    llm, reference = pair
    with pytest.raises(UsageError, match="is quantized itself"):
        load_pair(folders[1], folders[0], device="cpu")
    wide = llmkit.load(write_model(tmp_path / "wide", vocab_size=100), device="cpu")
    with pytest.raises(UsageError, match=r"100 tokens and .* cannot be compared"):
        evaluate(llm, TEXTS, wide)
    other = write_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="cut the text into different tokens"):
        evaluate(llm, [TEXT, TEXT.replace(" ", "")], llmkit.load(other, device="cpu"))
    for size in (1, 4097):
        with pytest.raises(UsageError, match=f"ctx_size {size} is not between 2 and 4096"):
            evaluate(llm, TEXTS, reference, ctx_size=size)


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LLMKitError, match="not finite"):
        evaluate(llmkit.load(folder, device="cpu"), TEXTS)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    beyond = max(llmkit.load(write_model(tmp_path / "whole"), device="cpu").tokenizer.encode(TEXT))
    small = llmkit.load(write_model(tmp_path / "small", vocab_size=beyond), device="cpu")
    with pytest.raises(UsageError, match=f"token id {beyond} is outside the vocabulary of {beyond}"):
        evaluate(small, [TEXT])
    for judge in (small.logits, small.score):
        with pytest.raises(UsageError, match=f"token id {beyond} is outside the vocabulary of {beyond}"):
            judge(TEXT)
