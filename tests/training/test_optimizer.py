"""Muon, parameter groups and the schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmkit.model.transformer import Transformer
from llmkit.training.optimizer import Muon, make_optimizers, orthogonalize, schedule


def test_orthogonalize_levels_the_singular_values() -> None:
    for shape in ((4, 16, 40), (3, 40, 16)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert values.min() > 0.3
        assert values.max() < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        near = (orthogonalize(matrices) * (u @ v)).sum((-2, -1)) / min(shape[1:])
        assert near.min() > 0.7


def test_muon_follows_torch() -> None:
    """torch.optim.Muon does the same in bfloat16, one matrix at a time."""
    generator = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(16, 24, generator=generator)) for _ in range(2)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=2e-3)  # each step moves an entry by about 0.01


def test_who_decays_and_who_goes_to_muon(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    names = {id(p): name for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        groups = [g for o in make_optimizers(model, kind, 1e-3, weight_decay=0.1) for g in o.param_groups]
        assert sum(len(g["params"]) for g in groups) == len(names)
        for group in groups:
            for parameter in group["params"]:
                hidden = "_proj" in names[id(parameter)]
                assert (group["weight_decay"] > 0) == hidden
    muon, adamw = make_optimizers(model, "muon", 1e-3, 2e-3)
    assert isinstance(muon, Muon)
    assert all("_proj" in names[id(p)] for p in muon.param_groups[0]["params"])
    assert muon.param_groups[0]["peak_lr"] == 2e-3
    assert adamw.param_groups[0]["peak_lr"] == 1e-3


@pytest.mark.parametrize(
    ("kind", "progress", "expected"),
    [
        ("cosine", 0.0, 1.0), ("cosine", 0.5, 0.55), ("cosine", 1.0, 0.1),
        ("linear", 0.0, 1.0), ("linear", 0.5, 0.55), ("linear", 1.0, 0.1),
        ("constant", 0.7, 1.0),
        ("wsd", 0.79, 1.0), ("wsd", 0.9, 0.55), ("wsd", 1.0, 0.1),
    ],
)  # fmt: skip
def test_schedule(kind: str, progress: float, expected: float) -> None:
    assert schedule(kind, progress, step=1000, warmup_steps=10, final=0.1) == pytest.approx(expected)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    shares = [schedule("constant", 0.0, step, warmup_steps=4, final=0.0) for step in range(6)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
