"""The native step against PyTorch, and its promise: the bits of a row do not depend on what else is computed."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.checkpoint.load import load_model
from llmkit.engine.backend import Backend, StepBatch
from llmkit.engine.engine import Engine
from llmkit.engine.sampling import SamplingParams
from llmkit.errors import LLMKitError, UsageError
from llmkit.kernels import NativeBackend, native_problem, reference
from llmkit.kernels.backend import cpu_quota
from llmkit.kernels.format import QuantizedMatrix, Weight, pack
from llmkit.kernels.training_ops import TrainingKernels, dequantize
from llmkit.model.backend import TorchBackend
from llmkit.model.transformer import Transformer
from llmkit.quant.methods import round_to_nearest
from tests.families.tiny import VARIANTS, WINDOW, tiny_folder

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no native kernels: {native_problem()}")

DENSE = [name for name in VARIANTS if "mixtral" not in name and "moe" not in name]
BLOCK = NativeBackend.block_size


def kernels() -> list[str]:
    from llmkit.kernels.cpu import _native

    return _native.available()


def weights_of(model: Transformer) -> dict[str, Weight]:
    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()

    return {name: array(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=DENSE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_model(tiny_folder(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_model(tiny_folder(tmp_path_factory.mktemp("llama"), "llama"))


@dataclass
class Row:
    """A sequence on its way through a backend: which blocks are its own, and how far it has come."""

    ids: np.ndarray
    first_block: int
    done: int = 0

    def table(self, width: int) -> np.ndarray:
        return np.arange(self.first_block, self.first_block + width, dtype=np.int32)


def step(
    backend: Backend,
    rows: Sequence[Row],
    counts: Sequence[int],
    adapters: Sequence[str | None] | None = None,
    asked: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The next `counts[i]` tokens of each row in one step; logits of all of them per row, or in one piece of those that are asked for."""
    used = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
    width = -(-max(len(row.ids) for row in rows) // BLOCK)
    batch = StepBatch(
        np.concatenate([row.ids[row.done : row.done + count] for row, count in used]).astype(np.int32),
        np.concatenate([np.arange(row.done, row.done + count) for row, count in used]).astype(np.int32),
        np.repeat(np.arange(len(used)), [count for _, count in used]).astype(np.int32),
        [np.stack([row.table(width) for row, _ in used])] * len(backend.cache_windows),
        np.array([len(row.ids) for row, _ in used], np.int32),
        [None] * len(used) if adapters is None else [a for a, count in zip(adapters, counts, strict=True) if count],
        np.arange(sum(count for _, count in used), dtype=np.int32) if asked is None else asked.astype(np.int32),
    )
    out = backend.step(batch)
    if asked is not None:
        return [out]
    cut = np.cumsum([count for _, count in used])[:-1]
    parts = iter(np.split(out, cut))
    for row, count in used:
        row.done += count
    return [next(parts) if count else out[:0] for count in counts]


def logits(backend: Backend, ids: np.ndarray, chunks: Sequence[int] = (), first_block: int = 0) -> np.ndarray:
    row = Row(ids, first_block)
    return np.concatenate([step(backend, [row], [count])[0] for count in (chunks or [len(ids)])])


def random_ids(model: Transformer, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 90])
def test_logits_are_those_of_pytorch(model: Transformer, length: int) -> None:
    ids = random_ids(model, length)
    expected = logits(TorchBackend(model), ids)
    assert relative(logits(NativeBackend(model.config, weights_of(model)), ids), expected) < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_widened(tmp_path: Path, dtype: str) -> None:
    model = load_model(tiny_folder(tmp_path, "qwen2"), dtype=dtype)
    ids = random_ids(model, 40)
    assert relative(logits(NativeBackend(model.config, weights_of(model)), ids), logits(TorchBackend(model), ids)) < 2e-5


