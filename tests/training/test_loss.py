"""Cross-entropy for a head that is not trained: one pass over its rows, some at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.lora.fused import training_ops, without_adapters
from llmkit.model.attention import PackedSequences
from llmkit.model.transformer import Transformer
from llmkit.training import objective as module
from llmkit.training.data.packing import Batch


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses_of(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss of each row and its gradient by the hidden state, as a run computes them."""
    ops = training_ops(hidden.device, adapters=True)
    leaf = hidden.clone().requires_grad_()
    losses: Tensor = module._FrozenCrossEntropy.apply(leaf, weight, labels, scale, ops)  # type: ignore[no-untyped-call]
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "vocab", "scale"), [(1, 3, 1.0), (1, 4000, 0.2), (9, 4099, 1.0), (40, 1025, 0.2)])
def test_it_is_cross_entropy(count: int, vocab: int, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head in any format, whose rows take several turns, the last a short one."""
    monkeypatch.setattr(module, "_TILE", {"cpu": 1})
    hidden, weight = normal(count, 24), normal(vocab, 24, seed=1).to(dtype)
    labels = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(2))
    losses, gradient = losses_of(hidden, weight, labels, scale)
    exact = hidden.double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T * scale, labels, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(losses, expected.detach().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_certain_costs_nothing(dtype: torch.dtype, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However products are rounded, no loss is below 0, and what is predicted without a doubt gives no gradient."""
    monkeypatch.setattr(module, "_TILE", {"cpu": 1})
    hidden, weight = normal(60, 64).to(dtype) * 20, normal(3000, 64, seed=1).to(stored)
    labels = (hidden.float() @ weight.float().T).argmax(1)
    losses, gradient = losses_of(hidden, weight, labels)
    assert losses.min() >= 0
    certain = losses == 0
    assert certain.sum() > 20
    assert gradient[certain].abs().max() < 1e-5


@pytest.mark.parametrize("bfloat16", [False, True])
def test_it_is_that_of_an_evaluation(bfloat16: bool, make_model: Callable[[], Transformer]) -> None:
    """Which DPO subtracts from it: an adapter that has learned nothing prefers nothing, however products are rounded."""
    model = make_model().requires_grad_(False)
    model.head.weight.mul_(100)
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(40).expand(2, 40), PackedSequences(torch.arange(2)[:, None].expand(2, 40)))
    ops = training_ops(torch.device("cpu"), adapters=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        learned, _ = module.token_losses(model, batch, ops)
        with torch.no_grad():
            evaluated, _ = module.token_losses(model, batch, without_adapters(ops))
    torch.testing.assert_close(learned, evaluated, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_no_number_shows(value: float) -> None:
    """A NaN or infinite logit, in whatever turn, makes the loss one that stops a run."""
    for row in (0, 1500, 2999):
        weight = normal(3000, 8)
        weight[row] = value
        losses, _ = losses_of(normal(3, 8).abs() + 1, weight, torch.tensor([0, 5, 2999]))
        assert losses.isnan().all()
