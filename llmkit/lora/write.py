"""An adapter as a PEFT folder, by the names and layouts of the family's transformers model: `PeftModel.from_pretrained` reads it.

Where the family keeps several of our linears in one, the terms are put together exactly, rank beside rank:

    gate_up_proj:  [Bg 0       [Ag
                    0  Bu]  @   Au]
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.checkpoint.arrays import Fingerprint, text_fingerprint
from llmkit.checkpoint.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, copy_side_files, replacing, write_json
from llmkit.checkpoint.weights import EMBEDDING, HEAD, STACKED_EXPERTS, OutputTensor, stored_as, writing_rules
from llmkit.config import ModelConfig, MoEConfig, Role
from llmkit.errors import UsageError
from llmkit.families import family
from llmkit.lora.settings import METADATA, PREFIX, AdapterSettings

# What transformers 5 keeps in one stacked parameter of a layer's experts -> the linears of each expert that stand in it.
_SPREAD = {rule.theirs.rpartition(".")[2]: [name.split(".")[-2] for name in rule.ours] for rule in STACKED_EXPERTS}


@dataclass(frozen=True)
class AdapterWeights:
    """What an adapter was trained to, by our names.

    linears: A `[rank, in]` and B `[out, rank]`, without the scale, by the path of the linear, "model.layers.0.mlp.up_proj"; of an
        embedding too, whose weight is `[vocab, hidden]`.
    magnitudes: of a DoRA, `[out]` by the same paths. modules_to_save: weights and biases trained as a whole, by parameter name.
    """

    linears: Mapping[str, tuple[Tensor, Tensor]]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)


def write_adapter(
    folder: str | Path,
    weights: AdapterWeights,
    config: ModelConfig,
    settings: AdapterSettings,
    *,
    base: Fingerprint | None = None,
    chat_template: str | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    settings: their r, lora_alpha and so on; its patterns are of our paths.
    base: fingerprint of the model it was trained on (see `checkpoint/arrays.py`). chat_template: the text of the template it was
        trained with, which is written next to it. source: a model folder whose tokenizer is copied.
    overwrite: replace an adapter that is there.
    Raises UsageError where a target cannot be written in PEFT's format, all of them named, or where the folder may not be replaced.
    """
    target = Path(os.path.realpath(os.path.expanduser(folder)))
    _check_target(target, overwrite)
    writer = _Writer(config, settings, weights)
    tensors = _exchangeable(writer)
    # What it was trained on goes into the header of the weights, which PEFT and transformers keep and pass over: adapter_config.json
    # is written again by whoever loads and saves the adapter, and keys that PEFT does not know are lost there.
    fingerprints: dict[str, Any] = {} if base is None else {"base": base.to_dict()}
    if chat_template is not None:
        fingerprints["chat_template"] = text_fingerprint(chat_template)
    from safetensors.torch import save_file

    with replacing(target) as partial:
        write_json(partial / ADAPTER_CONFIG, writer.config_json())
        if source is not None:
            copy_side_files(Path(source), partial)
        if chat_template is not None:
            # The template of the base may be changed after the training; the adapter has learned this one.
            (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt", METADATA: json.dumps(fingerprints)})
        (partial / ADAPTER_WEIGHTS).chmod((partial / ADAPTER_CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        _sync(partial / ADAPTER_WEIGHTS)


def check_writable(weights: AdapterWeights, config: ModelConfig, settings: AdapterSettings) -> None:
    """Raise the UsageError of `write_adapter` for what PEFT's format has no place for, without writing: before the training."""
    _exchangeable(_Writer(config, settings, weights))


def _exchangeable(writer: _Writer) -> dict[str, Tensor]:
    tensors = writer.tensors()
    if writer.problems:
        listed = "\n  ".join(writer.problems)
        raise UsageError(f"the adapter cannot be written in PEFT's format:\n  {listed}\nTrain other target modules.")
    if not tensors:
        raise UsageError("the adapter has no weights to write. Train at least one module.")
    return tensors


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file, and an adapter is saved as a folder. Choose another name.")
    if any(target.iterdir()) and not (overwrite and (target / ADAPTER_CONFIG).is_file()):
        what = "is not an adapter" if overwrite else "exists and is not empty"
        raise UsageError(f"{target} {what}, so it is not replaced. Choose another folder{'' if overwrite else ', or overwrite it'}.")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class _Writer:
    """Puts the terms together module by module, and notes what PEFT's format has no place for."""

    def __init__(self, config: ModelConfig, settings: AdapterSettings, weights: AdapterWeights) -> None:
        self.config, self.settings, self.params = config, settings, config.parameters
        self.shapes = {name: param.shape for name, param in self.params.items()}
        # A tied head is no parameter of ours, but PEFT may part it from the embedding.
        self.shapes.setdefault(HEAD, self.shapes[EMBEDDING])
        self.expert_names = {_leaf(name.removesuffix(".weight")) for name, param in self.params.items() if param.role == "expert"}
        self.rules = writing_rules(family(config.model_type))
        self.linears = {path: (_plain(a), _plain(b)) for path, (a, b) in weights.linears.items()}
        self.magnitudes = {path: _plain(magnitude) for path, magnitude in weights.magnitudes.items()}
        self.replaced = {name: tensor.detach().cpu() for name, tensor in weights.modules_to_save.items()}
        if config.tie_word_embeddings and EMBEDDING in self.replaced:
            self.replaced.setdefault(HEAD, self.replaced[EMBEDDING])  # ours is the head too; PEFT's is a copy beside it
        self.problems: list[str] = []
        # What `tensors` finds out for adapter_config.json. Ranks and alphas by module, or stacked parameter of experts.
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.modules: set[str] = set()  # target_modules, as paths
        self.parameters: set[str] = set()  # target_parameters
        self.saved: list[str] = []  # modules_to_save
        self.transposed = False  # fan_in_fan_out: GPT-2 stores its linears as [in, out]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by PEFT's keys, and note on the way what `config_json` says of it."""
        out: dict[str, Tensor] = {}
        # The tensor of the family's model -> our linears in it, as q_proj, k_proj and v_proj in Phi-3's qkv_proj.
        fused: dict[OutputTensor, list[str]] = defaultdict(list)
        # "model.layers.0.mlp.experts" -> "up_proj" -> number of the expert -> path.
        experts: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        for path, (a, b) in self.linears.items():
            shape = self.shapes.get(f"{path}.weight")
            if shape is None or len(shape) != 2 or (b.shape[0], a.shape[1]) != shape or b.shape[1] != a.shape[0]:
                self.problems.append(f"{path} has A {list(a.shape)} and B {list(b.shape)}, which fit no linear of the model")
            elif self._role(path) == "expert":
                module, index, leaf = path.rsplit(".", 2)
                experts[module][leaf][int(index)] = path
            else:
                fused[self._place(path)].append(path)
        for stored, paths in fused.items():
            out |= self._module(stored, paths)
        out |= self._experts(experts)
        out |= self._replaced()
        if self.settings.use_dora and (self.parameters or len(self.magnitudes) != len(self.linears)):
            self.problems.append("DoRA on experts, routers, embeddings or on some modules only, which PEFT does not run")
        return {PREFIX + name: tensor.contiguous() for name, tensor in out.items()}

    def _place(self, path: str) -> OutputTensor:
        """Where transformers keeps a linear; a router is found in transformers 5 under our name, whatever the family's files call it."""
        name = f"{path}.weight"
        return OutputTensor(name, (name,)) if self._role(path) == "router" else stored_as(name, self.rules)

    def _role(self, path: str) -> Role | None:
        """What a linear is for, by its path; None for a tied head and for what this model has not."""
        param = self.params.get(f"{path}.weight")
        return None if param is None else param.role

    def _by_parameter(self, path: str) -> bool:
        """Whether PEFT must be told the parameter (target_parameters), not the module.

        So it is with routers, which are no linears in transformers 5, and in a model with experts with the MLPs of its dense layers
        (Qwen 3 MoE has such): in target_modules PEFT takes their names for those of experts.
        """
        return self._role(path) == "router" or (self._role(path) == "linear" and _leaf(path) in self.expert_names)

    def _term(self, path: str, scale: float) -> tuple[Tensor, Tensor]:
        """Return A and B so that `scale` B A is what the linear's own scale makes of them: terms that are put together share one scale."""
        a, b = self.linears[path]
        own = self.settings.scale(path, len(a))
        return a, b if own == scale else b * (own / scale)

    def _note(self, name: str, rank: int, scale: float) -> None:
        self.ranks[name] = rank
        self.alphas[name] = scale * (rank**0.5 if self.settings.use_rslora else rank)

    def _module(self, stored: OutputTensor, paths: list[str]) -> dict[str, Tensor]:
        """Return the term of one module: those of our linears in it, block-diagonal, with zero rows for linears that have none."""
        module = stored.name.removesuffix(".weight")
        members = [name.removesuffix(".weight") for name in stored.ours if name.removesuffix(".weight") in paths]
        scale = self.settings.scale(members[0], len(self.linears[members[0]][0]))
        terms = {path: self._term(path, scale) for path in members}
        rank = sum(len(a) for a, _ in terms.values())
        b = torch.zeros(sum(self.shapes[name][0] for name in stored.ours), rank)  # [out of all, sum of ranks]
        row = column = 0
        for name in stored.ours:
            term = terms.get(name.removesuffix(".weight"))
            rows = self.shapes[name][0]
            if term is not None:
                b[row : row + rows, column : column + len(term[0])] = term[1]
                column += len(term[0])
            row += rows
        a = torch.cat([a for a, _ in terms.values()])  # [sum of ranks, in]
        if self._by_parameter(members[0]):
            self._note(stored.name, rank, scale)
            self.parameters.add(stored.name.split(".", 3)[3])
        else:
            self._note(module, rank, scale)
            self.modules.add(module)
            self.transposed |= stored.transpose
        if self._role(members[0]) in ("embedding", "positions"):  # B [vocab, r] and A [r, hidden] are PEFT's A and B, transposed
            return {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        out = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if self.settings.use_dora:
            # PEFT scales all rows of a module or none; there is no magnitude that leaves a row as it is, as its norm moves with B A.
            lacking = [name for name in stored.ours if name.removesuffix(".weight") not in self.magnitudes]
            if lacking:
                self.problems.append(f"DoRA on a part of {module} ({', '.join(members)}); it takes one on {', '.join(lacking)} too")
            else:
                out[f"{module}.lora_magnitude_vector"] = torch.cat([self.magnitudes[name.removesuffix(".weight")] for name in stored.ours])
        return out

    def _experts(self, experts: Mapping[str, Mapping[str, Mapping[int, str]]]) -> dict[str, Tensor]:
        """Return the terms of all experts of a layer in one (see `_Reader._experts`); where there is none, zeros."""
        # Stacked parameters of which an expert was trained somewhere: then PEFT wants them in every layer.
        used = {stacked for stacked, parts in _SPREAD.items() if any(part in layer for layer in experts.values() for part in parts)}
        out: dict[str, Tensor] = {}
        if not used:
            return out
        self.parameters |= {f"mlp.experts.{stacked}" for stacked in used}
        paths = [path for layer in experts.values() for of_part in layer.values() for path in of_part.values()]
        scale = self.settings.scale(paths[0], len(self.linears[paths[0]][0]))
        # Every expert has the same rank in a stack: the largest of any, smaller ones are filled up with zeros.
        ranks = {part: max((len(self.linears[path][0]) for layer in experts.values() for path in layer.get(part, {}).values()), default=0)
                 for parts in _SPREAD.values() for part in parts}  # fmt: skip
        for index, layer in enumerate(self.config.layers):
            if not isinstance(layer.feed_forward, MoEConfig):
                continue
            module = f"model.layers.{index}.mlp.experts"
            for stacked in sorted(used, reverse=True):  # PEFT wraps gate_up_proj first, and down_proj around it
                parts = _SPREAD[stacked]
                each = [self._expert(f"{module}.{j}", parts, ranks, scale) for j in range(layer.feed_forward.num_experts)]
                a, b = torch.stack([a for a, _ in each]), torch.stack([b for _, b in each])  # [experts, r, in], [experts, out, r]
                name = f"{module}.base_layer" if len(used) > 1 and stacked == "gate_up_proj" else module
                out[f"{name}.lora_A.weight"] = a.flatten(0, 1)  # [experts * r, in]
                out[f"{name}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)  # [out, r * experts]
                self._note(f"{module}.{stacked}", a.shape[1], scale)
        return out

    def _expert(self, expert: str, parts: list[str], ranks: Mapping[str, int], scale: float) -> tuple[Tensor, Tensor]:
        """Return A `[r, in]` and B `[out, r]` of one expert's part of a stack, block-diagonal as in `_module`."""
        rank = sum(ranks[part] for part in parts)
        sizes = [self.shapes[f"{expert}.{part}.weight"] for part in parts]
        a, b = torch.zeros(rank, sizes[0][1]), torch.zeros(sum(rows for rows, _ in sizes), rank)
        row = column = 0
        for part, (rows, _) in zip(parts, sizes, strict=True):
            if f"{expert}.{part}" in self.linears:
                own_a, own_b = self._term(f"{expert}.{part}", scale)
                a[column : column + len(own_a)] = own_a
                b[row : row + rows, column : column + len(own_a)] = own_b
            row, column = row + rows, column + ranks[part]
        return a, b

    def _replaced(self) -> dict[str, Tensor]:
        """Return modules that were trained as a whole: PEFT saves a module with all of its parameters."""
        out: dict[str, Tensor] = {}
        wanted = dict.fromkeys(name.rpartition(".")[0] for name in self.replaced)
        for path in wanted:
            names = [f"{path}.{leaf}" for leaf in ("weight", "bias") if f"{path}.{leaf}" in self.shapes]
            if not names or self._role(path) in ("expert", "router"):
                self.problems.append(f"{path} trained as a whole, which is no module that PEFT saves")
                continue
            for name in names:
                stored = stored_as(name, self.rules)
                if lacking := [ours for ours in stored.ours if ours not in self.replaced]:
                    self.problems.append(f"{path} trained as a whole without {', '.join(lacking)}, which PEFT saves together with it")
                    continue
                whole = torch.cat([self.replaced[ours] for ours in stored.ours])  # a copy: two tensors of a file share no memory
                out[stored.name] = whole.T if stored.transpose else whole
                module = stored.name.rpartition(".")[0]
                if module not in self.saved:
                    self.saved.append(module)
        return out

    def config_json(self) -> dict[str, Any]:
        """Return adapter_config.json. Where every module of a name was trained, PEFT is told the name, else the paths.

        Names keep a config of a line in place of hundreds, and people read them.
        """
        r, alpha = self.settings.r, self.settings.lora_alpha
        # Modules of several of our linears have ranks of their own, and with them (alpha / rank is the scale) alphas.
        ranks = _compact(self.ranks)
        alphas = _compact({name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in self.alphas.items()})
        every = {self._place(name.removesuffix(".weight")).name.removesuffix(".weight") for name in self.shapes if name.endswith(".weight")}
        leaves = {module.rpartition(".")[2] for module in self.modules}
        whole = {module for module in every if module.rpartition(".")[2] in leaves} == self.modules
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.settings.base_model_name_or_path,
            "inference_mode": True,
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "use_rslora": self.settings.use_rslora,
            "use_dora": self.settings.use_dora,
            "bias": "none",
            "fan_in_fan_out": self.transposed,
            "target_modules": sorted(leaves if whole else self.modules),
            "target_parameters": sorted(self.parameters) or None,
            "modules_to_save": self.saved or None,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        }


def _compact(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return patterns for values by path: the last name alone, where all that end in it agree."""
    leaves: dict[str, set[Any]] = defaultdict(set)
    for path, value in values.items():
        leaves[_leaf(path)].add(value)
    return {_leaf(path) if len(leaves[_leaf(path)]) == 1 else re.escape(path): value for path, value in values.items()}


def _leaf(path: str) -> str:
    """The last name of a path, "gate.weight" where it is a parameter's."""
    return ".".join(path.split(".")[-2:]) if path.endswith(".weight") else path.rpartition(".")[2]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