@pytest.mark.parametrize("kv_bits", [32, 16, 8])
def test_bits_do_not_depend_on_chunks_batch_or_threads(model: Transformer, kv_bits: int) -> None:
    weights, rng = weights_of(model), np.random.default_rng(5)
    lengths = [70, 33, 1, 52]
    texts = [random_ids(model, length, seed) for seed, length in enumerate(lengths)]
    alone = [logits(NativeBackend(model.config, weights, threads=1, kv_bits=kv_bits), ids) for ids in texts]
    for threads in (1, 2, 3):
        backend = NativeBackend(model.config, weights, threads=threads, kv_bits=kv_bits)
        rows = [Row(ids, 100 * index) for index, ids in enumerate(texts)]
        parts: list[list[np.ndarray]] = [[] for _ in rows]
        while any(row.done < len(row.ids) for row in rows):
            counts = [min(len(row.ids) - row.done, int(rng.choice([0, 1, 1, 2, 5, 17]))) for row in rows]
            if any(counts):
                for found, part in zip(parts, step(backend, rows, counts), strict=True):
                    found.append(part)
        for found, expected in zip(parts, alone, strict=True):
            np.testing.assert_array_equal(np.concatenate(found), expected)


def test_bits_do_not_depend_on_what_is_asked_for(model: Transformer) -> None:
    """Rows that nobody asks for end with the last layer's keys and values, which later steps see."""
    ids = random_ids(model, 60)
    for weights in (weights_of(model), weights_of(model) | quantized_weights(model)):
        backend, whole = NativeBackend(model.config, weights, threads=2), logits(NativeBackend(model.config, weights), ids)
        row = Row(ids, 10)
        for count, asked in ((20, []), (20, [19, 3, 3, 7]), (20, list(range(20)))):
            start = row.done
            (found,) = step(backend, [row], [count], asked=np.array(asked, int))
            np.testing.assert_array_equal(found, whole[start + np.array(asked, int)])


def test_long_contexts_are_split_over_threads_with_the_same_bits(llama: Transformer) -> None:
    weights, ids = weights_of(llama), random_ids(llama, 1300)
    whole = logits(NativeBackend(llama.config, weights, threads=1), ids)
    for threads in (2, 4):
        found = logits(NativeBackend(llama.config, weights, threads=threads), ids, [1200, *[1] * 40, 60])
        np.testing.assert_array_equal(found, whole)
    assert relative(whole, logits(TorchBackend(llama), ids)) < 2e-5


