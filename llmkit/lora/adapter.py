"""An adapter in PEFT's format, read for a model: its low-rank terms by our names, whatever the family calls or fuses. No torch.

A folder holds adapter_config.json and adapter_model.safetensors with keys `base_model.model.<module>.lora_A.weight [r, in]` and
`lora_B.weight [out, r]`; `<module>.weight` alone is a weight that was trained as a whole (modules_to_save, biases). Where a family's
tensor is several of ours, A is shared and B is cut by rows:

    gate_up_proj:  W + B A      B = [Bg      gate_proj: Wg + Bg A
                                     Bu]     up_proj:   Wu + Bu A
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.checkpoint.arrays import NUMPY_DTYPES, Fingerprint, parameter_array, parameter_shapes, parse_fingerprint
from llmkit.checkpoint.files import PICKLES, TensorFile, open_safetensors, read_json, read_metadata
from llmkit.checkpoint.hub import ADAPTER, resolve
from llmkit.checkpoint.source import ModelSource
from llmkit.checkpoint.weights import EMBEDDING, HEAD, STACKED_EXPERTS, Piece, is_transposed, parts_of, reading_rules
from llmkit.config import ModelConfig, MoEConfig
from llmkit.errors import CheckpointError
from llmkit.families import family
from llmkit.kernels.format import widen
from llmkit.lora.settings import METADATA, PREFIX, AdapterSettings, parse_settings

ANY_BASE = "Load it with that model, or take it all the same (any_base, --any-base)."
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_EXPERTS = re.compile(r"model\.layers\.(\d{1,9})\.mlp\.experts(\.base_layer)?")
_LONGEST_KEY = 300  # characters; patterns are matched against it
_MAX_LISTED = 100


class LowRank(NamedTuple):
    """A term of a weight `[out, in]`: W + b @ a, with the scale in b."""

    a: NDArray[np.float32]  # [rank, in]
    b: NDArray[np.float32]  # [out, rank]


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes of a model, by our names.

    linears: low-rank terms by the path of the linear, "model.layers.0.mlp.up_proj"; of an embedding too, whose weight is
        `[vocab, hidden]`.
    magnitudes: where it is a DoRA, the length that each row of W + b @ a is scaled to, float32 `[out]`, by the same paths.
    replaced: weights and biases that were trained as a whole, by parameter name, as they are stored (bfloat16 as uint16).
    base, template: fingerprints of what it was trained on; None where it does not say.
    """

    name: str
    folder: Path
    settings: AdapterSettings
    linears: Mapping[str, LowRank]
    magnitudes: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)
    base: Fingerprint | None = None
    template: str | None = None

    def native_problem(self, config: ModelConfig) -> str | None:
        """Return why the native step cannot run it with a model of this config, or None."""
        runs = {name for name, param in config.parameters.items() if param.role == "linear"}
        other = next((path for path in self.linears if f"{path}.weight" not in runs), None)
        what = "DoRA magnitudes" if self.magnitudes else "weights trained as a whole" if self.replaced else other and f"a term on {other}"
        return f"the adapter {self.name!r} has {what}, which the native step does not run" if what else None

    @property
    def does_nothing(self) -> bool:
        """Whether the model is the same with it: no training step was made, or the wrong file was kept."""
        return not self.magnitudes and not self.replaced and not any(term.b.any() and term.a.any() for term in self.linears.values())


def read_adapter(source: str | Path, config: ModelConfig, *, name: str | None = None, revision: str | None = None) -> Adapter:
    """Read an adapter for a model of this config.

    source: a folder, a hub id or HUB_ID@REVISION. name: the last part of it by default.
    Raises CheckpointError where it is missing, damaged or does not fit the model: everything that is wrong in one message.
    """
    folder = resolve(source, revision, ADAPTER)
    if name is None:
        name = Path(folder).resolve().name if Path(folder) == Path(source).expanduser() else str(source).partition("@")[0].split("/")[-1]
    path = _weights_file(folder)
    problems: list[str] = []
    settings = parse_settings(read_json(folder / ADAPTER.config), problems)
    reader = _Reader(config, settings, problems)
    reader.read(open_safetensors(path))
    if not problems and not reader.linears and not reader.replaced:
        problems.append("it holds no LoRA weights at all")
    if problems:
        raise _mismatch(folder, settings, problems)
    fingerprints = _fingerprints(path)
    template = fingerprints.get("chat_template")
    return Adapter(
        name=name,
        folder=folder,
        settings=settings,
        linears=reader.linears,
        magnitudes=reader.magnitudes,
        replaced=reader.replaced,
        base=parse_fingerprint(fingerprints.get("base")),
        template=template if isinstance(template, str) else None,
    )


