"""The Python API: `load` a model, then generate, stream, chat, look at logits and score text.

On a CPU the native kernels run the model and torch is not imported; see `llmkit.llm.backends`.
"""

from __future__ import annotations

import logging
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.engine.backend import Backend
from llmkit.engine.engine import Engine, tokens_within
from llmkit.engine.forward import forward_all
from llmkit.engine.sampling import SamplingParams, log_softmax
from llmkit.engine.speculative import Drafter, ModelDrafter, NgramDrafter, Speculation
from llmkit.errors import (
    CheckpointError,
    ContextOverflow,
    DoesNotFit,
    LLMKitError,
    TemplateError,
    TokenizerError,
    UsageError,
    naming_extras,
)
from llmkit.llm.backends import Options, Runner, check_speculation, prepare
from llmkit.llm.outputs import Completion, Reply, Score, Stream
from llmkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

    from llmkit.llm.adapters import AdapterArgument
    from llmkit.text.chat import ChatTemplate

logger = logging.getLogger(__name__)

Prompt = str | Seq[int]
Message = Mapping[str, Any]
AdapterChoice = str | EllipsisType | None

MAX_TOKENS = 1024  # of a reply where neither the caller nor generation_config.json says; less where the context ends before
BATCH_TOKENS = 8192  # room of the KV cache where the context is shorter
PREFILL_CHUNK = 512  # tokens of a prompt that pass through the model in one step

SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams))


# What generation_config.json may say about sampling, by our names.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}


@naming_extras()
def load(
    model: str | Path | ModelSource,
    *,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    ctx_size: int | None = None,
    cache_tokens: int | None = None,
    threads: int | None = None,
    kv_bits: int | None = None,
    chat_template: str | Path | None = None,
    draft_model: str | Path | ModelSource | LLM | None = None,
    speculate: str = "auto",
    adapter: AdapterArgument | None = None,
    any_base: bool = False,
) -> LLM:
    """Load a model, ready to generate.

    model: a folder, a hub id or HUB_ID@REVISION (the Hugging Face cache is used in place), or an opened source.
    dtype: float32, float16 or bfloat16, of the weights; as they are stored by default. On a CPU arithmetic is float32 in any case, and
        quantized weights have no other dtype: there it is an error.
    device: cpu, cuda, cuda:N or mps; by default cuda or mps where there is one.
    ctx_size: the longest prompt plus reply in tokens; the model's own maximum by default, at most `cache_tokens`.
    cache_tokens: for how many tokens the KV cache has room, those of all requests together and of earlier ones that are kept for their
        prefixes; by default one context, or 8192 where that is shorter, within a quarter of the free memory. Memory is taken as it
        fills. A draft model has a cache of its own.
    threads: CPU threads of this process; LLMKIT_THREADS or the physical cores by default, within a container's CPU quota.
    kv_bits: 32, 16 or 8 bits for a number in the KV cache (8: with a scale per position and head); by default 32 for float32 weights,
        else 16. In PyTorch it is what the device computes in, and any other is an error.
    chat_template: a Jinja template, or a file that holds one, in place of the model's own.
    draft_model: a smaller model with the same vocabulary that drafts tokens; loaded, or to be loaded in the same way.
    speculate: "ngram" drafts what followed earlier in the text, "off" nothing; "auto" is "ngram" on the native step, else
        "off". Draft tokens are checked: on the native step replies stay the same, in PyTorch they follow the same distribution.
    adapter: a PEFT adapter (a folder or a hub id), several, or several by names of your own; requests choose among them by name, and
        the first is what a request has that does not choose. A draft model has none.
    any_base: load an adapter even where it is proven to have been trained on another model of the same shape.

    Raises LLMKitError (see llmkit.errors) for everything that is wrong with the model or an argument.
    """
    source = ModelSource.open(model, revision)
    tokenizer = source.tokenizer
    template = None if chat_template is None else read_template(chat_template, tokenizer)
    context = _context_size(source.config, ctx_size, cache_tokens)
    draft = None if draft_model is None else draft_model.source if isinstance(draft_model, LLM) else ModelSource.open(draft_model)
    check_speculation(speculate, source, draft)
    options = Options.checked(dtype, device, threads, kv_bits)
    adapters = []
    if adapter is not None or any_base:
        from llmkit.llm.adapters import load_adapters

        own = tokenizer.chat_template if template is None and tokenizer is not None else template
        adapters = load_adapters(adapter, source, own, any_base=any_base)
    runner = prepare(source, options, adapters)
    guesser = draft_model.runner if isinstance(draft_model, LLM) else None if draft is None else prepare(draft, options.for_draft(draft))
    for problem in dict.fromkeys(one.problem for one in (runner, guesser) if one is not None and one.problem is not None):
        logger.warning("PyTorch runs the model, not the faster native kernels: %s.", problem)
    return LLM(
        source,
        runner,
        ctx_size=context,
        cache_tokens=cache_tokens,
        drafter=_drafter(guesser, speculate, source.config, context, exact=runner.exact),
        adapters={one.name: one.folder for one in adapters},
        chat_template=template,
    )