@pytest.mark.parametrize("name", ["avx512_vnni", "avxvnni", "avx2", "neon_i8mm", "neon_dotprod", "portable"])
def test_every_instruction_set_computes_the_same(llama: Transformer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in kernels():
        pytest.skip(f"this processor has no {name}")
    ids = random_ids(llama, 50)
    weights = weights_of(llama) | quantized_weights(llama, group=16)
    expected = logits(NativeBackend(llama.config, weights), ids)
    monkeypatch.setenv("LLMKIT_KERNELS", name)
    backend = NativeBackend(llama.config, weights)
    assert name in backend.path
    np.testing.assert_allclose(logits(backend, ids), expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("kv_bits", "tolerance"), [(16, 2e-3), (8, 5e-2)])
def test_narrow_caches_are_close(llama: Transformer, kv_bits: int, tolerance: float) -> None:
    weights, ids = weights_of(llama), random_ids(llama, 60)
    difference = relative(logits(NativeBackend(llama.config, weights, kv_bits=kv_bits), ids), logits(TorchBackend(llama), ids))
    assert 0 < difference < tolerance
    narrow, wide = (NativeBackend(llama.config, weights, kv_bits=bits).block_bytes(0) for bits in (kv_bits, 32))
    assert narrow < wide * kv_bits / 32 * 1.6  # scales, and heads of 8 padded to 16 lanes


def random_matrix(rng: np.random.Generator, shape: tuple[int, int], scheme: str, group: int) -> QuantizedMatrix:
    rows, columns = shape
    codes = rng.integers(0, 16, shape).astype(np.uint8) if scheme == "q4" else rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.integers(-127, 128, (rows, -(-columns // group))).astype(np.int8)
    return pack(codes, scales, rng.uniform(0.5, 1.5, rows).astype(np.float32) * 1e-4, scheme, group)


def quantized_weights(model: Transformer, scheme: str = "q4", group: int = 32) -> dict[str, Weight]:
    rng = np.random.default_rng(1)
    kept = "model.embed_positions.weight"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.dim() == 2 and name != kept}
    return {name: random_matrix(rng, (shape[0], shape[1]), scheme, group) for name, shape in shapes.items()}


def product(matrix: QuantizedMatrix, x: np.ndarray) -> np.ndarray:
    """`x W^T` by the definition of the format, in float64 but for what is rounded to int8."""
    columns = matrix.shape[1]
    weights = matrix.dequantize().astype(np.float64)
    padded = np.zeros((len(x), -(-columns // 32) * 32), np.float32)
    padded[:, :columns] = x
    groups = padded.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 1).astype(np.float64) / 127))
    rounded = np.rint(groups / scale) * scale
    return rounded.reshape(len(x), -1)[:, :columns] @ weights.T


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scheme=st.sampled_from([("q4", 32), ("q4", 16), ("q8", 32)]),
    hidden=st.integers(1, 150),
    vocab=st.integers(1, 70),
    tokens=st.integers(1, 20),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_quantized_heads_of_any_shape(
    llama: Transformer, scheme: tuple[str, int], hidden: int, vocab: int, tokens: int, threads: int, seed: int
) -> None:
    """A model without anything but embedding, norm and head: what the head gives is the product of the normed rows."""
    from dataclasses import replace

    rng = np.random.default_rng(seed)
    config = replace(llama.config, hidden_size=hidden, vocab_size=vocab, tie_word_embeddings=False, layers=llama.config.layers[:1])
    prefix = "model.layers.0."
    weights: dict[str, Weight] = {name: np.zeros(param.shape, np.float32) for name, param in config.parameters.items()}
    embedding = rng.normal(size=(vocab, hidden)).astype(np.float32)
    weights |= {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(hidden, np.float32),
        f"{prefix}input_layernorm.weight": np.ones(hidden, np.float32),
        f"{prefix}post_attention_layernorm.weight": np.ones(hidden, np.float32),
    }
    head = random_matrix(rng, (vocab, hidden), *scheme)
    ids = rng.integers(0, vocab, tokens)
    found = logits(NativeBackend(config, {**weights, "lm_head.weight": head}, threads=threads), ids)
    x = embedding[ids]
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + config.norm_eps)
    expected = product(head, normed.astype(np.float32))
    # a number that lies just between two integers may be rounded either way
    step_of_rounding = np.abs(head.dequantize()).max() * np.abs(normed).max() / 64
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max() + 2 * step_of_rounding
    assert np.mean(np.abs(found - expected) > 1e-5 * np.abs(expected).max()) < 0.1


@pytest.mark.parametrize(("scheme", "group"), [("q4", 32), ("q4", 16), ("q8", 32)])
def test_quantized_rows_are_bitwise_independent(llama: Transformer, scheme: str, group: int) -> None:
    weights = weights_of(llama) | quantized_weights(llama, scheme, group)
    ids = random_ids(llama, 60)
    whole = logits(NativeBackend(llama.config, weights, threads=1), ids)
    assert np.isfinite(whole).all()
    for threads, chunks in ((2, [1] * 60), (1, [7] * 8 + [4]), (3, [59, 1]), (2, [13, 6, 41])):
        np.testing.assert_array_equal(logits(NativeBackend(llama.config, weights, threads=threads), ids, chunks), whole)


def test_adapters_are_added_per_sequence(llama: Transformer, tmp_path: Path) -> None:
    weights, rng = weights_of(llama), np.random.default_rng(2)
    rank, linears, merged = 3, {}, dict(weights)
    for layer in range(llama.config.num_hidden_layers):
        for slot in ("q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"):
            name = f"model.layers.{layer}.{'mlp' if slot[0] in 'gd' else 'self_attn'}.{slot}.weight"
            weight = weights[name]
            assert isinstance(weight, np.ndarray)
            a, b = (rng.normal(size=s).astype(np.float32) * 0.2 for s in ((rank, weight.shape[1]), (weight.shape[0], rank)))
            linears[name.removesuffix(".weight")] = a, b
            merged[name] = weight + b @ a
    backend = NativeBackend(llama.config, weights, threads=2)
    plain, ids = logits(backend, random_ids(llama, 30)), random_ids(llama, 30)
    backend.add_adapter("style", linears)
    rows = [Row(ids, 10), Row(ids, 20), Row(ids, 30)]
    first, base, second = step(backend, rows, [30, 30, 30], ["style", None, "style"])
    np.testing.assert_array_equal(base, plain)
    np.testing.assert_array_equal(first, second)
    asked = np.array([61, 29, 40, 0])
    (found,) = step(backend, [Row(ids, 10), Row(ids, 20), Row(ids, 30)], [30, 30, 30], ["style", None, "style"], asked)
    np.testing.assert_array_equal(found, np.concatenate([first, base, second])[asked])
    assert relative(first, logits(NativeBackend(llama.config, merged), ids)) < 1e-5
    assert relative(first, plain) > 0.01
    with pytest.raises(UsageError, match="'other' is not loaded; loaded are style"):
        step(backend, [Row(ids, 10)], [1], ["other"])
    with pytest.raises(UsageError, match="does not fit"):
        backend.add_adapter("wide", {"model.layers.0.self_attn.q_proj": (np.zeros((2, 5), np.float32), np.zeros((7, 2), np.float32))})


def test_greedy_text_is_that_of_pytorch(model: Transformer) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    prompts = [random_ids(model, length, length).tolist() for length in (3, 20)]
    texts = []
    for backend in (NativeBackend(model.config, weights_of(model)), TorchBackend(model)):
        engine = Engine(backend)
        sequences = [engine.add(prompt, params) for prompt in prompts]
        while engine.busy:
            engine.step()
        texts.append([sequence.token_ids.tolist() for sequence in sequences])
    assert texts[0] == texts[1]


# -- bad input and faults ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(llama: Transformer) -> None:
    config, weights = llama.config, weights_of(llama)
    with pytest.raises(LLMKitError, match="q_proj"):
        NativeBackend(config, {**weights, "model.layers.1.self_attn.q_proj.weight": np.zeros((3, 5), np.float32)})
    with pytest.raises(LLMKitError, match="down_proj is missing"):
        NativeBackend(config, {name: w for name, w in weights.items() if "1.mlp.down_proj" not in name})
    with pytest.raises(UsageError, match="kv_bits is 7"):
        NativeBackend(config, weights, kv_bits=7)
    with pytest.raises(LLMKitError, match="threads is 0"):
        NativeBackend(config, weights, threads=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [10**6, 1]}, "token id 1000000"),
        ({"tokens": [-1, 1]}, "token id -1"),
        ({"positions": [0, 2]}, "gap"),
        ({"positions": [-1, 0]}, "position -1"),
        ({"positions": [15, 16]}, "beyond its block table"),
        ({"sequences": [0, 1]}, "sequence 1"),
        ({"logits_indices": [2]}, "row 2"),
        ({"tables": [[-1]]}, "is not there"),
        ({"tables": [[2**30]]}, "is not there"),
    ],
)
def test_a_step_checks_every_number(llama: Transformer, change: dict[str, list], message: str) -> None:
    given = {"tokens": [1, 2], "positions": [0, 1], "sequences": [0, 0], "tables": [[0]], "logits_indices": [1], **change}
    arrays = {name: np.array(value, np.int32) for name, value in given.items()}
    table = arrays.pop("tables")
    backend = NativeBackend(llama.config, weights_of(llama))
    with pytest.raises(ValueError, match=message):
        backend.step(StepBatch(**arrays, block_tables=[table], contexts=np.array([2], np.int32), adapters=[None]))


