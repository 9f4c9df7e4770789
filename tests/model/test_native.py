"""The native kernels of training against exact arithmetic (float64) and against the PyTorch forms that define them."""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import ModelConfig
from llmkit.families import read_config
from llmkit.kernels import native_problem
from llmkit.kernels.training_ops import TrainingKernels
from llmkit.lora.fused import training_ops
from llmkit.model.attention import PackedLayout, PackedSequences, attention, rotate, visible
from llmkit.model.autograd import ActivationMemory, NativeOps, matmul_weight, native_ops
from llmkit.model.layers import PLAIN, HeadMatmuls, Ops, rms_norm
from llmkit.model.transformer import Transformer, init_weights
from llmkit.training import objective
from llmkit.training.data.packing import IGNORE, Batch
from llmkit.training.objective import cross_entropy

if (problem := native_problem()) is not None:
    pytest.skip(problem, allow_module_level=True)

from llmkit.kernels.cpu import _native

SETS = _native.available()


@pytest.fixture(params=SETS)
def native(request: pytest.FixtureRequest) -> NativeOps:
    """The operations of each set of instructions that this processor has."""
    return NativeOps(TrainingKernels(request.param))


@pytest.fixture
def best() -> NativeOps:
    """Those of the best one."""
    found = native_ops()
    assert found is not None
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == exact.shape
    assert float((found.double() - exact).abs().amax(None)) <= tolerance * float(exact.abs().amax(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank"),
    [(37, 50, (33, 70), 4), (5, 16, (16,), 0), (100, 577, (40, 24, 24), 16), (1, 3, (2,), 1), (61, 1200, (90,), 3), (13, 40, (800, 9), 8)],
)
def test_products(native: NativeOps, dtype: torch.dtype, tokens: int, inputs: int, outputs: Sequence[int], rank: int) -> None:
    x = normal(tokens, inputs)
    weights = [normal(n, inputs, seed=i).to(dtype) for i, n in enumerate(outputs)]
    pairs = [(normal(rank, inputs, seed=i), normal(n, rank, seed=9)) if rank else None for i, n in enumerate(outputs)]
    biases = [normal(n, seed=5) for n in outputs]
    exact = [w.double() + (0 if p is None else 0.7 * p[1].double() @ p[0].double()) for w, p in zip(weights, pairs, strict=True)]
    factors = [matmul_weight(w, b, p, 0.7) for w, b, p in zip(weights, biases, pairs, strict=True)]
    for y, u, bias in zip(native.matmul(x, factors), exact, biases, strict=True):
        close(y, x.double() @ u.T + bias.double())
    grads = [normal(tokens, n, seed=7) for n in outputs]
    close(native.matmul_back(grads, factors), sum((g.double() @ u for g, u in zip(grads, exact, strict=True)), torch.zeros(1)))


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "ranks"),
    [(37, 50, (33, 70), (4, 1)), (1, 3, (2,), (1,)), (130, 577, (40, 24, 300), (16, 3, 16)), (65, 20, (500,), (37,)), (0, 5, (4,), (2,))],
)
def test_what_adapters_learn(native: NativeOps, tokens: int, inputs: int, outputs: Sequence[int], ranks: Sequence[int]) -> None:
    x, a = normal(tokens, inputs), normal(sum(ranks), inputs, seed=1)
    bs = [normal(n, rank, seed=2) for n, rank in zip(outputs, ranks, strict=True)]
    grads = [normal(tokens, n, seed=3) for n in outputs]
    parts = [(b, 0.5 + i, grad) for i, (b, grad) in enumerate(zip(bs, grads, strict=True))]
    xa = x @ a.T
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(native.adapter_gradients(x, xa, parts))
    (da, dbs), again = found
    assert torch.equal(da, again[0])
    close(da, torch.cat([scale * (grad.double() @ b.double()).T @ x.double() for b, scale, grad in parts]))
    for db, other, (_, scale, grad), own in zip(dbs, again[1], parts, xa.split(list(ranks), 1), strict=True):
        assert torch.equal(db, other)
        close(db, scale * grad.double().T @ own.double())


