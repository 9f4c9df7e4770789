"""Speculation from the Python API and the command line: the same replies, and options that say when they can have no effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llmkit
from llmkit.errors import UsageError
from llmkit.llm.api import LLM
from tests.cli.test_commands import Said, only_our_settings, said  # noqa: F401 - fixtures
from tests.tiny import write_model

TURNS = ({"temperature": 0}, {"temperature": 0.9, "seed": 3, "top_k": 0}, {"temperature": 0, "repetition_penalty": 1.1, "min_tokens": 9})


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> LLM:
    return llmkit.load(tiny_model_dir, device="cpu", speculate="off")


@pytest.fixture(scope="module", params=["ngram", "draft model", "loaded draft model"])
def guessing(request: pytest.FixtureRequest, tiny_model_dir: Path, plain: LLM) -> LLM:
    if request.param == "ngram":
        return llmkit.load(tiny_model_dir, device="cpu", speculate="ngram")
    return llmkit.load(tiny_model_dir, device="cpu", draft_model=plain if request.param.startswith("loaded") else tiny_model_dir)


@pytest.mark.parametrize("sampling", TURNS, ids=str)
def test_replies_are_the_same(plain: LLM, guessing: LLM, sampling: dict[str, object]) -> None:
    prompts = ["Once upon a time there was a dog", "a ball", "The dog ran to the ball. The dog ran to the"]
    for asked in (prompts[0], prompts):
        expected, got = (llm.generate(asked, max_tokens=60, **sampling) for llm in (plain, guessing))
        pairs = zip(expected, got, strict=True) if isinstance(asked, list) else [(expected, got)]
        for one, other in pairs:
            assert (other.text, other.token_ids, other.finish_reason) == (one.text, one.token_ids, one.finish_reason)
            assert (one.usage.drafted_tokens, one.usage.accepted_tokens) == (0, 0)
            assert one.usage.completion_tokens == other.usage.completion_tokens


def test_what_was_guessed_is_reported(guessing: LLM) -> None:
    completion = guessing.generate("Once upon a time there was a dog", temperature=0, max_tokens=200, ignore_eos=True)
    usage = completion.usage
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    assert f"{usage.accepted_tokens} of {usage.drafted_tokens} draft tokens right" in completion.summary()
    assert completion.to_dict()["usage"]["accepted_tokens"] == usage.accepted_tokens


def test_a_stop_string_cuts_a_run_of_guesses(plain: LLM, guessing: LLM) -> None:
    whole = plain.generate("Once upon", temperature=0, max_tokens=120, ignore_eos=True).text
    for start in range(20, min(len(whole) - 3, 100), 8):
        request = {"temperature": 0, "max_tokens": 120, "ignore_eos": True, "stop": [whole[start : start + 3]]}
        expected, got = plain.generate("Once upon", **request), guessing.generate("Once upon", **request)
        assert (got.text, got.token_ids, got.finish_reason) == (expected.text, expected.token_ids, "stop")
        with guessing.stream("Once upon", **request) as stream:
            chunks = list(stream)
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids


def test_on_torch_auto_is_off(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows depend on the batch in their last bits: nobody gets that without asking."""
    monkeypatch.setenv("LLMKIT_KERNELS", "reference")
    completion = llmkit.load(tiny_model_dir, device="cpu").generate("Once upon", temperature=0, max_tokens=100, ignore_eos=True)
    assert completion.usage.drafted_tokens == 0


@pytest.fixture
def others(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """Draft models that cannot guess for the tiny one, and one that can although its files differ."""
    swapped = shutil.copytree(tiny_model_dir, tmp_path / "swapped")
    data = json.loads((swapped / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(data))
    same = shutil.copytree(tiny_model_dir, tmp_path / "same")
    (same / "tokenizer.json").write_text(json.dumps(json.loads((same / "tokenizer.json").read_text()), indent=1))
    silent = shutil.copytree(tiny_model_dir, tmp_path / "silent")
    (silent / "tokenizer.json").unlink()
    larger = shutil.copytree(tiny_model_dir, tmp_path / "larger")
    data["added_tokens"].append({**data["added_tokens"][0], "id": len(vocab), "content": "<|more|>"})
    (larger / "tokenizer.json").write_text(json.dumps(data))
    return {"swapped": swapped, "same": same, "silent": silent, "larger": larger}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swapped", r"token \d+ is 'a', not 'e'|token \d+ is 'e', not 'a'"),
        ("silent", "only one of them has a tokenizer"),
        ("larger", r"\d+ tokens, not \d+"),
    ],
)
def test_another_vocabulary_is_refused(said: Said, tiny_model_dir: Path, others: dict[str, Path], name: str, message: str) -> None:  # noqa: F811
    with pytest.raises(UsageError, match=rf"the draft model .* has another vocabulary than the model: ({message})\. Take"):
        llmkit.load(tiny_model_dir, device="cpu", draft_model=others[name])
    code, out, err = said("generate", str(tiny_model_dir), "-p", "a", "--draft-model", str(others[name]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "another vocabulary" in err


def test_the_same_vocabulary_in_other_files_is_taken(tiny_model_dir: Path, others: dict[str, Path]) -> None:
    assert llmkit.load(tiny_model_dir, device="cpu", draft_model=others["same"]).generate("a", max_tokens=3)
    ids = llmkit.load(others["silent"], device="cpu", draft_model=others["silent"]).generate(
        [5, 6], temperature=0, max_tokens=80, ignore_eos=True
    )
    assert ids.usage.drafted_tokens > 0


def test_models_without_tokenizers_need_equal_sizes(tmp_path: Path, others: dict[str, Path]) -> None:
    small = write_model(tmp_path / "small", vocab_size=20)
    (small / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="20 tokens, not"):
        llmkit.load(others["silent"], device="cpu", draft_model=small)


def test_options_without_effect_are_refused(said: Said, tiny_model_dir: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="speculate is 'often'; it must be one of auto, ngram, off"):
        llmkit.load(tiny_model_dir, device="cpu", speculate="often")
    for mode in ("ngram", "off"):
        code, _, err = said("generate", str(tiny_model_dir), "-p", "a", "--draft-model", str(tiny_model_dir), "--speculate", mode)
        assert code == 2
        assert f"speculate '{mode}' leaves the draft model {tiny_model_dir} without effect" in err
    assert said("generate", str(tiny_model_dir), "--draft-model", "/nowhere", "-p", "a")[0] == 1
    assert said("chat", str(tiny_model_dir), "--speculate", "often", "-p", "a")[0] == 2


def test_the_commands_take_them(said: Said, tiny_model_dir: Path) -> None:  # noqa: F811
    arguments = ("generate", str(tiny_model_dir), "-p", "Once upon", "--temp", "0", "-n", "90", "--ignore-eos")
    expected = said(*arguments)[1]
    for more in (["--draft-model", str(tiny_model_dir)], ["--speculate", "ngram"]):
        code, out, err = said(*arguments, "-v", *more)
        assert (code, out) == (0, expected)
        assert "draft tokens right" in err
    usage = json.loads(said(*arguments, "--json", "--draft-model", str(tiny_model_dir))[1])["usage"]
    assert 0 < usage["accepted_tokens"] <= usage["drafted_tokens"]
    code, _, err = said("chat", str(tiny_model_dir), "-p", "dog", "-v", "--speculate", "off", "--temp", "0", "-n", "60", "--ignore-eos")
    assert code == 0
    assert "guesses" not in err
