"""Recipes: a YAML file plus `key=value` overrides as one frozen dataclass. No torch.

The dataclasses below are the only description of the keys: they parse, check, print the help and are stored with the
run. An unknown key, a wrong type or a combination that cannot work is a `UsageError` naming the key and, where one is
near, the key that was probably meant.
"""

# ruff: noqa: RUF009  (key() only describes a field)
from __future__ import annotations

import dataclasses
import difflib
import os
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llmkit.errors import UsageError

_NAMES_ELSEWHERE = {  # what other trainers call our keys, for whoever types those
    "lr": "learning_rate",
    "steps": "max_steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accumulation",
    "max_seq_length": "max_length",
    "output_dir": "output",
    "gradient_checkpointing": "checkpointing",
    "dataset": "data",
    "base_model": "model",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_rank": "lora.r",
    "lora.rank": "lora.r",
    "load_in_4bit": "quantize",
}
_SHORT = reprlib.Repr()  # YAML's aliases let a few lines stand for a value whose whole repr fills the memory
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def key(help: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A recipe key with its one-line description."""
    metadata = {"help": help}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Source:
    """One entry of `data`."""

    path: str = key("a .jsonl, .json, .csv, .parquet, .txt or .md file, *.jsonl, a folder, one of train/valid/test.jsonl, or a hub id")
    weight: float = key("how often each document is seen per epoch; 0.5: a fresh random half each epoch", 1.0)
    format: Literal["auto", "text", "jsonl", "hub"] = key("auto: by the file's ending; hub: path is a data set's id", "auto")
    separator: str = key("parts the documents of a text file", "<|endoftext|>")
    special_tokens: bool = key("of text, and of prompts without a template: special tokens written in it count as such", False)
    columns: dict[str, Any] = key("a layout's key -> the key that the rows have instead, as {text: story}", factory=dict)
    chat: bool | None = key("prompt/completion rows through the chat template; default: where there is a template", None)
    chat_template_kwargs: dict[str, Any] = key("variables of the chat template, as {enable_thinking: false}", factory=dict)
    learn: Literal["completion", "last", "chosen", "all"] = key(
        "which tokens are targets: what the assistant says, its last turn only, the chosen of two answers, or everything", "completion"
    )
    overlong: Literal["cut", "drop", "error"] = key("longer than max_length; cut: text goes on in a further row, a chat ends", "cut")
    bad_rows: Literal["error", "drop"] = key("rows that are no document, or that the chat template refuses", "error")
    limit: int | None = key("read at most so many documents of each split", None)
    name: str | None = key("of a hub id: the configuration", None)
    split: str | None = key("of a hub id or a folder with splits: the one to train on; default: train, and valid is held out", None)
    streaming: bool = key("of a hub id: read while downloading, nothing is kept", False)
    held_out: float | None = key("share of documents held out, instead of the recipe's held_out; 1 is evaluation only", None)


@dataclass(frozen=True)
class TokenizerRecipe:
    """A byte-level BPE to be trained on the recipe's own text."""

    vocab_size: int = key("entries, special tokens and the 256 bytes included")
    special_tokens: tuple[str, ...] = key("added in this order, from id 0", ("<|endoftext|>",))
    bos: str | None = key("begins every document", "<|endoftext|>")
    eos: str = key("ends every document", "<|endoftext|>")
    chat_template: str | None = key("a Jinja chat template; {% generation %} marks what is learned", None)


@dataclass(frozen=True)
class LoraRecipe:
    """A low-rank adapter beside a frozen model (arXiv:2106.09685)."""

    r: int = key("the rank", 16)
    alpha: float = key("the adapter is scaled by alpha / r", 32.0)
    dropout: float = key("of the adapter's input", 0.0)
    target_modules: str | tuple[str, ...] = key("all-linear, or names: [up_proj, down_proj]", "all-linear")
    use_rslora: bool = key("scale by alpha / sqrt(r) (arXiv:2312.03732)", False)
    use_dora: bool = key("learn the length of each row, too (arXiv:2402.09353)", False)
    modules_to_save: tuple[str, ...] = key("modules that are trained whole beside it: [lm_head]", ())


@dataclass(frozen=True)
class DpoRecipe:
    """Direct preference optimization (arXiv:2305.18290)."""

    beta: float = key("how strongly the model is held to what it was", 0.1)
    label_smoothing: float = key("share of pairs that are taken to be the wrong way round", 0.0)


@dataclass(frozen=True)
class OrpoRecipe:
    """Odds ratio preference optimization (arXiv:2403.07691): no reference model."""

    beta: float = key("weight of the odds ratio beside the loss of the chosen answer", 0.1)


@dataclass(frozen=True)
class DistillRecipe:
    """Learning a teacher's probabilities (arXiv:1503.02531)."""

    teacher: str = key("a checkpoint with the same tokenizer")
    quantize: Literal["q4", "q8", "nf4"] | None = key("hold the teacher in so few bits", None)
    temperature: float = key("both distributions are softened by it", 1.0)
    weight: float = key("share of the teacher in the loss; the rest is the data", 0.5)


@dataclass(frozen=True)
class Recipe:
    """All keys of a recipe, with their defaults."""

    model: str | dict[str, Any] = key("a checkpoint (folder or hub id), or a config.json mapping to start from scratch")
    data: tuple[Source, ...] = key("the sources that are mixed")
    output: str = key("the run's folder: model/ or adapter/, checkpoint.pt, metrics.jsonl, loss.png")
    tokenizer: str | TokenizerRecipe | None = key("a folder, or a mapping to train one; default: the model's own", None)

    lora: LoraRecipe | None = key("train an adapter beside the frozen model, {} for the defaults; without it all weights are trained", None)
    adapter: str | None = key("a PEFT adapter to go on from", None)
    quantize: Literal["q4", "q8", "nf4"] | None = key("hold the frozen model in so few bits (QLoRA)", None)
    integer_forward: bool | None = key(
        "on a CPU a q4 or q8 model computes forwards as in generating, with integers, three times as fast; default: yes", None
    )
    loss: Literal["sft", "dpo", "orpo", "distill"] = key("sft: cross-entropy of the targets; dpo, orpo: pairs of answers", "sft")
    dpo: DpoRecipe | None = key("of loss: dpo", None)
    orpo: OrpoRecipe | None = key("of loss: orpo", None)
    distill: DistillRecipe | None = key("of loss: distill", None)

    max_length: int | None = key("tokens per packed row; default: the smaller of 2,048 and the model's context", None)
    batch_size: int = key("rows per forward pass", 8)
    grad_accumulation: int = key("forward passes per optimizer step", 1)
    held_out: float = key("share of documents kept for evaluation, chosen by a hash of their text", 0.01)

    max_steps: int | None = key("stop after this many optimizer steps", None)
    epochs: float | None = key("stop after this many passes over the data", None)
    max_minutes: float | None = key("stop after this much training time; the schedule follows the share that has passed", None)

    optimizer: Literal["adamw", "muon"] = key("muon: Muon for the hidden matrices, AdamW for the rest", "adamw")
    learning_rate: float = key("the peak", 1e-3)
    muon_learning_rate: float | None = key("the peak for Muon's matrices, in AdamW's scale; default: learning_rate", None)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key("wsd: constant, then linear over the decay share", "cosine")
    warmup_steps: int = key("steps of linear warm-up", 100)
    min_learning_rate: float = key("where the schedule ends, as a share of the peak", 0.1)
    decay: float = key("share of the run that wsd spends decaying", 0.2)
    weight_decay: float = key("on matrices only; not on norms, biases and embeddings", 0.1)
    beta1: float = key("AdamW", 0.9)
    beta2: float = key("AdamW", 0.95)
    max_grad_norm: float = key("gradients are clipped to this norm; 0: never", 1.0)
    ema: float | None = key("decay of a moving average of the weights, which is then evaluated and saved", None)

    seed: int = key("for the weights and the order of the data", 0)
    device: str = key("cpu, cuda, mps; auto takes the fastest there is", "auto")
    dtype: Literal["auto", "float32", "bfloat16"] = key("of products; what is trained stays float32; auto: bfloat16 on CUDA", "auto")
    checkpointing: bool | None = key("compute activations again on the way back; default: only where memory demands it", None)
    parallel: Literal["ddp", "fsdp"] = key("of several processes (torchrun): ddp, all hold the model; fsdp, each holds a part", "ddp")
    compile: bool = key("torch.compile the model (pays in long runs)", False)
    save_dtype: Literal["float32", "bfloat16", "float16"] = key("of the tensors in model/", "float32")

    generation: dict[str, Any] = key("defaults for sampling, written to generation_config.json of a model from scratch", factory=dict)

    log_every: int = key("steps between lines of metrics.jsonl", 10)
    eval_every: int = key("steps between evaluations; 0: only at the end", 250)
    eval_documents: int = key("held-out documents per source that an evaluation reads; 0: all", 200)
    save_every: int = key("steps between checkpoints; 0: by save_minutes and at the end only", 0)
    save_minutes: float = key("minutes between checkpoints; 0: by save_every and at the end only", 5.0)
    prompts: tuple[str, ...] = key("continued by the model at every evaluation, to look at", ())
    keep: Literal["last", "best"] = key("what is exported: the last weights, or those with the lowest held-out loss", "last")
    early_stop: int | None = key("end after so many evaluations in which the held-out loss did not fall", None)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = key("where the figures go beside metrics.jsonl", ())

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "max_length": (2, 2**20), "batch_size": (1, 2**20), "grad_accumulation": (1, 2**20), "held_out": (0, 0.9),
            "max_steps": (1, 2**40), "epochs": (1e-9, 1e9), "max_minutes": (1e-9, 1e9), "learning_rate": (1e-12, 10),
            "muon_learning_rate": (1e-12, 10), "warmup_steps": (0, 2**40), "min_learning_rate": (0, 1), "decay": (0, 1),
            "weight_decay": (0, 10), "beta1": (0, 0.99999), "beta2": (0, 0.9999999), "max_grad_norm": (0, 1e9), "ema": (0, 0.9999999),
            "seed": (0, 2**63 - 1), "log_every": (1, 2**40), "eval_every": (0, 2**40), "eval_documents": (0, 2**40),
            "save_every": (0, 2**40), "save_minutes": (0, 1e9), "early_stop": (1, 2**40),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            _within(name, getattr(self, name), low, high)
        if not re.fullmatch(r"auto|cpu|(cuda|mps)(:\d+)?", self.device):
            raise UsageError(f"device is {self.device!r:.40}, which is not a choice. Choose one of auto, cpu, cuda, cuda:1, mps.")
        if not self.data:
            raise UsageError("data lists no source. Give at least one, as in data: [{path: stories.txt}].")
        for index, source in enumerate(self.data):
            _within(f"data.{index}.weight", source.weight, 0, 1000)
            _within(f"data.{index}.held_out", source.held_out, 0, 1)
            _within(f"data.{index}.limit", source.limit, 1, 2**40)
            if not all(isinstance(column, str) for column in (*source.columns, *source.columns.values())):
                raise UsageError(f"data.{index}.columns is {_SHORT.repr(source.columns)}, which maps no names to names. Correct the value.")
        if self.max_steps is None and self.epochs is None and self.max_minutes is None:
            raise UsageError("Nothing says when to stop. Set max_steps, epochs or max_minutes.")
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise UsageError(f"muon_learning_rate has no effect with optimizer={self.optimizer}. Set optimizer=muon or drop the key.")
        self._check_method()
        if isinstance(self.model, dict) and self.tokenizer is None:
            raise UsageError("model is a configuration without a tokenizer. Set tokenizer to a folder, or to a mapping to train one.")
        if isinstance(self.tokenizer, TokenizerRecipe):
            _check_tokenizer(self.tokenizer)
            if isinstance(self.model, str):
                raise UsageError(
                    f"a new tokenizer does not fit the trained embedding of {self.model}. "
                    "Drop tokenizer, or start from scratch with a mapping."
                )

    def _check_method(self) -> None:
        """Keys of a method without that method, and methods that do not go together."""
        lora = self.lora
        if lora is not None:
            _within("lora.r", lora.r, 1, 4096)
            _within("lora.alpha", lora.alpha, 1e-6, 1e6)
            _within("lora.dropout", lora.dropout, 0, 0.99)
            if isinstance(self.model, dict):
                raise UsageError(
                    "lora trains beside a trained model, and model is a configuration to start from scratch. Drop one of them."
                )
        for name in ("adapter", "quantize"):
            if getattr(self, name) is not None and lora is None:
                raise UsageError(
                    f"{name} has no effect without lora: all weights of the model are trained. Set lora: {{}}, or drop {name}."
                )
        if self.integer_forward is not None and lora is None:
            raise UsageError("integer_forward has no effect without lora. Drop it.")
        for name in ("dpo", "orpo", "distill"):
            if getattr(self, name) is not None and self.loss != name:
                raise UsageError(f"{name} has no effect with loss={self.loss}. Set loss={name}, or drop {name}.")
        if self.dpo is not None:
            _within("dpo.beta", self.dpo.beta, 1e-6, 1e3)
            _within("dpo.label_smoothing", self.dpo.label_smoothing, 0, 0.5)
        if self.orpo is not None:
            _within("orpo.beta", self.orpo.beta, 0, 1e3)
        if self.loss == "dpo" and lora is not None and lora.modules_to_save:
            raise UsageError(
                "loss=dpo compares with the frozen model, and lora.modules_to_save trains parts of it. Drop lora.modules_to_save."
            )
        if self.loss == "distill":
            if self.distill is None:
                raise UsageError("loss=distill needs a teacher. Set distill.teacher to a checkpoint.")
            _within("distill.temperature", self.distill.temperature, 0.01, 100)
            _within("distill.weight", self.distill.weight, 0, 1)
        if self.keep == "best" and not self.eval_every:
            raise UsageError("keep=best compares evaluations, and eval_every=0 makes one at the end only. Set eval_every.")
        if self.early_stop is not None and not self.eval_every:
            raise UsageError("early_stop counts evaluations, and eval_every=0 makes one at the end only. Set eval_every.")
        if lora is not None and self.optimizer == "muon":
            raise UsageError("optimizer=muon makes the updates of whole matrices orthogonal, which the factors of lora are not. Use adamw.")
        if self.parallel == "fsdp" and (self.ema is not None or self.optimizer == "muon"):
            raise UsageError(
                "ema and optimizer=muon need whole matrices, and parallel=fsdp cuts them. Use parallel=ddp, or adamw without ema."
            )
        if lora is not None and self.ema is not None:
            raise UsageError("ema averages the weights of a model, not of lora. Drop one of them.")

    @property
    def preference(self) -> bool:
        """Whether the data are pairs of answers."""
        return self.loss in ("dpo", "orpo")


def _check_tokenizer(tokenizer: TokenizerRecipe) -> None:
    for name, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
        if token is not None and token not in tokenizer.special_tokens:
            raise UsageError(f"tokenizer.{name} is {token!r}, which is not among tokenizer.special_tokens. Add it there.")
    least = 256 + len(tokenizer.special_tokens)
    if tokenizer.vocab_size < least:
        raise UsageError(f"tokenizer.vocab_size is {tokenizer.vocab_size}, but 256 bytes and the special tokens need {least}. Raise it.")


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        shown = f"{value:g}" if isinstance(value, float) else _SHORT.repr(value)
        lowest, highest = (f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in (low, high))
        raise UsageError(f"{name} is {shown}, which is out of range. Choose a value from {lowest} to {highest}.")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by `key=value` strings (dotted keys: `data.0.weight=2`).

    Raises:
        UsageError: the file, a key, a value or a combination cannot be right.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the recipe {path} cannot be read ({reason}). Give the path of a YAML file.") from None
    try:
        raw = _plain_yaml(text)
    except ValueError as error:
        raise UsageError(f"the recipe {path} is not YAML ({' '.join(str(error).split())}). Mend the line named.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"the recipe {path} is a {type(raw).__name__}, not a mapping of keys. See llmkit finetune --help.")
    for override in overrides:
        _override(raw, override)
    recipe: Recipe = _build(Recipe, raw, "")
    return recipe


def _plain_yaml(text: str) -> Any:
    """Plain values; ValueError whatever PyYAML's constructors raise (also for a 13th month, `!!int abc`, bottomless nesting)."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML-able data; `from_dict` reads it back."""
    return dataclasses.asdict(recipe)


def from_dict(raw: Mapping[str, Any]) -> Recipe:
    """The inverse of `to_dict`."""
    recipe: Recipe = _build(Recipe, raw, "")
    return recipe


def keys_help() -> str:
    """Every key with its type, default and meaning, for `llmkit finetune --help`."""
    return "\n".join(_help_lines(Recipe, ""))


def _help_lines(cls: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        default = "required" if required else f"default {_shown_default(item)}"
        yield f"{prefix}{item.name} ({_type_name(hints[item.name])}; {default}): {item.metadata['help']}"
        for inner in (hints[item.name], *get_args(hints[item.name])):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from _help_lines(inner, f"{prefix}{item.name}.{'N.' if get_origin(hints[item.name]) is tuple else ''}")


def _shown_default(item: dataclasses.Field[Any]) -> str:
    """As it would stand in YAML."""
    value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UsageError(f"{override!r} is not of the form key=value. Write, for instance, max_steps=100.")
    try:
        value = _plain_yaml(text)
    except ValueError:
        raise UsageError(f"the value in {override!r} cannot be read. Quote it as in YAML.") from None
    *path, last = name.split(".")
    node: Any = raw
    for depth, part in enumerate(path):
        if isinstance(node, dict):
            node = node.setdefault(part, {})
            continue
        if isinstance(node, list) and part == str(len(node)):  # one more source
            node.append({})
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise UsageError(f"{name} cannot be set: {'.'.join(path[: depth + 1])} does not exist in the recipe. Check the key.")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise UsageError(f"{name} cannot be set: {'.'.join(path) or 'the recipe'} holds no keys. Check the key.")


def _build(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        keys = ", ".join(item.name for item in dataclasses.fields(cls))
        raise UsageError(f"{where} is {_SHORT.repr(raw)}, not a mapping. Its keys are {keys}.")
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in raw:
        if name not in hints:
            alike = (f"{prefix}{near}" for near in difflib.get_close_matches(str(name), hints, 1, 0.5))
            meant = _NAMES_ELSEWHERE.get(f"{prefix}{name}") or next(alike, None)
            remedy = f"Did you mean {meant}?" if meant else f"Known keys are {', '.join(hints)}."
            raise UsageError(f"{prefix}{name} is not a key of a recipe. {remedy}")
    for item in dataclasses.fields(cls):
        if item.name not in raw and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UsageError(f"{prefix}{item.name} is missing. Set it: {item.metadata['help']}.")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in raw.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; the only liberties are int for float, YAML 1.1's `1e-3`, which it reads as a string,
    and a Path for a string."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options:
            if _may_be(option, value):
                return _convert(option, value, where)
        return _convert(options[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), arguments, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(arguments)}."
        raise UsageError(f"{where} is {_SHORT.repr(value)}, which is not a choice. {remedy}")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(arguments[0], entry, f"{where}.{index}") for index, entry in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):  # an integer of a thousand digits does not fit into a float
                pass
    elif hint is str and isinstance(value, os.PathLike):  # from Python
        return os.fspath(value)
    elif type(value) is hint:
        return value
    raise UsageError(f"{where} is {_SHORT.repr(value)}, which is not {_article(_type_name(hint))}. Correct the value.")


def _may_be(hint: Any, value: Any) -> bool:
    """Whether this of several types is the one that is meant by a mapping, a list or a plain value."""
    if dataclasses.is_dataclass(hint) or get_origin(hint) is dict:
        return isinstance(value, Mapping)
    return isinstance(value, (list, tuple)) == (get_origin(hint) is tuple) and not isinstance(value, Mapping)


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return "|".join(arguments)
    if origin is tuple:
        return "list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return {float: "number", int: "integer", str: "string", bool: "true|false"}.get(hint, "value")


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
