"""llama.cpp in a benchmark: the C functions that llama-cpp-python binds, on a GGUF file written from the same weights."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from llmkit.errors import LLMKitError, TokenizerError

BATCH = 512  # tokens in one call: n_batch and n_ubatch, as in our own prefill
FLASH_ATTENTION = {"on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR
# Made by llama.cpp's own tool from the f16 file, with the types that it chooses for each tensor; the others we write ourselves.
QUANTIZED = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def _print_errors(level: int, text: bytes, _: Any) -> None:
    """Errors only: what llama.cpp says of every graph that it plans would take time."""
    if level == LOG_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


_log = llama_cpp.llama_log_callback(_print_errors)  # kept: C holds no reference to it


class LlamaCppDecoding:
    """See `llmkit.bench.worker.DecodingModel`. Variants: flash attention "on" and "off". The KV cache is float16."""

    def __init__(self, file: str | Path, threads: int) -> None:
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()  # mapped, and repacked where llama.cpp has a kernel for it
        parameters.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(file), parameters)
        if not model:
            raise LLMKitError(f"llama.cpp cannot load {file}. Write the file again: remove it, or leave out --rival-files.")
        self.model = model
        self.threads = threads
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = TokenBatch(BATCH)
        self._contexts: dict[str, Context] = {}  # by variant, of one size

    def prefill(self, ids: list[int], room: int, variant: str) -> float:
        context = self._context(1, room, variant)
        context.forget()
        start = time.perf_counter()
        context.read([ids], 0)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], count: int, room: int, variant: str) -> float:
        context = self._context(len(prompts), room, variant)
        tokens, length = context.resume(prompts), len(prompts[0])
        start = time.perf_counter()
        for position in range(length, length + count):
            tokens = context.step(tokens, position)
        return time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        name = ctypes.create_string_buffer(200)
        llama_cpp.llama_model_desc(self.model, name, len(name))
        info = llama_cpp.llama_print_system_info().decode().split("|")
        on = [part.split("=")[0].split(":")[-1].strip() for part in info if part.strip().endswith("= 1")]
        size, count = llama_cpp.llama_model_size(self.model), llama_cpp.llama_model_n_params(self.model)
        return {
            "variants": list(FLASH_ATTENTION),
            "version": version("llama-cpp-python"),
            "dtype": name.value.decode(),
            "bits_per_weight": 8 * size / count,
            "flags": f"{' '.join(on)}, {self.threads} threads, float16 cache, n_ubatch {BATCH}",
        }

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits after every token: float32 `[len(ids), vocab]`, for tests."""
        context = self._context(1, len(ids), "off")
        context.forget()
        return np.concatenate([context.step([token], position, logits=True) for position, token in enumerate(ids)])

    def _context(self, sequences: int, room: int, variant: str) -> Context:
        """The context for requests of this shape. Those of other shapes are given up: they would count as memory of this one."""
        variant = variant or next(iter(FLASH_ATTENTION))
        shape = (sequences, room)
        for key in [key for key, context in self._contexts.items() if context.shape != shape]:
            self._contexts.pop(key).close()
        if variant not in self._contexts:
            self._contexts[variant] = Context(self, shape, variant)
        return self._contexts[variant]


