"""Adapters in training: PEFT puts them in, our functions compute with them; PEFT on the transformers model is the reference."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.checkpoint.load import load_model
from llmkit.errors import UsageError
from llmkit.lora.fused import AdaptedWeight, FusedMatmuls, FusedMLP, training_ops, without_adapters
from llmkit.lora.inject import NAME, LoraSettings, adapted, inject, integers_possible
from llmkit.model.attention import PackedSequences
from llmkit.model.autograd import native_ops
from llmkit.model.layers import PLAIN, Linear
from llmkit.model.transformer import Transformer
from tests.families.tiny import tiny_folder
from tests.tiny import quantize_model

IDS = torch.arange(3, 43).view(2, 20)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def perturb(parameters: Any) -> None:
    """Without this B is zero and the adapter does nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def target_gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.float().logsumexp(-1).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ("q_proj", "down_proj")}])
def test_logits_and_gradients_are_pefts(folder: Path, keys: dict[str, Any]) -> None:
    ours = load_model(folder)
    inject(ours, LoraSettings(r=4, lora_alpha=8, **keys))
    theirs = LlamaForCausalLM.from_pretrained(folder)
    targets = list(keys.get("target_modules", ())) or "all-linear"
    config = LoraConfig(r=4, lora_alpha=8, **{**keys, "target_modules": targets}, task_type="CAUSAL_LM")
    peft = get_peft_model(theirs, config)
    perturb(p for name, p in ours.named_parameters() if "lora_" in name)
    own = dict(ours.named_parameters())
    pairs = {}
    for name, parameter in peft.named_parameters():
        mine = name.removeprefix("base_model.model.").replace(f"lora_magnitude_vector.{NAME}.weight", "magnitude")
        if parameter.requires_grad:
            assert own[mine].requires_grad
            if mine.endswith("magnitude"):
                parameter.data.mul_(1.1)
                own[mine].data.copy_(parameter.data)
            parameter.data.copy_(own[mine].data)
            pairs[name] = mine
    assert set(pairs.values()) == {name for name, p in own.items() if p.requires_grad}
    expected = peft(IDS).logits
    wanted = target_gradients(peft, expected)
    for ops in (PLAIN, training_ops(CPU, adapters=True), training_ops(CPU, adapters=True, checkpointing=True)):
        logits = ours(IDS, ops=ops)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        gradients = target_gradients(ours, logits)
        for name, mine in pairs.items():
            torch.testing.assert_close(gradients[mine], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", ["q4", "q8"])
def test_a_quantized_base_is_its_dequantized_weights(folder: Path, scheme: str) -> None:
    model = load_model(folder)
    quantize_model(model, model.config.parameters, scheme)
    dense = load_model(folder)
    for name, module in dense.named_modules():
        if isinstance(module, (Linear, nn.Embedding)):
            module.weight.data = model.get_submodule(name).dequantize()  # type: ignore[operator, union-attr]
    found = []
    for one in (model, dense):
        torch.manual_seed(3)
        inject(one, LoraSettings(r=4))
        perturb(p for name, p in one.named_parameters() if "lora_" in name)
        logits = one(IDS, ops=training_ops(CPU, adapters=True))
        found.append((logits, target_gradients(one, logits)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-5)


def test_only_the_adapter_is_trained_and_can_be_left_out(folder: Path) -> None:
    model = load_model(folder)
    base = model(IDS)
    inject(model, LoraSettings(r=4, modules_to_save=("lm_head",)))
    torch.testing.assert_close(model(IDS), base)  # B is zero
    perturb(p for name, p in model.named_parameters() if "lora_" in name)
    assert not torch.allclose(model(IDS), base, atol=1e-3)
    ops = training_ops(CPU, adapters=True)
    torch.testing.assert_close(model(IDS, ops=ops), model(IDS))
    torch.testing.assert_close(model(IDS, ops=without_adapters(ops)), base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "lm_head.weight" for name in trained)
    assert len(list(adapted(model))) == 14
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("scheme", [None, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("q4", "integers"))])
def test_a_compiled_model_learns_the_same(folder: Path, scheme: str | None) -> None:
    """Where torch.compile writes code, it is of PyTorch's operations; it cannot look into the native kernels."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = load_model(folder)
        if scheme is not None:
            quantize_model(model, model.config.parameters, "q4")
        inject(model, LoraSettings(r=4))
        perturb(p for p in model.parameters() if p.requires_grad)
        ops = training_ops(CPU, adapters=True, integers=scheme == "integers" and integers_possible(model))
        if compiled:
            model.compile(backend="eager")
        packed = PackedSequences(torch.arange(20).div(9, rounding_mode="floor").expand(2, 20))
        found.append(target_gradients(model, model(IDS, torch.arange(20).expand(2, 20) % 9, packed=packed, ops=ops)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "gemma3", "olmo2", "mixtral", "qwen3-moe", "phi3", "gpt2", "granite"])
def test_every_linear_is_called_through_the_operations(tmp_path: Path, variant: str) -> None:
    """Else an adapter would stay in the reference of a preference, or lack its gradient."""
    model = load_model(tiny_folder(tmp_path / "tiny", variant), "float32").eval()
    ids = IDS % model.config.vocab_size
    base = model(ids)
    inject(model, LoraSettings(r=2))
    perturb(p for name, p in model.named_parameters() if "lora_" in name)
    ops = training_ops(CPU, adapters=True)
    torch.testing.assert_close(model(ids, ops=without_adapters(ops)), base, rtol=1e-4, atol=1e-4)
    plain, fused = target_gradients(model, model(ids)), target_gradients(model, model(ids, ops=ops))
    assert plain.keys() == fused.keys()
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("native", [True, False])
def test_an_expert_without_tokens_has_a_gradient(tmp_path: Path, native: bool) -> None:
    """Of zeros. DDP waits for the gradient of every weight from every process, whatever tokens it has."""
    model = load_model(tiny_folder(tmp_path / "tiny", "mixtral"), "float32")
    inject(model, LoraSettings(r=2))
    perturb(p for name, p in model.named_parameters() if "lora_" in name)
    gradients = target_gradients(model, model(IDS[:1, :1], ops=training_ops(CPU, adapters=True) if native else PLAIN))
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    experts = [gradient.abs().sum() for name, gradient in gradients.items() if ".experts." in name]
    assert 0 < sum(bool(total) for total in experts) < len(experts)


def test_dropout_changes_training_only(folder: Path) -> None:
    model = load_model(folder)
    inject(model, LoraSettings(r=4, lora_dropout=0.5))
    perturb(p for name, p in model.named_parameters() if "lora_" in name)
    model.eval()
    for ops in (PLAIN, training_ops(CPU, adapters=True)):
        model.eval()
        still = model(IDS, ops=ops)
        torch.testing.assert_close(model(IDS, ops=ops), still, rtol=0, atol=0)
        model.train()
        assert not torch.allclose(model(IDS, ops=ops), model(IDS, ops=ops))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"target_modules": ("q_prj",)}, "Did you mean q_proj"),
        ({"target_modules": ()}, "names nothing"),
        ({"modules_to_save": ("score",)}, "does not have"),
        ({"modules_to_save": ("q_proj",)}, "both|Take it out"),
    ],
)
def test_what_is_not_there_is_refused(folder: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        inject(load_model(folder), LoraSettings(**keys))


def test_quantized_weights_are_not_trained_whole(folder: Path) -> None:
    model = load_model(folder)
    quantize_model(model, model.config.parameters)
    with pytest.raises(UsageError, match="quantized"):
        inject(model, LoraSettings(modules_to_save=("lm_head",)))


def linear(out: int, inside: int, bias: bool, dtype: torch.dtype) -> Linear:
    return Linear(inside, out, bias).to(dtype).requires_grad_(False)


def plain(x: Tensor, part: AdaptedWeight) -> Tensor:
    y = x @ part.base.dequantize().to(x.dtype).T
    if part.base.bias is not None:
        y = y + part.base.bias
    return y if part.a is None or part.b is None else y + x @ part.a.T @ part.b.T * part.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_gradients_are_those_of_autograd(native: bool, gated: bool, dtype: torch.dtype) -> None:
    """The fused functions against the same formula in plain PyTorch, in float64 where autograd is exact enough to compare."""
    torch.manual_seed(0)
    fused = FusedMatmuls(native_ops() if native else None)
    fused_mlp = FusedMLP(fused)

    def part(out: int, inside: int, rank: int) -> AdaptedWeight:
        base = linear(out, inside, out == 5, dtype)
        if not rank:
            return AdaptedWeight(base)
        return AdaptedWeight(base, torch.randn(rank, inside, requires_grad=True), torch.randn(out, rank, requires_grad=True), 0.7)

    parts, down = [part(6, 8, 2), part(6, 8, 0), part(5, 8, 3)], part(8, 6, 2)
    leaves = [t for p in [*parts, down] for t in (p.a, p.b) if t is not None]
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu
    x = torch.randn(3, 4, 8, requires_grad=True)

    def run(plainly: bool) -> list[Tensor]:
        q, k, v = tuple(plain(x, p) for p in parts) if plainly else fused.fused(x, parts)
        gate = q if gated else None
        y = plain(act(k) if gate is None else act(gate) * k, down) if plainly else fused_mlp.fused(act, gate, k, down)
        return [*torch.autograd.grad(y.square().sum() + v.sin().sum() + q.cos().sum(), [x, *leaves]), y]

    for found, expected in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_keep_the_adapter() -> None:
    """B A is far below the rounding of W in 16 bits, so there the two are not added before they meet x."""
    base = linear(16, 16, False, torch.bfloat16)
    base.weight.data.fill_(1.0)
    a, b = torch.full((1, 16), 0.01), torch.full((16, 1), 0.01)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        with_adapter = FusedMatmuls().fused(x - x.mean(1, keepdim=True), [AdaptedWeight(base, a, b)])[0].float()
    assert with_adapter.isfinite().all()
    small = torch.full((4, 16), 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        difference = FusedMatmuls().fused(small * 0 + 1, [AdaptedWeight(base, 100 * a, b)])[0].float() - 16
    torch.testing.assert_close(difference, torch.full((4, 16), 0.16), rtol=0.5, atol=0.1)


class Unpacked:
    """A linear whose weight is made when it is asked for; `together`: the most that were in memory at once."""

    in_features, out_features, bias, quantized = 8, 6, None, None
    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    together = 0

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = torch.ones(6, 8, dtype=dtype)
        self.alive.add(weight.untyped_storage())
        Unpacked.together = max(self.together, len(self.alive))
        return weight


def test_16_bits_hold_one_weight_at_a_time() -> None:
    """Nor does a result keep the others: queries and keys go once they are rotated."""
    parts = [AdaptedWeight(Unpacked(), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = FusedMatmuls().fused(torch.randn(4, 8, requires_grad=True), parts)
    assert len({y.untyped_storage().data_ptr() for y in out}) == 3
    torch.autograd.backward(out, [torch.ones_like(y) for y in out])
    assert Unpacked.together == 1


def test_a_model_without_adapters_is_untouched(folder: Path) -> None:
    model = load_model(folder)
    assert isinstance(model, Transformer)
    assert not list(adapted(model))


def test_what_is_trained_is_float32(folder: Path) -> None:
    """A step of 1e-4 on a bfloat16 of 0.05 is rounded away: a module that is trained whole would never learn."""
    model = load_model(folder, "bfloat16")
    inject(model, LoraSettings(r=4, modules_to_save=("lm_head", "norm")))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_parameter("model.layers.0.mlp.up_proj.base_layer.weight").dtype == torch.bfloat16
    gradients = target_gradients(model, model(IDS, ops=training_ops(CPU, adapters=True)))
    assert {"lm_head.weight", "model.norm.weight"} <= gradients.keys()


def test_trained_modules_beside_an_adapter_learn(folder: Path) -> None:
    """A linear trained whole stands in one group with adapted ones: it is none of the frozen."""
    found = []
    for ops in (PLAIN, training_ops(CPU, adapters=True)):
        torch.manual_seed(0)
        model = load_model(folder)
        inject(model, LoraSettings(r=4, target_modules=("q_proj", "up_proj"), modules_to_save=("k_proj", "down_proj")))
        perturb(p for name, p in model.named_parameters() if "lora_" in name)
        gradients = target_gradients(model, model(IDS, ops=ops))
        assert {"model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= gradients.keys()
        found.append(gradients)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", [None, "q4"])
def test_adapters_and_operations_in_any_order(folder: Path, scheme: str | None) -> None:
    """What computes belongs to no model: made before the adapters or after them, losses and gradients are equal to the bit."""
    found = []
    for ops_first in (True, False):
        torch.manual_seed(0)
        model = load_model(folder)
        if scheme is not None:
            quantize_model(model, model.config.parameters, scheme)
        before = training_ops(CPU, adapters=True, checkpointing=True)
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        model(IDS, ops=before)  # linears that are trained whole, and none is remembered as such
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        inject(model, LoraSettings(r=4))
        perturb(p for name, p in model.named_parameters() if "lora_" in name)
        logits = model(IDS, ops=before if ops_first else training_ops(CPU, adapters=True, checkpointing=True))
        found.append((logits.detach(), target_gradients(model, logits)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
