"""The Python API on a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch

import llmkit
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.save import save_model
from llmkit.errors import CheckpointError, ContextOverflow, DoesNotFit, LLMKitError, TemplateError, TokenizerError, UsageError
from llmkit.llm.api import LLM
from llmkit.llm.outputs import Completion
from tests.families.tiny import tiny_folder
from tests.tiny import BOS, EOS, write_model


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return llmkit.load(tiny_model_dir, device="cpu")


def greedy(llm: LLM, ids: list[int], count: int) -> list[int]:
    """The plainest loop there is: the whole text through the model for every token."""
    model = load_model(llm.source.folder)
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_greedy_ids_are_those_of_the_plain_loop(llm: LLM) -> None:
    prompt = [BOS, 7, 9, 30, 12]
    completion = llm.generate(prompt, temperature=0, max_tokens=24, ignore_eos=True)
    assert list(completion.token_ids) == greedy(llm, prompt, 24)
    assert completion.finish_reason == "length"
    assert completion.usage.prompt_tokens == 5
    assert completion.usage.completion_tokens == 24
    assert completion.seed is None
    assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_several_prompts_equal_single_ones(llm: LLM) -> None:
    prompts = ["Once upon", "The dog ran to the ball", "a", ""]
    many = llm.generate(prompts, temperature=0, max_tokens=16)
    assert [c.token_ids for c in many] == [llm.generate(p, temperature=0, max_tokens=16).token_ids for p in prompts]
    assert llm.generate([]) == []
    ids = [llm.tokenizer.encode(p) or [BOS] for p in prompts]
    assert [c.token_ids for c in llm.generate(ids, temperature=0, max_tokens=16)] == [c.token_ids for c in many]


def test_the_same_seed_gives_the_same_draws_in_any_batch(llm: LLM) -> None:
    alone = llm.generate("The dog", temperature=1.0, top_k=0, seed=5, max_tokens=16, ignore_eos=True)
    among = llm.generate(["a ball", "The dog", "Once"], temperature=1.0, top_k=0, seed=5, max_tokens=16, ignore_eos=True)
    assert among[1].token_ids == alone.token_ids
    assert alone.seed == 5
    other = llm.generate("The dog", temperature=1.0, top_k=0, seed=6, max_tokens=16, ignore_eos=True)
    assert other.token_ids != alone.token_ids


def test_an_unseeded_reply_can_be_had_again_by_its_seed(llm: LLM) -> None:
    first = llm.generate("The dog", temperature=1.0, max_tokens=16, ignore_eos=True)
    assert first.seed is not None
    assert llm.generate("The dog", temperature=1.0, max_tokens=16, ignore_eos=True, seed=first.seed).token_ids == first.token_ids


def test_n_gives_different_samples(llm: LLM) -> None:
    samples = llm.generate("The dog", n=3, seed=1, temperature=1.0, top_k=0, max_tokens=16, ignore_eos=True)
    assert len({sample.token_ids for sample in samples}) == 3
    nested = llm.generate(["The dog", "a"], n=2, seed=1, max_tokens=4)
    assert [len(group) for group in nested] == [2, 2]


def test_defaults_come_from_generation_config(llm: LLM) -> None:
    params = llm.params()
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 20, 1.0)
    assert llm.params(temperature=0.2).temperature == 0.2
    assert llm.params(temperature=None).temperature == 0.7


def test_do_sample_false_means_greedy(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "greedy"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}))
    params = llmkit.load(folder, device="cpu").params()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.0, 1.0, 7)


@pytest.mark.parametrize(
    "said",
    [{"eos_token_id": 1.5}, {"eos_token_id": [[1]]}, {"bos_token_id": "<s>"}, {"temperature": "hot"}, {"max_new_tokens": 0}],
    ids=str,
)
def test_a_generation_config_that_cannot_be_is_an_error_of_the_folder(
    tmp_path: Path, tiny_model_dir: Path, said: dict[str, object]
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "odd")
    (folder / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        llmkit.load(folder, device="cpu")


def test_a_usual_length_gives_way_where_the_context_ends(tmp_path: Path, tiny_model_dir: Path) -> None:
    """max_new_tokens of generation_config.json is a habit of the model; the same number as an argument is a demand."""
    folder = tmp_path / "long"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 40}))
    llm = llmkit.load(folder, device="cpu", ctx_size=32)
    assert llm.generate([5] * 20, ignore_eos=True).usage.completion_tokens == 12
    assert llm.generate([5] * 2, ignore_eos=True).usage.completion_tokens == 30
    assert llm.chat("dog", ignore_eos=True).finish_reason == "length"
    with pytest.raises(ContextOverflow, match=r"20 tokens.*40.*32"):
        llm.generate([5] * 20, max_tokens=40)


def test_ids_come_as_lists_arrays_and_tensors(llm: LLM) -> None:
    kept = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    expected = llm.generate([5, 6, 7], **kept).token_ids
    for ids in ((5, 6, 7), range(5, 8), np.array([5, 6, 7]), np.array([5, 6, 7], dtype=np.uint8), torch.tensor([5, 6, 7])):
        assert llm.generate(ids, **kept).token_ids == expected
        assert llm.stream(ids, **kept).completion.usage.prompt_tokens == 3
        assert llm.logits(ids).shape == (3, llm.config.vocab_size)
    for several in (torch.tensor([[5, 6, 7], [7, 6, 5]]), np.array([[5, 6, 7], [7, 6, 5]]), [torch.tensor([5, 6, 7]), [7, 6, 5]]):
        assert next(c.token_ids for c in llm.generate(several, **kept)) == expected


@pytest.mark.parametrize("prompt", [None, 5, [1.5, 2], [True], ["a", None], [5, "a"], [["a"]], {"role": "user"}, b"dog", [2**70], [[[5]]]])
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(UsageError, match=r"the prompt is .*it must be text or a flat list of token ids"):
        llm.generate(prompt, max_tokens=1)  # type: ignore[call-overload]


def test_one_model_serves_several_threads(llm: LLM) -> None:
    def ask(number: int) -> tuple[int, ...]:
        reply = llm.generate(f"Once upon {number % 6}", temperature=1.0, seed=number % 6, max_tokens=20, ignore_eos=True)
        return reply.token_ids

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, range(30))) == alone * 5
    assert not llm._engine.busy


def test_learned_positions_end_somewhere(tmp_path: Path) -> None:
    llm = llmkit.load(tiny_folder(tmp_path / "gpt2", "gpt2", n_positions=64), device="cpu")
    assert llm.logits([5] * 64).shape == (64, llm.config.vocab_size)
    for ask in (llm.logits, llm.score):
        with pytest.raises(ContextOverflow, match=r"65 tokens.*64 positions"):
            ask([5] * 65)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become a stranger")
def test_a_folder_that_may_not_be_listed(tmp_path: Path, tiny_model_dir: Path, llm: LLM) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "closed")
    model = load_model(folder)
    for parent in folder.parents:  # pytest's own folders are open to their owner alone
        if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    folder.chmod(0o711)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="cannot be listed"):
            llmkit.load(folder, device="cpu")
        with pytest.raises(UsageError, match="cannot be listed"):
            save_model(model, folder, overwrite=True)
    finally:
        os.seteuid(0)


def test_empty_prompt_starts_from_bos(llm: LLM) -> None:
    assert llm.generate("", temperature=0, max_tokens=8).token_ids == llm.generate([BOS], temperature=0, max_tokens=8).token_ids


def test_stream_says_what_generate_says(llm: LLM) -> None:
    whole = llm.generate("Once upon", temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    stream = llm.stream("Once upon", temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert comparable(stream.completion) == comparable(whole)


def comparable(completion: Completion) -> Completion:
    """Without what depends on time and on earlier requests: caching, and how many tokens were worth guessing."""
    usage = replace(completion.usage, cached_tokens=0, drafted_tokens=0, accepted_tokens=0)
    return replace(completion, timings=llmkit.Timings(), usage=usage)


@pytest.mark.parametrize("seed", range(12))
def test_stop_strings_are_cut_in_streams_and_whole_replies_alike(llm: LLM, seed: int) -> None:
    free = llm.generate("Once upon", temperature=1.0, seed=seed, max_tokens=30, ignore_eos=True)
    generator = np.random.default_rng(seed)
    start = int(generator.integers(0, len(free.text) - 4))
    stop = free.text[start : start + int(generator.integers(1, 5))]
    cut = free.text[: free.text.index(stop)]
    whole = llm.generate("Once upon", temperature=1.0, seed=seed, max_tokens=30, ignore_eos=True, stop=stop)
    assert whole.text == cut
    assert whole.finish_reason == "stop"
    assert whole.usage.completion_tokens == len(whole.token_ids)
    assert whole.token_ids == free.token_ids[: len(whole.token_ids)]
    said = llm.tokenizer.decode(whole.token_ids)
    assert said.startswith(cut)
    assert not whole.token_ids or len(llm.tokenizer.decode(whole.token_ids[:-1])) < len(cut)  # no token too many
    stream = llm.stream("Once upon", temperature=1.0, seed=seed, max_tokens=30, ignore_eos=True, stop=[stop])
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == cut
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert comparable(stream.completion) == comparable(whole)


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(llm: LLM) -> None:
    free = llm.generate("Once upon", temperature=0, max_tokens=10, ignore_eos=True)
    held = llm.generate("Once upon", temperature=0, max_tokens=10, ignore_eos=True, stop=[free.text[-2:] + "never"])
    assert held.text == free.text
    assert held.token_ids == free.token_ids
    assert held.finish_reason == "length"


def test_a_stop_token_is_in_the_ids_but_not_in_the_text(llm: LLM) -> None:
    free = llm.generate("Once upon", temperature=0, max_tokens=10, ignore_eos=True)
    token = free.token_ids[4]
    first = free.token_ids.index(token)
    completion = llm.generate("Once upon", temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=[token])
    assert completion.token_ids == free.token_ids[: first + 1]
    assert completion.text == llm.tokenizer.decode(free.token_ids[:first])
    assert completion.finish_reason == "stop"


def test_eos_ends_a_reply(llm: LLM) -> None:
    completion = llm.generate("Once", temperature=0, max_tokens=10, logit_bias={EOS: 1000.0})
    assert completion.token_ids == (EOS,)
    assert completion.text == ""
    assert completion.finish_reason == "stop"


def test_closing_a_stream_keeps_what_was_said(llm: LLM) -> None:
    stream = llm.stream("Once upon", temperature=0, max_tokens=1000, ignore_eos=True)
    said = next(stream).text + next(stream).text + next(stream).text
    stream.close()
    assert stream.completion.text.startswith(said)
    assert stream.completion.finish_reason == "interrupted"
    assert len(stream.completion.token_ids) < 10
    assert not llm._engine.busy


def test_a_stream_that_is_dropped_stops(llm: LLM) -> None:
    for _ in llm.stream("Once upon", temperature=0, max_tokens=1000, ignore_eos=True):
        break
    assert not llm._engine.busy


def test_interrupt_inside_a_stream_stops_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream("Once upon", temperature=0, max_tokens=1000, ignore_eos=True)
    first = next(stream).text

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert stream.completion.text.startswith(first)
    assert stream.completion.finish_reason == "interrupted"
    assert not llm._engine.busy


def test_interleaved_streams_do_not_mix(llm: LLM) -> None:
    kept = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    alone = [llm.generate(prompt, **kept).text for prompt in ("Once upon", "The dog")]
    one, two = llm.stream("Once upon", **kept), llm.stream("The dog", **kept)
    texts = ["", ""]
    for a, b in zip_longest(one, two, fillvalue=""):
        texts[0] += str(a)
        texts[1] += str(b)
    assert texts == alone


def test_logits_are_those_of_the_model(llm: LLM) -> None:
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, 700).tolist()  # more than one chunk
    logits = llm.logits(ids)
    with torch.inference_mode():
        reference = load_model(llm.source.folder)(torch.tensor([ids]))[0].numpy()
    assert logits.dtype == np.float32
    assert logits.shape == (700, llm.config.vocab_size)
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_logits_leave_a_running_stream_alone(llm: LLM) -> None:
    whole = llm.generate("Once upon", temperature=0, max_tokens=20, ignore_eos=True).text
    stream = llm.stream("Once upon", temperature=0, max_tokens=20, ignore_eos=True)
    text = next(stream).text
    llm.logits("The dog ran to the ball and the sun was warm.")
    assert text + "".join(chunk.text for chunk in stream) == whole


def test_score(llm: LLM) -> None:
    text = "The dog ran to the ball."
    ids = [BOS, *llm.tokenizer.encode(text)]
    logits = torch.from_numpy(llm.logits(ids)).double()
    expected = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    score = llm.score(ids)
    assert score.token_logprobs == pytest.approx(expected.tolist(), rel=1e-6)
    assert score.log_likelihood == pytest.approx(float(expected.sum()), rel=1e-6)
    assert score.perplexity == pytest.approx(float((-expected.mean()).exp()), rel=1e-6)
    assert score.num_bytes == len(text)
    assert score.bits_per_byte == pytest.approx(-float(expected.sum()) / np.log(2) / len(text), rel=1e-6)
    # This tokenizer adds no BOS: the first token has no predecessor, and its bytes are not counted.
    without = llm.score(text)
    assert without.num_bytes == len(text) - len(llm.tokenizer.token(ids[1]))
    assert len(without.token_logprobs) == len(ids) - 2
    assert llm.score([BOS]).token_logprobs == ()


def test_score_crosses_chunks(llm: LLM) -> None:
    ids = np.random.default_rng(1).integers(0, llm.config.vocab_size, 1100).tolist()
    logits = torch.from_numpy(llm.logits(ids)).double()
    expected = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert llm.score(ids).token_logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_logprobs(llm: LLM) -> None:
    completion = llm.generate("Once", temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    ids = [*llm.tokenizer.encode("Once"), *completion.token_ids]
    scored = llm.score(ids).token_logprobs[-5:]
    assert [entry.logprob for entry in completion.logprobs] == pytest.approx(scored, abs=1e-4)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) and len(entry.top) == 3 for entry in completion.logprobs)


def test_chat_equals_generating_from_the_rendered_template(llm: LLM) -> None:
    ids = llm.encode_chat([{"role": "user", "content": "The dog"}])
    assert llm.tokenizer.decode(ids, skip_special=False) == "<|bos|><|user|>The dog<|end|><|assistant|>"
    assert ids.count(BOS) == 1
    expected = llm.generate(ids, temperature=0, max_tokens=12, ignore_eos=True)
    assert llm.chat("The dog", temperature=0, max_tokens=12, ignore_eos=True).token_ids == expected.token_ids
    stream = llm.chat([{"role": "user", "content": "The dog"}], stream=True, temperature=0, max_tokens=12, ignore_eos=True)
    assert "".join(chunk.text for chunk in stream) == expected.text


def test_a_special_token_in_a_message_cannot_end_it_early_in_generate(llm: LLM) -> None:
    assert EOS not in llm.tokenizer.encode("a <|end|> b")


def test_later_turns_reuse_the_cache(tiny_model_dir: Path) -> None:
    llm = llmkit.load(tiny_model_dir, device="cpu")
    messages = [{"role": "user", "content": "The dog ran to the ball and the sun was warm. " * 4}]
    first = llm.chat(messages, temperature=0, max_tokens=20, ignore_eos=True)
    assert first.usage.cached_tokens == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Once upon a time"}]
    second = llm.chat(messages, temperature=0, max_tokens=8, ignore_eos=True)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens // 16 * 16
    fresh = llmkit.load(tiny_model_dir, device="cpu").chat(messages, temperature=0, max_tokens=8, ignore_eos=True)
    assert second.token_ids == fresh.token_ids


def test_chat_template_of_ones_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("<|bos|>{{ messages[0].content }}.")
    for template in (file, "<|bos|>{{ messages[0].content }}."):
        llm = llmkit.load(tiny_model_dir, device="cpu", chat_template=template)
        assert llm.tokenizer.decode(llm.encode_chat("dog"), skip_special=False) == "<|bos|>dog."
    with pytest.raises(TemplateError, match=r"no-such\.jinja cannot be read"):
        llmkit.load(tiny_model_dir, chat_template="no-such.jinja")


def test_no_chat_template(tmp_path: Path) -> None:
    llm = llmkit.load(write_model(tmp_path / "base", template=None), device="cpu")
    with pytest.raises(TemplateError, match=r"no chat template.*--chat-template.*generate"):
        llm.chat("hello")


def test_without_a_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "ids"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    llm = llmkit.load(folder, device="cpu")
    completion = llm.generate([BOS, 5, 6], temperature=0, max_tokens=6)
    assert completion.text == ""
    assert list(completion.token_ids) == greedy(llm, [BOS, 5, 6], 6)
    chunks = list(llm.stream([BOS, 5, 6], temperature=0, max_tokens=6))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == completion.token_ids
    assert llm.logits([1, 2]).shape == (2, llm.config.vocab_size)
    assert llm.score([1, 2, 3]).bits_per_byte is None
    for ask in (lambda: llm.generate("text"), lambda: llm.score("text"), lambda: llm.generate([1], stop="x"), lambda: llm.tokenizer):
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            ask()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temprature": 1}, r"'temprature' is not a sampling argument.*'temperature'"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, r"\bn\b"),
    ],
)
def test_wrong_arguments_are_refused_by_name(llm: LLM, sampling: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        llm.generate("a", **sampling)


def test_cache_tokens(tiny_model_dir: Path) -> None:
    """As many tokens as there is room for take turns, and the context is no longer than that."""
    llm = llmkit.load(tiny_model_dir, device="cpu", cache_tokens=64)
    assert llm.ctx_size == 64
    assert llmkit.load(tiny_model_dir, device="cpu", cache_tokens=100_000).ctx_size == 4096
    prompts = [[5 + i] * 30 for i in range(9)]
    few = llm.generate(prompts, max_tokens=10, temperature=0, ignore_eos=True)
    many = llmkit.load(tiny_model_dir, device="cpu").generate(prompts, max_tokens=10, temperature=0, ignore_eos=True)
    assert [reply.token_ids for reply in few] == [reply.token_ids for reply in many]
    assert len(llm.generate([5] * 30, temperature=0, ignore_eos=True).token_ids) == 34
    with pytest.raises(ContextOverflow, match=r"70 tokens.*64.*larger cache_tokens"):
        llm.generate([5] * 70)
    with pytest.raises(DoesNotFit, match=r"cache_tokens 10000000000000 does not fit in the .* Take \d+ or fewer"):
        llmkit.load(tiny_model_dir, device="cpu", cache_tokens=10**13)
    with pytest.raises(UsageError, match=r"ctx_size 100 does not fit in cache_tokens 64"):
        llmkit.load(tiny_model_dir, ctx_size=100, cache_tokens=64)


def test_prompts_that_do_not_fit_say_the_numbers(tiny_model_dir: Path) -> None:
    llm = llmkit.load(tiny_model_dir, device="cpu", ctx_size=64)
    with pytest.raises(ContextOverflow, match=r"40 tokens.*30.*64"):
        llm.generate([5] * 40, max_tokens=30)
    with pytest.raises(ContextOverflow, match=r"64 tokens.*64"):
        llm.generate([5] * 64)
    assert len(llm.generate([5] * 40, temperature=0, ignore_eos=True).token_ids) == 24  # up to the end of the context
    with pytest.raises(UsageError, match=r"5000.*4096"):
        llmkit.load(tiny_model_dir, ctx_size=5000)
    contexts = ({"ctx_size": "10"}, {"ctx_size": 10.5}, {"ctx_size": True})
    for wrong in (*contexts, {"cache_tokens": 1}, {"cache_tokens": "64"}, {"threads": 0}, {"threads": "2"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            llmkit.load(tiny_model_dir, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="token id 100000"):
        llm.generate([100000])
    with pytest.raises(UsageError, match="one reply, not n=2"):
        llm.stream("a", n=2)


def test_reprs(llm: LLM) -> None:
    assert "llama" in repr(llm)
    assert "context 4096" in repr(llm)
    html = replace(llm.generate("a", max_tokens=3), text="<b>&")._repr_html_()
    assert "&lt;b&gt;&amp;" in html
    assert "tok/s" in html
    assert "perplexity" in repr(llm.score("The dog"))


def test_timings_and_usage(llm: LLM) -> None:
    timings = llm.generate("The dog ran", temperature=0, max_tokens=10, ignore_eos=True).timings
    assert timings.total is not None
    assert timings.time_to_first_token is not None
    assert 0 < timings.time_to_first_token < timings.total
    assert timings.prefill_tok_s is not None
    assert timings.decode_tok_s == pytest.approx(9 / (timings.total - timings.time_to_first_token), rel=0.05)


def test_embedded_model_when_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llmkit.llm.api.__file__", str(tmp_path / "llm" / "api.py"))
    with pytest.raises(LLMKitError, match="embedded model is missing"):
        llmkit.embedded_model()


@pytest.mark.real
def test_stories260k_greedy_text(data_dir: Path) -> None:
    """The published text (MANIFEST.md), through the whole API; a continuation keeps the space it begins with."""
    llm = llmkit.load(data_dir / "models" / "stories260K-hf", device="cpu")
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
        "She wanted to play with it, but it was too high."
    )
    assert llm.generate("", temperature=0, max_tokens=61).text == text
    assert llm.generate("Once", temperature=0, max_tokens=8).text == " upon a time, there was a little"
    assert "".join(map(str, llm.stream("", temperature=0, max_tokens=61))) == text