def check_base(adapter: Adapter, model: ModelSource, remedy: str = ANY_BASE) -> None:
    """Raise CheckpointError, with the remedy, where an adapter is proven to have been trained on other weights than those of a model."""
    base = None if adapter.base is None else model.fingerprint
    if base is not None and adapter.base is not None and base.differs(adapter.base):
        trained = adapter.settings.base_model_name_or_path
        raise CheckpointError(
            f"the adapter {adapter.name!r} was trained on another model than {model.folder}: the weights differ"
            f"{'' if trained is None else f' from those of {trained!r:.200}'}. {remedy}"
        )


def _weights_file(folder: Path) -> Path:
    path = folder / ADAPTER.weights
    if not (folder / ADAPTER.config).is_file():
        kind = "It is a model, not an adapter. " if (folder / "config.json").is_file() else ""
        raise CheckpointError(f"{folder} has no {ADAPTER.config}. {kind}Give the folder of a PEFT adapter.")
    if not path.is_file():
        pickles = [file.name for file in folder.iterdir() if file.name.startswith("adapter_model") and file.name.endswith(PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{folder} has only a pickle file ({pickles[0]}), which can run code and is never opened. Convert it once, where you trust "
                "it: peft.PeftModel.from_pretrained(MODEL, FOLDER).save_pretrained(NEW_FOLDER) writes safetensors."
            )
        raise CheckpointError(f"{folder} has no {ADAPTER.weights}. Is the adapter complete?")
    return path


def _mismatch(folder: Path, settings: AdapterSettings, problems: list[str]) -> CheckpointError:
    count = len(problems)
    listed = "\n  ".join(problems[:_MAX_LISTED] + [f"and {count - _MAX_LISTED} more"] * (count > _MAX_LISTED))
    trained = "" if settings.base_model_name_or_path is None else f" It was trained on {settings.base_model_name_or_path!r:.200}."
    return CheckpointError(f"The adapter {folder} does not fit this model:\n  {listed}\nGive an adapter that was trained on it.{trained}")


def _fingerprints(path: Path) -> Mapping[str, Any]:
    """What `write_adapter` noted in the file's header; empty for an adapter from elsewhere."""
    try:
        found = json.loads(read_metadata(path).get(METADATA, "{}"))
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Reader:
    """Goes through the tensors of an adapter, and notes what does not fit."""

    def __init__(self, config: ModelConfig, settings: AdapterSettings, problems: list[str]) -> None:
        self.config, self.settings, self.problems = config, settings, problems
        self.rules = reading_rules(family(config.model_type), config)
        self.expected = parameter_shapes(config)  # by our names
        self.expected.setdefault(HEAD, self.expected[EMBEDDING])  # a tied head that an adapter parts from the embedding
        self.linears: dict[str, LowRank] = {}
        self.magnitudes: dict[str, NDArray[np.float32]] = {}
        self.replaced: dict[str, np.ndarray] = {}

    def read(self, tensors: Mapping[str, TensorFile]) -> None:
        modules: dict[str, dict[str, TensorFile]] = {}  # "model.layers.0.mlp.up_proj" -> "lora_A" -> its tensor
        # PEFT leaves an adapter's name out of the keys when it saves, but keys of a training state have it: lora_A.default.weight.
        names: set[str] = set()
        for key, tensor in tensors.items():
            if tensor.dtype not in NUMPY_DTYPES:
                self.problems.append(f"wrong dtype: {key} is {tensor.dtype}, weights are {', '.join(NUMPY_DTYPES)}")
                continue
            if len(key) > _LONGEST_KEY:  # before any pattern is matched against it
                self.problems.append(f"unknown: a key of {len(key)} characters, {key[:80]!r}...")
                continue
            module, kind, name = _split(key.removeprefix(PREFIX))
            names.update([name] if name else [])
            if kind is None:
                self._replace(tensor, module)
            elif kind.endswith(".bias"):
                self.problems.append(f"{key} is a bias of the low-rank term (lora_bias), which llmkit does not run")
            elif kind in modules.setdefault(module, {}):
                self.problems.append(f"given twice: {kind} of {module}")
            else:
                modules[module][kind] = tensor
        if len(names) > 1:
            self.problems.append(f"the file holds several adapters: {', '.join(sorted(names))}")
        for module, parts in modules.items():
            self._module(module, parts)

    def _module(self, module: str, parts: Mapping[str, TensorFile]) -> None:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        needed = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if missing := [kind for kind in needed if kind not in parts]:
            return self.problems.append(f"missing: {', '.join(missing)} of {module}")
        if surplus := set(parts) - {*needed, "lora_magnitude_vector"}:
            return self.problems.append(f"surplus: {', '.join(sorted(surplus))} of {module}")
        first, second = (parts[kind] for kind in needed)
        if len(first.shape) != 2 or len(second.shape) != 2:
            return self.problems.append(f"wrong shape: {module} has {list(first.shape)} and {list(second.shape)}, not two matrices")
        a, b = _floats(first), _floats(second)  # [r, in] and [out, r]
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return self.problems.append(f"not a number: {module} has values that are not finite")
        experts = _EXPERTS.fullmatch(module)
        if experts is not None:
            return self._experts(int(experts[1]), module, a, b, "lora_magnitude_vector" in parts)
        if embedding:  # W [vocab, hidden] + A' B' with A' [r, vocab] and B' [hidden, r]
            a, b = b.T, a.T
            if "lora_magnitude_vector" in parts:
                return self.problems.append(f"{module} is an embedding with DoRA, which llmkit does not run")
        rank = len(a)
        if b.shape[1] != rank or rank != self.settings.rank(module):
            return self.problems.append(
                f"wrong shape: {module} has rank {rank} and {b.shape[1]}, where {ADAPTER.config} has {self.settings.rank(module)}"
            )
        # The scale goes into B once, so that nobody who computes with the term can forget it. In float32: alpha / r is rarely a power of 2.
        b = b * np.float32(self.settings.scale(module, rank))
        magnitude = _floats(parts["lora_magnitude_vector"]).reshape(-1) if "lora_magnitude_vector" in parts else None
        if self.settings.use_dora != (magnitude is not None) and not embedding:
            return self.problems.append(
                f"use_dora is {self.settings.use_dora}, but {module} has {'a' if magnitude is not None else 'no'} magnitude"
            )
        if magnitude is not None and (len(magnitude) != len(b) or not np.isfinite(magnitude).all()):
            return self.problems.append(f"wrong shape: the magnitude of {module} has {len(magnitude)} numbers, not {len(b)} finite ones")
        for ours, piece in self._pieces(module, (len(b), a.shape[1]), first.file):
            rows = slice(*(piece.rows or (0, len(b))))  # of B, where the module is several of our linears: A is theirs together
            self._add(ours, LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b[rows])))
            if magnitude is not None:
                self.magnitudes[ours.removesuffix(".weight")] = magnitude[rows]

    def _pieces(self, module: str, shape: tuple[int, int], file: Path) -> Iterator[tuple[str, Piece]]:
        """Yield our weights of a module whose weight has this shape [out, in], where they fit."""
        # The rules that map a checkpoint's tensors map a module too: a tensor without data, of the shape that its weight must have.
        name = f"{module}.weight"
        stored = shape[::-1] if is_transposed(name, self.rules) else shape
        for ours, piece in parts_of(
            TensorFile(name, "F32", stored, memoryview(b""), file, 0), self.rules, self.config, self.problems
        ).items():
            if ours not in self.expected:
                self.problems.append(
                    f"unknown: {module} is no part of this model (it would be {ours} of {self.config.num_hidden_layers} layers)"
                )
            elif self.expected[ours] != piece.shape:
                self.problems.append(f"wrong shape: {module} gives {list(piece.shape)} to {ours}, which is {list(self.expected[ours])}")
            else:
                yield ours, piece

    def _add(self, ours: str, term: LowRank) -> None:
        path = ours.removesuffix(".weight")
        if path in self.linears:
            self.problems.append(f"given twice: the term of {path}")
        self.linears[path] = term

    def _experts(self, layer: int, module: str, a: np.ndarray, b: np.ndarray, dora: bool) -> None:
        """transformers 5 keeps the experts of a layer in two parameters [experts, out, in], and PEFT wraps one around the other.

        a [experts * r, in] is ordered by experts, b [out, r * experts] by ranks (peft/tuners/lora/layer.py, ParamWrapper).
        """
        moe = self.config.layers[layer].feed_forward if layer < self.config.num_hidden_layers else None
        if not isinstance(moe, MoEConfig):
            return self.problems.append(f"unknown: {module} is no part of this model, whose layer {layer} has no experts")
        hidden, size, count = self.config.hidden_size, moe.expert.intermediate_size, moe.num_experts
        shape = (len(b), a.shape[1])
        # The keys do not say which of the two it is (PEFT wraps one around the other); the shapes of the terms do.
        names = {(2 * size, hidden): "gate_up_proj", (hidden, size): "down_proj"}
        if shape not in names or len(a) % count or len(a) != b.shape[1] or dora:
            wanted = " or ".join(f"{name} {list(sizes)}" for sizes, name in names.items())
            return self.problems.append(
                f"wrong shape: {module} has B {list(b.shape)} and A {list(a.shape)}, not those of {count} of {wanted}"
            )
        rank, parameter = len(a) // count, f"model.layers.{layer}.mlp.experts.{names[shape]}"
        if rank != self.settings.rank(parameter):
            return self.problems.append(f"wrong shape: {parameter} has rank {rank}, not {self.settings.rank(parameter)}")
        each_a = a.reshape(count, rank, -1)  # [experts, r, in]
        each_b = b.reshape(len(b), rank, count).transpose(2, 0, 1) * np.float32(self.settings.scale(parameter, rank))  # [experts, out, r]
        rule = next(rule for rule in STACKED_EXPERTS if rule.theirs.endswith(names[shape]))
        for expert in range(count):
            for ours, part in zip(rule.ours, np.split(each_b[expert], len(rule.ours)), strict=True):
                self._add(ours.format(i=layer, j=expert), LowRank(each_a[expert], np.ascontiguousarray(part)))

    def _replace(self, tensor: TensorFile, name: str) -> None:
        """Note a weight or bias that was trained as a whole, or that PEFT saved beside a term (lm_head, embeddings)."""
        stored = TensorFile(name, tensor.dtype, tensor.shape, tensor.data, tensor.file, tensor.offset)
        for ours, piece in parts_of(stored, self.rules, self.config, self.problems).items():
            if ours not in self.expected:
                self.problems.append(f"unknown: {tensor.name} is no part of this model")
            elif self.expected[ours] != piece.shape:
                self.problems.append(
                    f"wrong shape: {tensor.name} gives {list(piece.shape)} to {ours}, which is {list(self.expected[ours])}"
                )
            elif ours in self.replaced:
                self.problems.append(f"given twice: {ours}")
            else:
                self.replaced[ours] = parameter_array(piece)


def _split(key: str) -> tuple[str, str | None, str | None]:
    """Return the module of a key without its prefix, what it is of a low-rank term, and the adapter's name, where it has one.

    For a weight that was trained as a whole: its own name, without PEFT's wrappers, None, and the adapter's name.
    """
    for kind in _KINDS:
        module, dot, tail = key.rpartition(f".{kind}")
        if dot and tail[:1] in ("", "."):
            rest = tail.split(".")[1:]
            leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
            if len(rest) < 2:
                return module, kind if leaf == "weight" else f"{kind}.bias", rest[0] if rest else None
    saved = re.fullmatch(r"(.+)\.modules_to_save\.([^.]+)\.([^.]+)", key)
    if saved is not None:
        return f"{saved[1]}.{saved[3]}", None, saved[2]
    return re.sub(r"\.base_layer(?=\.[^.]+$)", "", key), None, None


def _floats(tensor: TensorFile) -> NDArray[np.float32]:
    return widen(parameter_array(Piece(tensor, tensor.shape)))