class Context:
    """A KV cache of `shape` (sequences, tokens of each), and what is in it."""

    def __init__(self, model: LlamaCppDecoding, shape: tuple[int, int], variant: str) -> None:
        self.shape = shape
        self._vocab_size, self._batch = model.vocab_size, model._batch
        sequences, room = shape
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sequences * -(-room // 256) * 256  # each sequence has a multiple of 256 in any case
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = model.threads
        parameters.flash_attn_type = FLASH_ATTENTION[variant]
        self.handle = llama_cpp.llama_init_from_model(model.model, parameters)
        if not self.handle:
            raise LLMKitError(f"llama.cpp cannot make a context of {parameters.n_ctx} tokens. Take a smaller --depth or --batch.")
        self._memory = llama_cpp.llama_get_memory(self.handle)
        self._prompts: list[list[int]] = []

    def close(self) -> None:
        llama_cpp.llama_free(self.handle)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._prompts = []

    def read(self, prompts: list[list[int]], start: int) -> list[int]:
        """The most likely token after each prompt, of which the tokens before `start` are in the cache. Only last tokens give logits."""
        length = len(prompts[0])
        flat = [(ids[place], place, sequence) for sequence, ids in enumerate(prompts) for place in range(start, length)]
        found: list[int] = []
        for begin in range(0, len(flat), BATCH):
            tokens, positions, sequences = zip(*flat[begin : begin + BATCH], strict=True)
            last = [position == length - 1 for position in positions]
            self._run(tokens, positions, sequences, last)
            found += self._greedy(sum(last))
        return found

    def resume(self, prompts: list[list[int]]) -> list[int]:
        """As `read` of everything; of prompts that the run before had, only the last token is computed again."""
        start = len(prompts[0]) - 1
        if prompts != self._prompts or not all(
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1) for sequence in range(len(prompts))
        ):
            self.forget()
            start = 0
        self._prompts = prompts
        return self.read(prompts, start)

    def step(self, tokens: list[int], position: int, *, logits: bool = False) -> Any:
        """One token more of every sequence, all at one position; the most likely next tokens, or the logits."""
        count = len(tokens)
        self._run(tokens, position, range(count), True)
        return self._logits(count).copy() if logits else self._greedy(count)

    def _run(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        code = llama_cpp.llama_decode(self.handle, self._batch.fill(tokens, positions, sequences, wanted))
        if code != 0:
            raise LLMKitError(f"llama_decode failed with code {code}. Take a smaller --depth or --batch.")

    def _greedy(self, rows: int) -> list[int]:
        return self._logits(rows).argmax(axis=1).tolist() if rows else []

    def _logits(self, rows: int) -> np.ndarray:
        """Those that the last call gave, float32 `[rows, vocab]`; valid until the next one."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.handle), (rows, self._vocab_size))


class TokenBatch:
    """A llama_batch over arrays: token, position, sequence and whether its logits are wanted, of up to `size` tokens."""

    def __init__(self, size: int) -> None:
        self._token, self._position, self._sequence = (np.zeros(size, np.int32) for _ in range(3))
        self._one, self._wanted = np.ones(size, np.int32), np.zeros(size, np.int8)
        # Every token names its sequences through a pointer to a list, here of one.
        self._lists = (self._sequence.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        number = ctypes.POINTER(ctypes.c_int32)
        self._batch = llama_cpp.llama_batch(
            token=self._token.ctypes.data_as(number),
            pos=self._position.ctypes.data_as(number),
            n_seq_id=self._one.ctypes.data_as(number),
            seq_id=self._lists.ctypes.data_as(ctypes.POINTER(number)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> llama_cpp.llama_batch:
        count = len(tokens)
        self._batch.n_tokens = count
        self._token[:count], self._position[:count], self._sequence[:count] = tokens, positions, sequences
        self._wanted[:count] = wanted
        return self._batch


def export(folder: Path, into: Path, kind: str) -> Path:
    """The model as a GGUF file of a type, in the folder `into`; one that was written from the same bytes is found again."""
    from llmkit.checkpoint.gguf.write import write_gguf

    into.mkdir(parents=True, exist_ok=True)
    target = into / f"{folder.resolve().name}-{_fingerprint(folder)}-{kind}.gguf"
    if target.exists():
        return target
    if kind in QUANTIZED:
        source = export(folder, into, "f16")
        llama_cpp.llama_log_set(_log, None)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = QUANTIZED[kind]
        partial = target.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(parameters)) != 0:
            partial.unlink(missing_ok=True)
            raise LLMKitError(f"llama.cpp cannot write {target}. Is there room on the disk?")
        partial.replace(target)
        return target
    try:
        write_gguf(folder, target, kind)
    except TokenizerError:  # one of a kind that llama.cpp does not read; only token ids are needed
        write_gguf(folder, target, kind, tokenizer=False)
    return target


def _fingerprint(folder: Path) -> str:
    """Of what a model's files hold."""
    digest = sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()[:8]