CASES = [
    ((5,), 2, 1, 8, None),
    ((64,), 4, 2, 16, None),
    ((130, 200, 12), 6, 2, 64, None),
    ((1, 1, 2), 2, 2, 20, None),
    ((300,), 2, 1, 64, 50),
    ((210, 13), 2, 1, 256, None),
    ((400,), 1, 1, 200, 300),
]


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "dim", "window"), CASES)
def test_attention(native: NativeOps, lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    total = sum(lengths)
    inputs = [normal(1, total, h, dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))]
    grad = normal(1, total, heads, dim, seed=4)
    ours = [t.clone().requires_grad_() for t in inputs]
    out = native.attend_packed(*ours, whole(*lengths), window, dim**-0.5, None)
    out.backward(grad)
    exact = [t.double().requires_grad_() for t in inputs]
    parts = []
    for q, k, v in zip(*(t.split(lengths, 1) for t in exact), strict=True):
        index = torch.arange(q.shape[1])
        parts.append(attention(q, k, v, visible(index, index, window).unsqueeze(0), scale=dim**-0.5))
    wanted = torch.cat(parts, 1)
    wanted.backward(grad.double())
    close(out.detach(), wanted.detach())
    for own, other in zip(ours, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        close(own.grad, other.grad)


@pytest.mark.parametrize("large", [False, True])
def test_attention_of_large_scores(best: NativeOps, large: bool) -> None:
    """Rows whose softmax is all on one key, or would overflow without its maximum."""
    q, k, v = (normal(1, 50, 2, 16, seed=i) * (100 if large else 1e-4) for i in range(3))
    out = best.attend_packed(q, k, v, whole(50), None, 1.0, None)
    index = torch.arange(50)
    close(out, attention(q.double(), k.double(), v.double(), visible(index, index, None).unsqueeze(0)), 1e-4)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("place", [4, 250])
def test_attention_hides_no_nan(native: NativeOps, place: int, window: int | None) -> None:
    """A broken key reaches all who see it, a broken query its own row; else a run would go on with broken weights."""
    length = 400
    last = length if window is None else place + window
    for broken, rows in ((0, range(place, place + 1)), (1, range(place, last))):
        inputs = [normal(1, length, heads, 8, seed=heads) for heads in (2, 1, 1)]
        inputs[broken][0, place, 0, 3] = float("nan")
        q, k, v = (t.requires_grad_() for t in inputs)
        out = native.attend_packed(q, k, v, whole(length), window, 0.3, None)
        assert out[0, :, 0].isnan().all(-1).nonzero().flatten().tolist() == list(rows)
        assert all(grad.isnan().any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(best: NativeOps, threads: int) -> None:
    def everything() -> list[Tensor]:
        x = normal(70, 64)
        found = best.matmul(x, [matmul_weight(normal(100, 64), None, (normal(4, 64), normal(100, 4)), 2.0)])
        q, k, v = (normal(2, 35, h, 16, seed=h).requires_grad_() for h in (6, 3, 3))
        out = best.attend_packed(q, k, v, whole(20, 50), None, 0.25, None)
        return [*found, out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_norm_rotation_and_gate(native: NativeOps) -> None:
    x, weight, grad = normal(2, 7, 50), normal(50, seed=1), normal(2, 7, 50, seed=2)
    own, other = x.clone().requires_grad_(), x.double().requires_grad_()
    native.rms_norm(own, weight, 1e-5).backward(grad)
    wanted = rms_norm(other, weight.double(), 1e-5)
    wanted.backward(grad.double())
    close(native.rms_norm(x, weight, 1e-5), wanted.detach())
    assert own.grad is not None
    assert other.grad is not None
    close(own.grad, other.grad)

    x, grad = normal(2, 7, 3, 40), normal(2, 7, 3, 40, seed=2)
    angles = normal(1, 7, 1, 15)  # 30 of 40 numbers turn, the same in every row of the batch
    tables = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    native.rotate(own, tables).backward(grad)
    rotate(other, tables).backward(grad)
    torch.testing.assert_close(native.rotate(x, tables), rotate(x, tables))
    torch.testing.assert_close(own.grad, other.grad)

    gate, up, grad = (5 * normal(3, 45, seed=i) for i in range(3))
    exact = [t.double().requires_grad_() for t in (gate, up)]
    h = torch.nn.functional.silu(exact[0]) * exact[1]
    close(native.gated(gate, up), h.detach())
    for found, expected in zip(native.gated_back(gate, up, grad), torch.autograd.grad(h, exact, grad.double()), strict=True):
        close(found, expected)


def test_a_trained_norm_has_its_gradient(best: NativeOps) -> None:
    weight = normal(16).requires_grad_()
    best.rms_norm(normal(3, 16), weight, 1e-5).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "qk norm": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "soft caps": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
    "layer norm": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}


def whole(*lengths: int) -> PackedLayout:
    return PackedLayout(lengths, lengths)


def batch(packed: bool) -> Batch:
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    lengths = [[9, 15], [24]] if packed else [[24], [24]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    return Batch(tokens, tokens.roll(-1, 1), positions, PackedSequences(ids))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_learn_the_same(name: str, packed: bool) -> None:
    config: ModelConfig = read_config({**SIZES, **MODELS[name]})
    losses, gradients = [], []
    for ops in (PLAIN, training_ops(torch.device("cpu"), adapters=False)):
        model = Transformer(config)
        init_weights(model, torch.Generator().manual_seed(0))
        loss = cross_entropy(model, batch(packed), ops)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_has_no_loss() -> None:
    model = Transformer(read_config({**SIZES, **MODELS["llama"]})).requires_grad_(False)
    given = batch(packed=True)
    empty = Batch(given.tokens, torch.full_like(given.labels, IGNORE), given.positions, given.packed)
    assert cross_entropy(model, empty).item() == 0


def test_weights_stay_resizable(best: NativeOps) -> None:
    """FSDP frees the storage of gathered weights; PyTorch's `numpy()` would forbid that."""
    weight, x = normal(8, 8), normal(4, 8)
    best.matmul(x, [matmul_weight(weight, normal(8))])
    assert weight.untyped_storage().resizable()
    assert x.untyped_storage().resizable()


@pytest.mark.parametrize(
    "sizes", [(3, 2, 8, 0, 1.0), (0, 0, 8, 0, 1.0), (2, 1, 0, 0, 1.0), (2, 1, 8, -1, 1.0), (2, 1, 8, 0, 1.0)]
)  # the last: the arrays are too short
def test_what_does_not_fit_is_refused(best: NativeOps, sizes: tuple[int, int, int, int, float]) -> None:
    arrays = [normal(4).numpy() for _ in range(5)]
    with pytest.raises(ValueError, match=r"heads|bytes"):
        TrainingKernels().varlen_attention(sizes, (4,), (4,), (arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]), None, 1)
    with pytest.raises(ValueError, match=r"bytes|fit"):
        best.matmul_back([normal(3, 5), normal(3, 5)], [matmul_weight(normal(5, 4)), matmul_weight(normal(6, 4))])
    with pytest.raises(ValueError, match="columns"):
        best.matmul(normal(3, 4), [matmul_weight(normal(5, 4)), matmul_weight(normal(6, 3))])


W = (0, 3, 4, np.ones((3, 4), np.float32), None, None, None, 32, None)  # a weight [3, 4]


def row(count: int) -> NDArray[np.float32]:
    return np.ones(count, np.float32)


def read_only(count: int) -> NDArray[np.float32]:
    array = row(count)
    array.flags.writeable = False
    return array


BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "x is no whole row": ("norm", (row(7), row(4), 1e-5, row(4))),
    "x is less than a row": ("norm", (row(3), row(4), 1e-5, row(0))),
    "empty rows": ("norm", (row(8), row(0), 1e-5, row(8))),
    "strides": ("norm", (row(16)[::2], row(4), 1e-5, row(8))),
    "columns first": ("norm", (np.ones((4, 2), np.float32).T, row(4), 1e-5, row(8))),
    "result too short": ("norm", (row(8), row(4), 1e-5, row(4))),
    "result too long": ("norm", (row(8), row(4), 1e-5, row(12))),
    "result not writable": ("norm", (row(8), row(4), 1e-5, read_only(8))),
    "bytes": ("norm", (np.ones(33, np.uint8), row(4), 1e-5, row(8))),
    "odd address": ("norm", (np.ones(33, np.uint8)[1:], row(4), 1e-5, row(8))),
    "gradient of other rows": ("norm_back", (row(8), row(4), 1e-5, row(4), row(8))),
    "no heads": ("rotate", (0, 4, row(8), row(4), row(4), False, row(8))),
    "heads x dim overflows": ("rotate", (2**62, 4, row(8), row(4), row(4), False, row(8))),
    "heads are no int64": ("rotate", (2**64, 4, row(8), row(4), row(4), False, row(8))),
    "dim too large": ("rotate", (1, 2048, row(2048), row(4), row(4), False, row(2048))),
    "cos is wider than a head": ("rotate", (2, 4, row(8), row(6), row(6), False, row(8))),
    "cos is odd": ("rotate", (2, 4, row(8), row(3), row(3), False, row(8))),
    "cos has fewer rows": ("rotate", (1, 4, row(8), row(1), row(1), False, row(8))),
    "cos is empty": ("rotate", (2, 4, row(8), row(0), row(0), False, row(8))),
    "sin is narrower": ("rotate", (2, 4, row(8), row(4), row(2), False, row(8))),
    "no width": ("gate", (0, row(8), row(8), row(8))),
    "negative width": ("gate", (-4, row(8), row(8), row(8))),
    "width overflows": ("gate", (2**62, row(8), row(8), row(8))),
    "up is shorter": ("gate", (4, row(8), row(4), row(8))),
    "a gradient is not writable": ("gate_back", (4, row(8), row(8), row(8), row(8), read_only(8))),
    "no factors": ("matmul", (False, (), (row(4),), (row(3),))),
    "too few results": ("matmul", (False, ((W, None, None, 1.0),) * 2, (row(4),), (row(3),))),
    "A of other columns": ("matmul", (False, ((W, row(5), row(3), 1.0),), (row(4),), (row(3),))),
    "B of another rank": ("matmul", (False, ((W, row(8), row(3), 1.0),), (row(4),), (row(3),))),
    "A without B": ("matmul", (False, ((W, row(4), None, 1.0),), (row(4),), (row(3),))),
    "B of rank 0": ("matmul", (False, ((W, row(0), row(3), 1.0),), (row(4),), (row(3),))),
    "a short factor": ("matmul", (False, ((W,),), (row(4),), (row(3),))),
    "lists": ("matmul", (False, [(W, None, None, 1.0)], [row(4)], [row(3)])),
    "x of other columns": ("matmul", (False, ((W, None, None, 1.0),), (row(5),), (row(3),))),
    "dy of other rows": ("matmul", (True, ((W, None, None, 1.0),) * 2, (row(6), row(3)), (row(8),))),
    "no tokens, but results": ("matmul", (False, ((W, None, None, 1.0),), (row(0),), (row(3),))),
    "documents shorter than q": ("attend", ((1, 1, 4, 0, 1.0), (1,), (1,), row(8), row(8), row(8), row(8), row(2), None)),
    "an empty document": ("attend", ((1, 1, 4, 0, 1.0), (2, 0), (2, 0), row(8), row(8), row(8), row(8), row(2), None)),
    "fewer keys than queries": ("attend", ((1, 1, 4, 0, 1.0), (2,), (1,), row(8), row(4), row(4), row(8), row(2), None)),
    "keys are missing": ("attend", ((1, 1, 4, 0, 1.0), (2,), (3,), row(8), row(8), row(8), row(8), row(2), None)),
    "lengths of other documents": ("attend", ((1, 1, 4, 0, 1.0), (2,), (1, 1), row(8), row(8), row(8), row(8), row(2), None)),
    "too many tokens": ("attend", ((65536, 65536, 1024, 0, 1.0), (2**31,) * 2**17, (2**31,) * 2**17, *[row(0)] * 5, None)),
    "three gradients": ("attend", ((1, 1, 4, 0, 1.0), (2,), (2,), row(8), row(8), row(8), row(8), row(2), (row(8),) * 3)),
    "dk is shorter": ("attend", ((1, 1, 4, 0, 1.0), (2,), (2,), row(8), row(8), row(8), row(8), row(2), (row(8), row(8), row(4), row(8)))),
    "dB is shorter": ("learn", (((row(6), 3, 2, 1.0),), row(8), row(4), (row(6),), row(8), (row(5),))),
    "dA is shorter": ("learn", (((row(6), 3, 2, 1.0),), row(8), row(4), (row(6),), row(7), (row(6),))),
    "dy of other tokens": ("learn", (((row(6), 3, 2, 1.0),), row(8), row(4), (row(3),), row(8), (row(6),))),
    "a B of another rank": ("learn", (((row(6), 3, 3, 1.0),), row(8), row(4), (row(6),), row(8), (row(6),))),
    "no rank": ("learn", (((row(0), 3, 0, 1.0),), row(8), row(4), (row(6),), row(8), (row(0),))),
    "nothing to learn from": ("learn", (((row(6), 3, 2, 1.0),), row(0), row(0), (row(0),), row(8), (row(6),))),
    "a factor without a gradient": ("learn", (((row(6), 3, 2, 1.0),), row(8), row(4), (), row(8), (row(6),))),
    "a B that cannot be written": ("learn", (((row(6), 3, 2, 1.0),), row(8), row(4), (row(6),), row(8), (read_only(6),))),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arrays_are_refused(name: str) -> None:
    function, arguments = BAD[name]
    with pytest.raises((ValueError, TypeError, IndexError, OverflowError, BufferError)):
        getattr(_native, function)(None, 1, *arguments)


def test_a_runtime_is_lent_whole() -> None:
    with pytest.raises(ValueError, match="missing"):
        _native.lend(1, 0, 0)


def test_nothing_is_as_good_as_something(best: NativeOps) -> None:
    """No tokens, no rank: arrays of no numbers."""
    one = matmul_weight(normal(5, 4), normal(5), (normal(0, 4), normal(5, 0)))
    assert torch.equal(best.matmul(normal(3, 4), [one])[0], best.matmul(normal(3, 4), [matmul_weight(normal(5, 4), normal(5))])[0])
    assert best.matmul(normal(0, 4), [one])[0].shape == (0, 5)
    assert best.matmul_back([normal(0, 5)], [one]).shape == (0, 4)
    assert best.gated(normal(0, 4), normal(0, 4)).shape == (0, 4)
    assert [t.shape for t in best.gated_back(normal(0, 4), normal(0, 4), normal(0, 4))] == [(0, 4)] * 2
    for shape in [(1, 0, 2, 8), (0, 3, 2, 8)]:
        x = normal(*shape).requires_grad_()
        tables = normal(1, shape[1], 1, 8), normal(1, shape[1], 1, 8)
        turned = best.rotate(best.rms_norm(x, normal(8), 1e-5), tables)
        out = best.attend_packed(turned, turned, turned, whole(), None, 1.0, None)
        out.sum().backward()
        assert out.shape == shape
        assert x.grad is not None


# --- memory --------------------------------------------------------------------------------------------------------


def test_memory_is_used_again() -> None:
    memory = ActivationMemory()
    first = memory.empty(300, 300)
    place = first.data_ptr()
    view = first.view(-1)[5:]
    del first
    second = memory.empty(300, 300)
    assert second.data_ptr() != place, "a view is alive"
    del view, second
    gc.collect()
    assert memory.empty(299, 300).data_ptr() == place or memory.empty(300, 300).data_ptr() == place


def test_what_autograd_keeps_is_not_used_again(best: NativeOps) -> None:
    x = normal(300, 300).requires_grad_()
    y = best.rms_norm(x, torch.ones(300), 1e-5)
    z = y * y  # keeps y
    kept = y.detach().clone()
    del y
    others = [best.memory.empty(300, 300).fill_(float("nan")) for _ in range(4)]
    (found,) = torch.autograd.grad(z.sum(), x)
    assert others
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(kept).all())


def test_a_tensor_may_go_while_a_piece_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hand of another thread, or of the garbage collector."""
    memory = ActivationMemory()
    small, large = [memory.empty(300, 300)], memory.empty(500, 500)
    del large

    def interrupted(*arguments: Any, **keys: Any) -> int:
        place = bisect_left(*arguments, **keys)
        small.clear()
        return place

    monkeypatch.setattr("llmkit.model.autograd.bisect_left", interrupted)
    assert memory.empty(500, 500).shape == (500, 500)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(ActivationMemory.SMALL, 4 * ActivationMemory.SMALL)), max_size=40))
def test_tensors_never_share_memory_and_little_waits(steps: list[tuple[int, int]]) -> None:
    """Slots are filled anew in any order; what each holds stays, and what waits is at most twice what was once in use."""
    memory, most = ActivationMemory(), 0
    slots: list[Tensor | None] = [None] * 4
    for slot, count in steps:
        slots[slot] = None
        slots[slot] = memory.empty(count).fill_(slot)
        most = max(most, sum(t.numel() for t in slots if t is not None))
        for number, tensor in enumerate(slots):
            assert tensor is None or bool((tensor == number).all())
        assert memory.waiting <= 2 * most


def test_one_tile_of_logits_at_a_time(best: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a frozen head."""
    before: list[weakref.ref[Any]] = []

    def watched(hidden: Tensor, weight: Tensor) -> HeadMatmuls:
        matmul, matmul_back = best.frozen_head(hidden, weight)

        def followed(h: Tensor) -> Tensor:
            assert all(storage() is None for storage in before)
            logits = matmul(h)
            before.append(weakref.ref(logits.untyped_storage()))
            return logits

        return followed, matmul_back

    monkeypatch.setattr(objective, "_SMALLEST", 4)
    monkeypatch.setitem(objective._TILE, "cpu", 1)
    hidden = torch.randn(3, 8, requires_grad=True)
    objective._FrozenCrossEntropy.apply(hidden, torch.randn(10, 8), torch.tensor([1, 2, 9]), 1.0, Ops(frozen_head=watched))
    assert len(before) == 3