def _in_child(backend: NativeBackend, ids: np.ndarray, queue: multiprocessing.Queue) -> None:
    queue.put(logits(backend, ids))


def test_a_backend_works_after_a_fork(llama: Transformer) -> None:
    ids = random_ids(llama, 20)
    backend = NativeBackend(llama.config, weights_of(llama), threads=2)
    expected = logits(backend, ids)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(backend, ids, queue))
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(logits(backend, ids), expected)


def test_two_models_in_two_threads(llama: Transformer) -> None:
    weights, ids = weights_of(llama), random_ids(llama, 40)
    expected = logits(NativeBackend(llama.config, weights, threads=2), ids)
    found: list[np.ndarray] = []

    def work() -> None:
        backend = NativeBackend(llama.config, weights, threads=2)
        for _ in range(10):
            found.append(logits(backend, ids))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert len(found) == 30
    for logit in found:
        np.testing.assert_array_equal(logit, expected)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_ctrl_c_ends_a_long_step(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path, "llama", hidden_size=240, intermediate_size=2048, num_hidden_layers=24))
    backend = NativeBackend(model.config, weights_of(model), threads=1)
    ids = random_ids(model, 4000)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            logits(backend, ids)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    short = random_ids(model, 5)
    np.testing.assert_array_equal(logits(backend, short), logits(NativeBackend(model.config, weights_of(model), threads=1), short))


