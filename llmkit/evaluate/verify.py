"""Does a checkpoint compute here what it computes in transformers, and the same on every path through our own engine?

Everything runs in float32, except quantized weights in their integer arithmetic. A difference is the largest absolute one,
relative to the largest logit.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.engine.backend import Backend
from llmkit.engine.forward import forward_all
from llmkit.errors import LLMKitError, UsageError

if TYPE_CHECKING:
    from llmkit.llm.api import LLM

PARITY = 1e-4  # against transformers: another order of the same float32 sums
CONSISTENCY = 1e-5  # between PyTorch's own paths
GREEDY_TOKENS = 64
NOT_FINITE = "a logit is not finite"


@dataclass(frozen=True)
class Check:
    """One row: `ok` is None where it could not be checked, and `note` says why."""

    name: str
    ok: bool | None
    difference: float | None = None  # relative; of greedy tokens: the share that differs
    limit: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-ready data; a difference that is not finite is None, since JSON has no infinity."""
        finite = self.difference is not None and np.isfinite(self.difference)
        return asdict(self) | {"difference": self.difference if finite else None}


def verify(
    model: str | Path | ModelSource,
    *,
    length: int | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    adapter: str | Path | None = None,
    any_base: bool = False,
) -> list[Check]:
    """Check the model in a folder; never raises for a difference, only for a model that does not load.

    length: tokens of the random test prompt; by default past the smallest sliding window, within the context.
    adapter: check the model with it, against PEFT's reading of both, and beside the model without it in one batch.
    """
    from llmkit.llm.api import load

    source = ModelSource.open(model)  # before torch, so that a wrong name is an error at once
    config = source.config
    length = default_length(config) if length is None else length
    new = min(GREEDY_TOKENS, config.max_position_embeddings - length)
    if length < 2 or new < 1:
        limit = config.max_position_embeddings - 1
        raise UsageError(f"length {length} is not between 2 and {limit}, the context less one new token. Choose one in between.")
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()

    dtype = None if source.quantized else "float32"
    llm = load(source, dtype=dtype, device=device, threads=threads, kv_bits=32, adapter=adapter, any_base=any_base)
    name = llm.adapter_name(...)

    def run(prompts: list[list[int]], sizes: list[int] | None = None) -> list[np.ndarray]:
        return logits_of(llm.new_backend(), prompts, sizes, [name] * len(prompts))

    whole = run([ids])[0]
    trained = None if name is None else llm.adapter_folders[name]
    checks = _against_transformers(llm, ids, whole, new, trained)
    halves = [length // 3, length - length // 3]
    one_by_one = [length - min(length - 1, 32)] + [1] * min(length - 1, 32)
    # The native kernels give equal bits, but never compute without a cache: PyTorch does, the same sums in another order.
    other, same = (PARITY, 0.0) if llm.runner.exact else (CONSISTENCY, CONSISTENCY)
    uncached = _uncached(source, ids, dtype, device, trained)
    checks.append(_compare("cached vs uncached", uncached, lambda: run([ids], one_by_one)[0], other))
    checks.append(_compare("chunked vs whole prefill", whole, lambda: run([ids], halves)[0], same))
    ragged = [ids, ids[: length // 2], ids[length // 4 :], ids[-1:]]
    single = np.concatenate([run([row])[0] for row in ragged])
    checks.append(_compare("batch vs single", single, lambda: np.concatenate(run(ragged)), same))
    if name is not None:
        mixed = logits_of(llm.new_backend(), [ids, ids], adapters=[None, name])
        checks.append(_compare("beside the base vs alone", whole, lambda: mixed[1], same))
    return checks


def _uncached(source: ModelSource, ids: list[int], dtype: str | None, device: str | None, adapter: Path | None) -> np.ndarray:
    """The logits of the PyTorch model for a whole text at once, without a cache."""
    import torch

    from llmkit.checkpoint.load import load_model

    place = device or "cpu"
    model = load_model(source, dtype, place).eval()
    if adapter is not None:
        from llmkit.lora.adapter import read_adapter
        from llmkit.lora.apply import adapted

        model = adapted(model, read_adapter(adapter, source.config))
    with torch.inference_mode():
        return model(torch.tensor([ids], device=place))[0].float().cpu().numpy()


def default_length(config: ModelConfig) -> int:
    """Long enough to pass a sliding window of up to 1,024, short enough to leave room for new tokens."""
    windows = [window for window in config.cache_windows if window is not None and window <= 1024]
    wanted = max([96, *(window + 17 for window in windows)])
    return max(2, min(wanted, config.max_position_embeddings - min(GREEDY_TOKENS, config.max_position_embeddings // 2)))


def logits_of(
    backend: Backend, prompts: list[list[int]], sizes: list[int] | None = None, adapters: list[str | None] | None = None
) -> list[np.ndarray]:
    """Return the logits `[len(prompt), vocab]` of each prompt, computed in steps of these sizes; by default all prompts in one step."""
    every = sum(map(len, prompts))
    owners, _, logits = zip(*forward_all(backend, prompts, adapters=adapters, step_tokens=sizes or every), strict=True)
    rows = np.concatenate(logits)
    return np.split(rows, np.flatnonzero(np.diff(np.concatenate(owners))) + 1)


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest absolute difference, relative to the largest absolute value of the reference; inf where one is not finite."""
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return float("inf")
    return float(np.abs(ours - reference).max() / max(float(np.abs(reference).max()), 1e-30))


def _compare(name: str, reference: np.ndarray, ours: Callable[[], np.ndarray], limit: float) -> Check:
    difference = relative(ours(), reference)
    return Check(name, difference <= limit, difference, limit, "" if np.isfinite(difference) else NOT_FINITE)


def _against_transformers(llm: LLM, ids: list[int], logits: np.ndarray, new: int, adapter: Path | None) -> list[Check]:
    other = "transformers" if adapter is None else "PEFT"
    names = (f"logits vs {other}", f"greedy tokens vs {other}")
    if llm.source.quantized:  # transformers would take random weights in their place
        return [Check(name, None, note="quantized: llmkit eval --reference compares it") for name in names]
    import torch

    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it: it tells what it would compute faster with
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            llm.source.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        ).eval()
        if adapter is not None:
            from peft import PeftModel

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own calls of transformers
                theirs = PeftModel.from_pretrained(theirs, adapter).eval().get_base_model()  # with the adapter in it
    except Exception as error:  # whatever keeps transformers from loading it is the note of the rows
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return [Check(name, None, note=f"{other} could not load it: {reason}") for name in names]

    prompt = torch.tensor([ids])
    with torch.inference_mode():
        reference = theirs(prompt, use_cache=False).logits[0].float().numpy()
        checks = [_compare(names[0], reference, lambda: logits, PARITY)]
    plain: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "min_tokens": 0, "ignore_eos": True}
    try:
        got = list(llm.generate(ids, max_tokens=new, **plain).token_ids)
    except LLMKitError:  # the logits are no numbers
        return [*checks, Check(names[1], False, note=NOT_FINITE)]
    with torch.inference_mode():
        if llm.config.rope_depends_on_length:
            # transformers' generate changes the frequencies from token to token. One pass over the whole text has one set, as we
            # do; if its likeliest token is ours at every place, it would have written the same.
            whole = theirs(torch.tensor([ids + got]), use_cache=False).logits[0]
            expected = whole[len(ids) - 1 : -1].argmax(-1).tolist()
        else:
            theirs.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
            out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
            expected = out[0, len(ids) :].tolist()
    same = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), new)
    note = f"{new} tokens" if same == new else f"first difference at new token {same}: {got[same]} here, {expected[same]} there"
    return [*checks, Check(names[1], same == new, 1 - same / new, 0.0, note)]