def embedded_model() -> Path:
    """The folder of the story teller that ships inside the package."""
    folder = Path(__file__).parent.parent / "stories"
    if not (folder / "config.json").is_file():
        raise LLMKitError(f"the embedded model is missing from {folder}. Reinstall llmkit, or name a MODEL.")
    return folder


def sampling_defaults(source: ModelSource) -> dict[str, Any]:
    """The sampling arguments in generation_config.json; `do_sample: false` means greedy, whatever else it says.

    Raises CheckpointError for a value that no request may have.
    """
    given = source.generation_config
    defaults = {ours: given[theirs] for theirs, ours in SAMPLING.items() if given.get(theirs) is not None}
    if given.get("do_sample") is False:
        defaults["temperature"] = 0.0
        for name in ("top_k", "top_p", "min_p"):
            defaults.pop(name, None)
    try:
        SamplingParams(**defaults)
    except UsageError as error:  # nobody typed it: it stands in a file
        raise CheckpointError(f"{source.folder} has a value in generation_config.json or config.json that cannot be: {error}") from error
    return defaults


def read_template(template: str | Path, tokenizer: Tokenizer | None) -> ChatTemplate:
    """A chat template from its own Jinja source, by its name in the tokenizer's files ("tool_use"), or from a file."""
    if tokenizer is None:
        raise UsageError("a chat template needs a tokenizer, and this model has none. Add a tokenizer.json to its folder.")
    source = str(template)
    named = {} if tokenizer.chat_template is None else tokenizer.chat_template.sources
    if source in named:
        source = named[source]
    elif "{" not in source:
        try:
            source = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            names = f" or one of {', '.join(named)}" if named else ""
            raise TemplateError(f"chat template {source} cannot be read ({error}). Give a file with a Jinja template{names}.") from error
    from llmkit.text.chat import ChatTemplate

    return ChatTemplate(source, tokenizer.special_tokens)