def test_an_extension_of_an_older_version_is_a_problem() -> None:
    """One that was built before a function was added, whichever, and left behind by an update of the sources."""
    from llmkit.kernels.cpu import _native

    added = [name for name, value in vars(_native).items() if isinstance(value, BuiltinFunctionType)]
    for name in set(added) - {"available", "physical_cores"}:  # which the first version had
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(_native, name)
            assert native_problem() == f"the native kernels were built for an older llmkit, without {name}; install llmkit again"


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_KERNELS", "reference")
    assert "LLMKIT_KERNELS=reference" in (native_problem() or "")
    monkeypatch.setenv("LLMKIT_KERNELS", "altivec")
    with pytest.raises(UsageError, match=r"'altivec', which this processor does not run\. Use one of"):
        native_problem()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(37, 45), (64, 576)])
def test_a_product_by_itself_has_the_arithmetic_of_a_step(shape: tuple[int, int], threads: int) -> None:
    """And a row's result does not depend on the rows beside it, nor on the threads."""
    torch.manual_seed(0)
    rows, columns = shape
    weight, x, bias = torch.randn(rows, columns), torch.randn(21, columns), torch.randn(rows)
    for scheme, group in (("q4", 32), ("q4", 16), ("q8", 32)):
        matrix = round_to_nearest(weight, scheme, group)
        found = TrainingKernels().linear(matrix, bias.numpy(), x.numpy(), threads)
        packed = reference.Packed.of(matrix)
        torch.testing.assert_close(torch.from_numpy(found), reference.linear(x, packed, bias), rtol=1e-6, atol=1e-6)
        assert np.array_equal(TrainingKernels().linear(matrix, bias.numpy(), x[5:6].numpy(), 1), found[5:6])
        assert np.array_equal(dequantize(matrix, threads), reference.dequantize(packed).numpy())
    found = TrainingKernels().linear(weight.numpy(), None, x.numpy(), threads)
    torch.testing.assert_close(torch.from_numpy(found), x @ weight.T, rtol=1e-5, atol=1e-5 * columns**0.5)
    assert TrainingKernels().linear(weight.numpy(), None, x[:0].numpy(), threads).shape == (0, rows)


def test_sizes_that_do_not_fit_are_refused() -> None:
    from llmkit.kernels.cpu import _native

    weight = (0, 4, 8, np.zeros((4, 8), np.float32), None, None, None, 32, None)
    with pytest.raises(ValueError, match="x has"):
        _native.product(None, 1, weight, np.zeros(9, np.float32), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="the result has"):
        _native.product(None, 1, weight, np.zeros(8, np.float32), np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="not quantized"):
        _native.dequantize(1, weight, np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="threads"):
        _native.product(None, 0, weight, np.zeros(8, np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/box\n", {"pod/cpu.max": "200000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 2.0),  # the group around it
        ("0::/pod/box\n", {"pod/cpu.max": "400000 100000\n", "pod/box/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000\n"}, 3.0),  # a path that is not there: the container's own is the mount
        (
            "3:cpu,cpuacct:/box\n2:memory:/box\n0::/\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "what is this\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_cpu_quota_of_nested_groups(tmp_path: Path, groups: str, files: dict[str, str], quota: float | None) -> None:
    texts = {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_no_cpu_quota_where_there_are_no_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
