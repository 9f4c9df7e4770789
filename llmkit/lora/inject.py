"""Adapters onto a model, to be trained: PEFT finds the linears and makes the factors, `fused.py` computes with them."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmkit.compat import bitsandbytes, register_peft_linears
from llmkit.errors import UsageError
from llmkit.kernels.format import widen
from llmkit.kernels.training_ops import training_kernels
from llmkit.lora.fused import LoraLinear
from llmkit.model.transformer import Transformer

if TYPE_CHECKING:
    from llmkit.lora.adapter import Adapter

bitsandbytes()  # before PEFT imports it, so that it says nothing of kernels that are not used

from peft import LoraConfig, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402

NAME = "default"  # PEFT's name for the only adapter
HEAD = "lm_head"


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is made of, by PEFT's names (`r`, `lora_alpha`, ...).

    target_modules: "all-linear" (every linear of the layers), or names: `up_proj`, or the end of a path, `layers.0.mlp.up_proj`.
    init_lora_weights: True (A as nn.Linear, B zero) or "gaussian". modules_to_save: modules trained whole beside the adapter.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    modules_to_save: tuple[str, ...] = ()


class PeftLinear(LoraLinear, LoraLayer):
    """A linear with an adapter whose factors PEFT makes, under PEFT's names."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False  # our linears are [out, in] in every family; a transposed one is turned on loading
        self._active_adapter = adapter_name
        layer: Any = self  # nn.Module's attributes have types that PEFT's do not fit
        # PEFT makes A [rank, in] and B [out, rank] in containers of its own (lora_A.default), so that keys and trainers find them there.
        layer.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        # PEFT gives the factors the dtype of the base. They are trained, and so float32: a step of 1e-4 on a bfloat16 of 0.05 is lost.
        self.get_submodule("lora_A").float()
        self.get_submodule("lora_B").float()
        layer.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.scale = float(layer.scaling[adapter_name])
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else None
        self.magnitude = None
        if config.use_dora:
            # B is zero, so these are the lengths of W's rows, and the model starts as it was.
            self.magnitude = nn.Parameter(self.row_norms().detach().clone())

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): None}  # DoRA is ours: PEFT's wants a dense weight

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.get_parameter(f"lora_A.{NAME}.weight"), self.get_parameter(f"lora_B.{NAME}.weight")


def inject(model: Transformer, settings: LoraSettings) -> None:
    """Freeze the model and put a new adapter beside its linears; random numbers come from torch's generator.

    What is trained is float32, whatever the frozen weights are stored in.

    Raises UsageError where a target or a module to save is not there, or cannot be trained.
    """
    model.requires_grad_(False)
    # By role, not by class: a linear is any module that gives what the description calls one, dense or in codes.
    roles = ("linear", "expert", "router", "head")
    linears = [name.removesuffix(".weight") for name, param in model.config.parameters.items() if param.role in roles]
    targets = find_targets(settings.target_modules, linears)
    saved = _modules_to_save(model, settings.modules_to_save)
    both = sorted(set(targets) & set(saved))
    if both:
        raise UsageError(f"{both[0]} is among lora.target_modules and lora.modules_to_save. Take it out of one of them.")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init_lora_weights,
    )
    register_peft_linears(config, {type(model.get_submodule(name)): PeftLinear for name in targets})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft speaks of checkpoints it saves itself
        inject_adapter_in_model(config, model, adapter_name=NAME)
    # PEFT leaves bases as it finds them and factors trainable, magnitudes are ours: said once for all of them.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith(".magnitude"))
    for name in saved:
        model.get_submodule(name).float().requires_grad_(True)


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the linears with an adapter, by our path: `model.layers.0.mlp.up_proj`."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def integers_possible(model: Transformer) -> bool:
    """Return whether frozen linears can compute forwards in integers: q4 or q8 under an adapter, on a CPU with native kernels."""
    return training_kernels() is not None and any(linear.base.quantized is not None for _, linear in adapted(model))


@torch.no_grad()
def start_from(model: Transformer, adapter: Adapter) -> None:
    """Give the new adapter the values of one that was trained before.

    Raises UsageError where the two are not of the same modules and ranks.
    """
    own = dict(adapted(model))
    if own.keys() != adapter.linears.keys() or any(
        (linear.magnitude is not None) != (path in adapter.magnitudes) for path, linear in own.items()
    ):
        raise UsageError(
            f"the adapter {adapter.folder} has other modules than lora.target_modules and lora.use_dora ask for. Make them equal."
        )
    for path, linear in own.items():
        a, b = linear.factors
        term = adapter.linears[path]
        if term.a.shape != tuple(a.shape):
            raise UsageError(f"the adapter {adapter.folder} has the rank {len(term.a)} on {path}, lora.r is {len(a)}. Make them equal.")
        a.copy_(torch.from_numpy(term.a))
        b.copy_(torch.from_numpy(term.b) / linear.scale)  # a term that was read has the scale of its own settings in B
        if linear.magnitude is not None:
            linear.magnitude.copy_(torch.from_numpy(adapter.magnitudes[path]))
    parameters = dict(model.named_parameters())
    for name, array in adapter.replaced.items():
        if name not in parameters or not parameters[name].requires_grad:
            raise UsageError(f"the adapter {adapter.folder} has weights of its own for {name}. Name its module in lora.modules_to_save.")
        parameters[name].copy_(torch.from_numpy(widen(array)))


def find_targets(wanted: str | Sequence[str], linears: Sequence[str]) -> list[str]:
    """Return the paths among `linears` that are meant: "all-linear" is every one but the head; a name is the end of a path.

    Raises UsageError for a name that matches nothing.
    """
    if wanted == "all-linear":
        return [name for name in linears if name != HEAD]
    if not wanted:
        raise UsageError('lora.target_modules names nothing, so nothing would be trained. Leave it out for "all-linear".')
    found: dict[str, None] = {}  # a set that keeps its order
    for target in (wanted,) if isinstance(wanted, str) else wanted:
        hits = [name for name in linears if name == target or name.endswith("." + target)]
        if not hits:
            known = sorted({name.rpartition(".")[2] for name in linears})
            near = difflib.get_close_matches(target, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"This model has {', '.join(known)}."
            raise UsageError(f"lora.target_modules names {target!r}, which matches no linear. {remedy}")
        found.update(dict.fromkeys(hits))
    return list(found)


def _modules_to_save(model: Transformer, wanted: Sequence[str]) -> list[str]:
    found = []
    for target in wanted:
        hits = [name for name, module in model.named_modules() if name and (name == target or name.endswith("." + target))]
        if not hits:
            raise UsageError(f"lora.modules_to_save names {target!r}, which this model does not have. A head that is not tied is lm_head.")
        for name in hits:
            parameters = list(model.get_submodule(name).parameters())
            if not parameters or any(not parameter.is_floating_point() for parameter in parameters):
                raise UsageError(f"lora.modules_to_save names {name}, whose weights are quantized and cannot be trained. Leave it out.")
        found += hits
    return found