class LLM:
    """A loaded model. Made by `load`. Threads may share it: their requests run as one batch.

    Where a method takes sampling arguments, these are the fields of `SamplingParams` by name (temperature, top_k, top_p, min_p,
    max_tokens, stop, seed, ...); those left out come from `defaults`, the model's generation_config.json.
    `adapter` is the name of one in `adapters`, None for the model without; left out (...) it is the first.
    """

    def __init__(
        self,
        source: ModelSource,
        runner: Runner,
        *,
        ctx_size: int,
        cache_tokens: int | None = None,
        drafter: Drafter | None = None,
        adapters: Mapping[str, Path] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.source = source
        self.name = source.name
        self.config = source.config
        self.defaults = sampling_defaults(source)
        self.eos_ids, self.bos_id = source.special_ids
        self.adapter_folders = dict(adapters or {})
        self.adapters = tuple(self.adapter_folders)
        self._chat_template = chat_template
        self.ctx_size = ctx_size
        self.cache_tokens = cache_tokens
        self.runner = runner
        self.new_backend = runner.new_backend  # the same weights with an empty cache of its own
        self.backend = self.new_backend()
        tokens = _cache_tokens(self.backend, ctx_size, cache_tokens)
        speculation = None if drafter is None else Speculation(drafter)
        self._engine = Engine(self.backend, max_cache_tokens=tokens, prefill_chunk=PREFILL_CHUNK, speculation=speculation)

    def __repr__(self) -> str:
        what = f"{self.config.model_type}, {_human(self.runner.parameters)} parameters, {self.runner.stored}"
        adapters = f", adapters {', '.join(self.adapters)}" if self.adapters else ""
        return f"<LLM {self.name}: {what}, {self.backend.path}, context {self.ctx_size}{adapters}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """`.encode(text) -> list[int]`, `.decode(ids) -> str`; TokenizerError for a model without a tokenizer."""
        if self.source.tokenizer is None:
            raise TokenizerError(
                f"{self.name} has no tokenizer, so it cannot read or write text. Give it token ids, or add a tokenizer.json to its folder."
            )
        return self.source.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The template that turns messages into a prompt; TemplateError for a model without one."""
        tokenizer = self.source.tokenizer
        found = tokenizer.chat_template if self._chat_template is None and tokenizer is not None else self._chat_template
        if found is None:
            raise TemplateError(
                f"{self.name} has no chat template, so it was probably not trained to chat. "
                "Give one with chat_template (--chat-template FILE), or let it continue a text with generate."
            )
        return found

    # --- generating -----------------------------------------------------------------------------------------------

    def params(self, **sampling: Any) -> SamplingParams:
        """The sampling parameters of a request: the model's defaults with these arguments over them (None leaves the default)."""
        for name in sampling:
            if name not in SAMPLING_NAMES:
                near = get_close_matches(name, SAMPLING_NAMES, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(SAMPLING_NAMES)}."
                raise UsageError(f"{name!r} is not a sampling argument. {hint}")
        given = {name: value for name, value in sampling.items() if value is not None}
        return SamplingParams(**{**self.defaults, **given})

    def _request(self, sampling: Mapping[str, Any]) -> SamplingParams:
        """`params`, but without a max_tokens that nobody asked for: a usual length gives way where the context ends before."""
        params = self.params(**sampling)
        return params if sampling.get("max_tokens") is not None else replace(params, max_tokens=None)

    def adapter_name(self, adapter: AdapterChoice) -> str | None:
        """The adapter of a request: the name it gives, None for the model without, the first of all where it gives nothing (...)."""
        if adapter is ...:
            return next(iter(self.adapters), None)
        if adapter is None or adapter in self.adapters:
            return adapter
        from llmkit.llm.adapters import unknown_adapter

        raise unknown_adapter(adapter, self.adapters)

    @overload
    def generate(self, prompt: str, *, adapter: AdapterChoice = ..., **sampling: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Seq[int] | Seq[str] | Seq[Seq[int]], *, adapter: AdapterChoice | Seq[str | None] = ..., **sampling: Any
    ) -> Any: ...
    def generate(self, prompt: Prompt | Seq[Prompt], *, adapter: AdapterChoice | Seq[str | None] = ..., **sampling: Any) -> Any:
        """Continue a prompt.

        prompt: text (an empty one starts from BOS), token ids, or a list of prompts, which run as one batch.
        adapter: for a list of prompts also a list, one for each.
        Returns a Completion; a list of them for a list of prompts; with n > 1 a list of n in place of each.
        Raises UsageError for a bad argument, ContextOverflow where a prompt and its reply do not fit.
        """
        params = self._request(sampling)
        several = _are_prompts(prompt)
        prompts: list[Any] = list(prompt) if several else [prompt]
        results = self._run([self._encode(one) for one in prompts], params, self._adapters_of(adapter, prompts, several), continues=True)
        return results if several else results[0]

    def stream(self, prompt: Prompt, *, adapter: AdapterChoice = ..., **sampling: Any) -> Stream:
        """Continue a prompt piece by piece: iterate over the chunks, `print(chunk, end="", flush=True)`.

        Leaving the loop, `close()` or Ctrl-C stops the sequence; `stream.completion` keeps what was generated.
        """
        return self._stream(self._encode(prompt), self._request(sampling), self.adapter_name(adapter), continues=True)

    @overload
    def chat(self, messages: str | Seq[Message], *, stream: Literal[True], **rest: Any) -> Stream: ...
    @overload
    def chat(self, messages: str | Seq[Message], *, stream: Literal[False] = ..., **rest: Any) -> Completion: ...
    def chat(
        self,
        messages: str | Seq[Message],
        *,
        stream: bool = False,
        tools: Seq[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        adapter: AdapterChoice = ...,
        **sampling: Any,
    ) -> Any:
        """The assistant's next message.

        messages: `[{"role": "user", "content": "..."}, ...]`, or the text of one user message.
        tools: JSON-schema function descriptions for the template. template_kwargs: its other variables (enable_thinking, ...).
        The part of the prompt that earlier turns share is not computed again (`usage.cached_tokens`).
        """
        ids = self.encode_chat(messages, tools=tools, **(template_kwargs or {}))
        params, name = self._request(sampling), self.adapter_name(adapter)
        return self._stream(ids, params, name, continues=False) if stream else self._run([ids], params, [name], continues=False)[0]

    def encode_chat(
        self, messages: str | Seq[Message], *, tools: Seq[Mapping[str, Any]] | None = None, **template_kwargs: Any
    ) -> list[int]:
        """The prompt that asks for the assistant's next message, as token ids."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        rendered = self.chat_template.render(messages, tools, True, **template_kwargs)
        return self.tokenizer.encode(rendered, bos=False, special=True)  # the template writes its own BOS

    # --- scoring --------------------------------------------------------------------------------------------------

    def logits(self, prompt: Prompt, *, adapter: AdapterChoice = ...) -> np.ndarray:
        """The logits after every token of a prompt: float32 `[seq, vocab_size]`."""
        return np.concatenate([logits for _, logits in self._forward(self._encode(prompt), self.adapter_name(adapter))])

    def score(self, prompt: Prompt, *, adapter: AdapterChoice = ...) -> Score:
        """Log-likelihood, perplexity and bits per byte of a text (or ids), each token given those before it."""
        ids = self._encode(prompt)
        logprobs: list[float] = []
        targets = np.asarray(ids[1:])  # the very last token predicts none of them
        for positions, logits in self._forward(ids, self.adapter_name(adapter), len(targets)):
            logprobs += log_softmax(logits)[np.arange(len(positions)), targets[positions]].tolist()
        return Score(tuple(ids), tuple(logprobs), self._scored_bytes(prompt, ids))

    def _scored_bytes(self, prompt: Prompt, ids: list[int]) -> int | None:
        tokenizer = self.source.tokenizer
        if tokenizer is None:
            return None
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        unscored = "" if ids[0] == self.bos_id else tokenizer.decode(ids[:1])
        return len(text.encode()) - len(unscored.encode())

    def _forward(self, ids: list[int], adapter: str | None, count: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions and logits of the first `count` tokens (all), PREFILL_CHUNK of them at a time, in a cache of their own."""
        if self.config.learned_positions and len(ids) > self.config.max_position_embeddings:
            raise ContextOverflow(
                f"the text has {len(ids)} tokens and the model has learned {self.config.max_position_embeddings} positions. "
                "Shorten the text."
            )
        wanted = [np.arange(len(ids) if count is None else count)]
        for _, positions, logits in forward_all(self.new_backend(), [ids], wanted=wanted, adapters=[adapter], step_tokens=PREFILL_CHUNK):
            yield positions, logits

    # --- inside ---------------------------------------------------------------------------------------------------

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        if not ids:
            if self.bos_id is None:
                raise UsageError("the prompt is empty and this model has no BOS token to start from. Give at least one token.")
            ids = [self.bos_id]
        self.check_ids(ids)
        return ids

    def check_ids(self, ids: Iterable[int]) -> None:
        """UsageError for a token id that the model has no embedding of: one typed, or of a tokenizer with more tokens than the model."""
        wrong = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}. Use the tokenizer that belongs to this model."
            )

    def _adapters_of(self, adapter: AdapterChoice | Seq[str | None], prompts: Seq[Any], several: bool) -> list[str | None]:
        if adapter is None or adapter is ... or isinstance(adapter, str):
            return [self.adapter_name(adapter)] * len(prompts)
        if not several or len(adapter) != len(prompts):
            raise UsageError(f"there are {len(adapter)} adapters for {len(prompts)} prompts. Give one, or a list with one for each prompt.")
        return [self.adapter_name(one) for one in adapter]

    def _run(self, prompts: list[list[int]], params: SamplingParams, adapters: list[str | None], *, continues: bool) -> list[Any]:
        """Reply to all prompts in one batch: a Completion for each, or a list of n."""
        replies: list[list[Reply]] = []
        try:
            for ids, adapter in zip(prompts, adapters, strict=True):
                replies.append(self._add(ids, params, adapter, continues))
            waiting = [reply for samples in replies for reply in samples]
            with _progress(len(waiting)) as bar:
                while waiting:
                    for reply in waiting:
                        reply.advance(self._engine)
                    left = [reply for reply in waiting if reply.finish_reason is None]
                    bar.update(len(waiting) - len(left))
                    waiting = left
        finally:
            for samples in replies:
                for reply in samples:
                    self._engine.abort(reply.sequence)
        completions = [[reply.completion() for reply in samples] for samples in replies]
        return completions if params.n > 1 else [samples[0] for samples in completions]

    def _add(self, ids: list[int], params: SamplingParams, adapter: str | None, continues: bool) -> list[Reply]:
        """Queue `params.n` replies to a prompt, with a max_tokens that the context has room for."""
        room = self.ctx_size - len(ids)
        if params.stop:
            _ = self.tokenizer  # stop strings need text
        least = params.max_tokens or max(params.min_tokens, 1)
        if room < least:
            remedies = ["shorten the prompt"] + ["lower max_tokens"] * (least > 1)
            bound = "cache_tokens" if self.cache_tokens == self.ctx_size else "ctx_size"
            remedies += [f"take a larger {bound}"] * (self.ctx_size < self.config.max_position_embeddings)
            raise ContextOverflow(
                f"the prompt has {len(ids)} tokens and the reply may have {least}, "
                f"more than the context of {self.ctx_size}. {' or '.join(remedies).capitalize()}."
            )
        if params.max_tokens is None:
            usual = self.defaults.get("max_tokens", MAX_TOKENS)
            params = replace(params, max_tokens=max(params.min_tokens, min(usual, room)))
        sequences = self._engine.add_samples(ids, params, adapter, eos_ids=self.eos_ids)
        return [Reply(sequence, self.source.tokenizer, continues=continues) for sequence in sequences]

    def _stream(self, ids: list[int], params: SamplingParams, adapter: str | None, *, continues: bool) -> Stream:
        if params.n != 1:
            raise UsageError(f"a stream carries one reply, not n={params.n}. Use generate for several.")
        return Stream(self._engine, *self._add(ids, params, adapter, continues))


