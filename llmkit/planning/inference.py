"""How much memory a run will take, term by term, before anything is loaded; and what to change where it does not fit. No torch.

Weights are exact to the byte. The rest follows from shapes by the formulas below, with the constants of `Constants`, which were
measured; tests hold the sums to what processes really took. Sizes are those of the peak: what is not there at that moment is not counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmkit.config import AttentionConfig, ModelConfig, State
from llmkit.planning.model_info import Facts, kv_positions, storage_bytes, widths
from llmkit.quant.schemes import NF4, Choice

Terms = dict[str, int]  # what takes memory -> bytes at the peak


@dataclass(frozen=True)
class Constants:
    """All that was measured rather than derived (Linux, x86-64, torch 2.13, Python 3.11), in bytes unless said otherwise."""

    native_process: int = 55_000_000  # Python, numpy, the tokenizer's library, native kernels
    torch_process: int = 258_000_000  # and torch
    training_process: int = 445_000_000  # and optimizers, which import torch's compiler, and what the first steps leave
    adapter_process: int = 125_000_000  # PEFT, on top of it
    cuda_context: int = 600_000_000  # on the GPU: driver, kernels, the libraries' workspaces
    tokenizer: float = 10.0  # bytes for each of tokenizer.json
    data: float = 2.0  # bytes for each of the data files
    holes: float = 0.45  # of activations on a CPU in PyTorch: what the C library keeps between them
    fewer_holes: float = 0.15  # with checkpointing, where it keeps smaller pieces only
    kept_piece: int = 32 << 20  # the largest piece that the C library keeps when it is freed (compat.py: keep_freed_memory)
    kept_piece_checkpointing: int = 2 << 20
    huge_page: int = 2 << 20  # of which arrays of numpy lie in where they are large
    huge_array: int = 4 << 20
    nf4_work: int = 30_000_000  # of a dequantization, beside the matrix
    logit_copies: int = 4  # float32 copies of a chunk of logits: they, their log-softmax, and both gradients
    logit_elements: int = 1 << 24  # of a chunk of logits (training/objective.py)
    logit_tile: int = 1 << 22  # of some columns of all rows, on a CPU
    logit_columns: int = 1 << 10  # at least
    step_tokens: int = 512  # prompt tokens in one step
    block: int = 16  # positions of a block of the KV cache
    scores: int = 1 << 24  # attention scores that are materialised at a time (soft caps)


CONSTANTS = Constants()


@dataclass(frozen=True)
class Run:
    """How a model is to be run."""

    positions: int  # of one sequence: prompt and reply
    sequences: int = 1
    device: str = "cpu"
    native: bool = True  # on a CPU: the native kernels, else PyTorch
    dtype: str | None = None  # None: as stored
    kv_bits: int | None = None  # None: the backend's choice

    @property
    def on_cpu(self) -> bool:
        return self.device.startswith("cpu")


def inference(facts: Facts, run: Run, constants: Constants = CONSTANTS) -> Terms:
    """Loading a model and generating with it until every sequence is full."""
    positions = -(-run.positions // constants.block) * constants.block
    step = min(constants.step_tokens, run.positions)
    terms = {"process": _process(facts, run, constants)}
    terms |= _weights(facts, run)
    if run.on_cpu and run.native:
        bits = run.kv_bits or (16 if facts.quantized or (run.dtype or facts.config.dtype) != "float32" else 32)
    else:
        bits = 32 if run.on_cpu else 8 * _itemsize(run.dtype or facts.config.dtype)
    states = [state for states in facts.config.states for state in states]
    terms["KV cache"] = run.sequences * sum(
        kv_positions(state, positions, step) * _kv_bytes(state, bits, padded=run.on_cpu and run.native)
        for state in states
        if state.kind == "kv"
    )
    terms["states"] = run.sequences * sum(4 * state.numbers for state in states if state.kind != "kv")
    terms["step buffers"] = _step_buffers(facts, run, step, constants)
    terms["logits"] = 3 * run.sequences * 4 * facts.config.vocab_size
    return without_zeros(terms)


def _process(facts: Facts, run: Run, constants: Constants) -> int:
    if not run.on_cpu:
        return constants.cuda_context
    own = constants.native_process if run.native else constants.torch_process
    return own + int(constants.tokenizer * facts.tokenizer_bytes)


def _weights(facts: Facts, run: Run) -> Terms:
    """On a CPU they are the mapped file, unless another dtype is asked for; a file that is converted is read whole meanwhile."""
    if not run.on_cpu:
        return {"weights": facts.bytes_as(run.dtype or facts.config.dtype)}
    wanted = None if run.dtype is None else {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[run.dtype]
    if wanted is None or all(storage == wanted for storage in facts.storage.values()):
        return {"weights": facts.stored_bytes, "repacked weights": facts.copied_bytes}
    assert run.dtype is not None
    return {"weights": facts.bytes_as(run.dtype), "the file while it is converted": facts.stored_bytes}


def _kv_bytes(state: State, bits: int, *, padded: bool) -> int:
    """Bytes of a position in a layer. The native cache pads values to 16 numbers, and 8 bits have a float32 scale for each head."""
    _, heads, dim = state.shape
    values = -(-dim // 16) * 16 if padded else dim
    return heads * ((dim + values) * bits // 8 + (8 if bits == 8 else 0))


def _step_buffers(facts: Facts, run: Run, step: int, constants: Constants) -> int:
    """What a step of a prompt computes in; see `Run::prepare` in kernels/cpu/step.cpp and `model/layers.py`."""
    config, tokens = facts.config, step * max(1, min(run.sequences, constants.step_tokens // step))
    mixers = [widths(layer.mixer, config) for layer in config.layers]
    inner = inner_size(config)
    numbers = 3 * config.hidden_size + max(sum(mixer.values()) for mixer in mixers) + 2 * inner
    if run.on_cpu and run.native:
        widest = max(config.hidden_size, inner, *(max(mixer.values()) for mixer in mixers))
        return tokens * (4 * numbers + 2 * widest)
    size = 4 if run.on_cpu else _itemsize(run.dtype or config.dtype)
    buffers = size * tokens * (numbers + inner)
    if heads := capped_heads(config):
        buffers += 3 * size * min(constants.scores, heads * tokens * run.positions)
    return buffers + (_widened(facts, constants) if run.on_cpu or facts.quantized else 0)


def _widened(facts: Facts, constants: Constants) -> int:
    """The largest matrix as float32, where it is stored otherwise: PyTorch multiplies with that."""
    most = 0
    for name, storage in facts.storage.items():
        if storage == "F32" or name not in facts.linears:
            continue
        work = constants.nf4_work if isinstance(storage, Choice) else 0
        most = max(most, 4 * math.prod(facts.shapes[name]) + work)
    return most


def inner_size(config: ModelConfig) -> int:
    """Numbers inside the widest feed-forward (of one expert), for each token."""
    return max(max(widths(layer.feed_forward, config).values()) for layer in config.layers)


def capped_heads(config: ModelConfig) -> int:
    """Query heads of the layers whose scores have a soft cap, which PyTorch materializes; 0: there are none."""
    mixers = [layer.mixer for layer in config.layers]
    return max((mixer.num_heads for mixer in mixers if isinstance(mixer, AttentionConfig) and mixer.softcap is not None), default=0)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def quantizing(facts: Facts, scheme: str, constants: Constants = CONSTANTS) -> Terms:
    """`llmkit quantize`: matrix by matrix, so what counts is the largest as it is stored, and what some rows of it are computed in."""
    largest = max(facts.shapes, key=lambda name: math.prod(facts.shapes[name]))
    terms = {"process": constants.torch_process, "largest matrix": storage_bytes(facts.storage[largest], facts.shapes[largest])}
    if scheme == NF4:
        terms["process"] += constants.adapter_process  # bitsandbytes weighs as much as PEFT
        return terms | {"work": quantizing_work(facts), "codes": max(map(math.prod, facts.linears.values())) // 2}
    return terms | {"work": 10 * (1 << 21)}


def quantizing_work(facts: Facts) -> int:
    """What some rows of a linear take on their way to NF4."""
    return 24 * min(1 << 22, max(map(math.prod, facts.linears.values())))


def without_zeros(terms: Mapping[str, int]) -> Terms:
    return {name: size for name, size in terms.items() if size}


@dataclass(frozen=True)
class Change:
    """Something else that would fit."""

    say: tuple[str, ...]  # key=value of a recipe, or options of a command
    total: int

    @property
    def text(self) -> str:
        first, *rest = self.say
        return f"{first}, then {' '.join(rest)}," if first.startswith("llmkit") and rest else " ".join(self.say)


def cheaper_run(facts: Facts, run: Run, available: int) -> Change | None:
    """The change of an inference run that costs least and fits: a cache of 8 bits, the model in 8 or 4 bits, then a shorter context."""
    lengths = [size for n in range(20) if (size := run.positions >> n) >= min(run.positions, 256)]
    kinds: Sequence[tuple[str | None, Facts]] = [(None, facts)]
    if not facts.quantized:
        kinds = [*kinds, ("q8", facts.quantized_as("q8")), ("q4", facts.quantized_as("q4"))]
    caches = [run.kv_bits, 8] if run.on_cpu and run.native and run.kv_bits != 8 else [run.kv_bits]
    options = []
    for (k, (scheme, kind)), (b, bits), (cut, size) in itertools.product(enumerate(kinds), enumerate(caches), enumerate(lengths)):
        options.append((b + 2 * k + 3 * cut, scheme, kind, bits, size))
    for _, scheme, kind, bits, size in sorted(options, key=lambda option: option[0]):
        dtype = run.dtype if scheme is None else None
        total = sum(inference(kind, replace(run, positions=size, kv_bits=bits, dtype=dtype)).values())
        if total <= available:
            words = []
            if scheme is not None:
                words.append(f"llmkit quantize {facts.name} -o FOLDER --scheme {scheme}")
            if bits != run.kv_bits:
                words.append(f"--kv-bits {bits}")
            if size != run.positions:
                words.append(f"--ctx-size {size}")
            return Change(tuple(words), total)
    return None