def _are_prompts(prompt: Any) -> bool:
    """Whether this is a list of prompts, not one: its elements are texts or have elements themselves."""
    if isinstance(prompt, str | bytes):
        return False
    if not isinstance(prompt, Seq):
        return np.ndim(prompt) > 1  # an array or a tensor
    return not prompt or isinstance(prompt[0], Seq) or np.ndim(prompt[0]) > 0


def _token_ids(prompt: Any) -> list[int]:
    """The ids of a list, a numpy array or a torch tensor."""
    try:
        ids = np.asarray(prompt)
    except (TypeError, ValueError):  # a ragged list; a tensor on another device
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UsageError(f"the prompt is {reprlib.repr(prompt)}; it must be text or a flat list of token ids.")
    return [int(token) for token in ids]


def _context_size(config: ModelConfig, ctx_size: int | None, cache_tokens: int | None) -> int:
    limit = config.max_position_embeddings
    if cache_tokens is not None and (type(cache_tokens) is not int or cache_tokens < 2):
        raise UsageError(f"cache_tokens is {cache_tokens!r}; it must be an integer of 2 or more, for a prompt and its reply.")
    if ctx_size is None:
        return limit if cache_tokens is None else min(limit, cache_tokens)
    if type(ctx_size) is not int or not 1 <= ctx_size <= limit:
        raise UsageError(f"ctx_size {ctx_size!r} is no integer from 1 to {limit}, the model's own context. Choose one of them.")
    if cache_tokens is not None and cache_tokens < ctx_size:
        raise UsageError(f"ctx_size {ctx_size} does not fit in cache_tokens {cache_tokens}. Raise cache_tokens or lower ctx_size.")
    return ctx_size


def _drafter(guesser: Runner | None, speculate: str, config: ModelConfig, ctx_size: int, *, exact: bool) -> Drafter | None:
    """What drafts tokens. exact: the backend's logits of a token are the same bits however many are computed at once."""
    if guesser is not None:
        backend = guesser.new_backend()
        tokens = _cache_tokens(backend, min(ctx_size, backend.config.max_position_embeddings))
        return ModelDrafter(backend, config.vocab_size, max_cache_tokens=tokens, prefill_chunk=PREFILL_CHUNK)
    return NgramDrafter() if speculate == "ngram" or (speculate == "auto" and exact) else None


def _human(count: int) -> str:
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)


def _cache_tokens(backend: Backend, ctx_size: int, wanted: int | None = None) -> int:
    """How many tokens the KV cache may hold: `wanted`, or one whole context or BATCH_TOKENS, within a quarter of free memory."""
    import psutil

    free = psutil.virtual_memory().available
    if wanted is not None:
        most = tokens_within(backend, free, PREFILL_CHUNK)
        if wanted > most:
            raise DoesNotFit(f"cache_tokens {wanted} does not fit in the {free / 1e9:.1f} GB of free memory. Take {most} or fewer.")
        return wanted + backend.block_size
    within = tokens_within(backend, free // 4, PREFILL_CHUNK)
    return max(backend.block_size, min(within, max(ctx_size + backend.block_size, BATCH_TOKENS)))


@contextmanager
def _progress(total: int) -> Iterator[tqdm]:
    """A bar over many prompts, on a terminal or in a notebook, and only if they take longer than two seconds."""
    from tqdm.auto import tqdm

    notebook = "ipykernel" in sys.modules
    with tqdm(total=total, unit="reply", delay=2, leave=False, disable=total < 2 or not (notebook or sys.stderr.isatty())) as bar:
        yield bar
