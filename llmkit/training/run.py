"""A recipe from start to end: tokenizer, documents, model, loop, and a Hugging Face folder out."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from llmkit.checkpoint.arrays import Fingerprint
from llmkit.checkpoint.load import empty_model, load_model, usable_device
from llmkit.checkpoint.source import ModelSource
from llmkit.compat import keep_freed_memory
from llmkit.errors import ConfigError, LLMKitError, UsageError
from llmkit.families import read_config
from llmkit.lora.fused import training_ops, without_adapters
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, check_writable, write_adapter
from llmkit.model.layers import Ops
from llmkit.model.transformer import Transformer, init_weights
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.data.documents import training_texts
from llmkit.training.data.packing import RowStream, row_length, sequential_batches
from llmkit.training.data.sources import Corpus, load_corpora
from llmkit.training.loop import CheckpointFile, EvaluateBatch, Hooks, Learner, Trainer
from llmkit.training.objective import Distillation, Dpo, Objective, Orpo
from llmkit.training.parallel import Processes, gathered
from llmkit.training.recipe import DistillRecipe, DpoRecipe, LoraRecipe, OrpoRecipe, Recipe, TokenizerRecipe, to_dict
from llmkit.training.report import Report, make_trackers

_WRITTEN = "# Written by llmkit finetune: every key of the run in this folder."  # the first line of its recipe.yaml


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its things."""

    root: Path

    @property
    def model(self) -> Path:
        """The Hugging Face folder, rewritten with every checkpoint."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The PEFT folder of a run with `lora`, in the place of `model`."""
        return self.root / "adapter"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.pt"

    @property
    def recipe(self) -> Path:
        """What the run was made with, every key told."""
        return self.root / "recipe.yaml"

    def result(self, recipe: Recipe) -> Path:
        """Return the folder that people take away."""
        return self.model if recipe.lora is None else self.adapter

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Raise UsageError where the run would replace what it has not made."""
        if not resume and self.checkpoint.exists():
            raise UsageError(f"{self.root} already holds a run. Go on with it (--resume), or choose another output.")
        result = self.result(recipe)
        if not resume and result.exists():  # its checkpoint was deleted to free the disk: it is what somebody kept
            raise UsageError(f"{result} exists and would be replaced. Choose another output, or take it away.")
        if (resume and self.checkpoint.exists()) or not self.recipe.exists():
            return
        with self.recipe.open("rb") as file:
            if file.readline().rstrip() != _WRITTEN.encode():
                raise UsageError(
                    f"{self.recipe} was not written by a run and would be replaced. Choose another output, or rename that file."
                )


# Continues prompts with a model (a folder or a hub id) and perhaps an adapter: what a person would get, one text for each.
Sampler = Callable[[str, Path | None, Sequence[str]], list[str]]


def run_recipe(recipe: Recipe, resume: bool = False, sample: Sampler | None = None, source: ModelSource | None = None) -> Path:
    """Train as the recipe says and return the folder with the result: a Hugging Face model, or with `lora` a PEFT adapter.

    resume: go on from the run's last checkpoint. sample: continues the recipe's prompts at evaluations.
    source: the recipe's model, where somebody has opened it already.

    Raises:
        LLMKitError: of the kind that fits; TrainingError where the loss stops being a number.
        KeyboardInterrupt: after an orderly stop with a checkpoint.
    """
    folder = RunFolder(Path(recipe.output))
    processes = Processes(recipe.device == "cpu", recipe.parallel)
    device = _device(recipe.device, processes)
    folder.check(recipe, resume)
    report = _open_report(recipe, folder, processes, resume)
    with processes.main_first():  # it downloads and trains what the others then find
        if source is None and isinstance(recipe.model, str):
            source = ModelSource.open(recipe.model)
        tokenizer_folder = _tokenizer_folder(recipe, folder, source, resume or not processes.is_main)
    tokenizer = load_tokenizer(tokenizer_folder)
    # Rows are as long as the model allows unless the recipe says less; from here on the recipe says what the run really does.
    recipe = replace(recipe, max_length=row_length(recipe.max_length, None if source is None else source.config.max_position_embeddings))
    assert recipe.max_length is not None
    train, held, data_report = load_corpora(recipe.data, tokenizer, recipe.held_out, recipe.max_length, recipe.preference)
    if device.type == "cpu":
        # Freed pieces up to this size are kept for the next step. Where memory is short (checkpointing was chosen for it) smaller ones:
        # a quarter slower, and nearly no holes.
        keep_freed_memory(largest=(2 if recipe.checkpointing else 32) << 20)
    model = _model(recipe, source, tokenizer, device)
    integers = _integers(recipe, model)
    ops = training_ops(device, adapters=recipe.lora is not None, checkpointing=bool(recipe.checkpointing), integers=integers)
    _check_lengths(recipe, model, tokenizer)
    if (recipe.keep == "best" or recipe.early_stop is not None) and not len(held):
        raise UsageError("keep=best and early_stop compare held-out losses, and no document is held out. Raise held_out.")
    group = 2 if recipe.preference else 1  # a pair is two documents of one row
    stream = RowStream(train, [data.weight for data in recipe.data], recipe.max_length, recipe.seed, recipe.epochs, group)
    report.say(
        f"{_parameters(model)}; {len(train):,} documents, {train.target_count:,} supervised tokens, "
        f"{stream.rows_per_epoch:,} rows of {group * recipe.max_length} per epoch; {len(held):,} documents held out"
    )
    for line in (*data_report.lines(), *_notes(recipe, integers)):
        report.say(line)
    export = _Exporter(recipe, folder.result(recipe), source, tokenizer_folder, tokenizer, processes)
    export.check(model)  # before the training: after hours of it nobody wants to hear that it cannot be written
    objective = _objective(recipe, model, ops, tokenizer)
    hooks = Hooks(
        evaluate=_Evaluation(recipe, held, objective) if len(held) else None,
        export=export,
        sample=None if sample is None or not recipe.prompts else partial(_samples, recipe, export, sample),
    )
    checkpoint = CheckpointFile(folder.checkpoint, _origin(recipe, export.base))
    trainer = Trainer(Learner(model, objective), stream, recipe, report, checkpoint, hooks, processes)
    if resume:
        trainer.resume()
        if changes := _changes(folder.recipe, recipe):
            report.say(f"changed since the checkpoint: {', '.join(changes)}")
    # Last of all: until here the run may have been refused, and the old recipe.yaml is that of the checkpoint.
    if processes.is_main:
        _write_recipe(recipe, folder.recipe)
    trainer.train()
    return export.target


def _open_report(recipe: Recipe, folder: RunFolder, processes: Processes, resume: bool) -> Report:
    folder.root.mkdir(parents=True, exist_ok=True)
    trackers = make_trackers(recipe.trackers, folder.root) if processes.is_main else []
    report = Report(folder.root, trackers=trackers, silent=not processes.is_main)
    if not resume and processes.is_main:
        report.metrics.unlink(missing_ok=True)
    return report


def _write_recipe(recipe: Recipe, path: Path) -> None:
    """Replace the file whole: it may be the one that the run was started from."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f"{_WRITTEN}\n{yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)}", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _changes(path: Path, recipe: Recipe) -> list[str]:
    """The keys that are others than the run was made with, as "epochs 7 -> 3"; of a file that is gone or no recipe, none."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    now = yaml.safe_load(yaml.safe_dump(to_dict(recipe)))  # as a file would say it: tuples are lists there
    free = ("output", "checkpointing")  # a path of many spellings; a choice by the memory that is free
    if not isinstance(before, dict):
        return []
    return [line for key, value in now.items() if key not in free for line in _differences(key, before.get(key), value)]


def _differences(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name, value in now.items():
            yield from _differences(f"{key}.{name}", before.get(name), value)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{key}.{index}", *pair)
    elif before != now:
        yield f"{key} {json.dumps(before)} -> {json.dumps(now)}"


def _origin(recipe: Recipe, base: Fingerprint | None) -> dict[str, Any]:
    """What the weights of a checkpoint depend on beside their shapes: an adapter on its model and its scale, all on the loss."""
    origin: dict[str, Any] = {"loss": recipe.loss}
    if recipe.lora is not None:
        # A checkpoint holds A and B alone: with another base, or another scale, the same factors are another model.
        scale = (recipe.lora.alpha, recipe.lora.use_rslora)
        origin |= {"model": None if base is None else base.to_dict(), "quantize": recipe.quantize, "lora.alpha or use_rslora": scale}
    return origin


def _parameters(model: Transformer) -> str:
    """How many numbers are trained, and how many there are: those that the description names, however stored, and what an adapter adds."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    described = model.config.parameters
    added = sum(count for name, count in trained.items() if name not in described)
    return f"{sum(trained.values()):,} of {added + sum(math.prod(param.shape) for param in described.values()):,} parameters are trained"


def _notes(recipe: Recipe, integers: bool) -> Iterator[str]:
    """What of the recipe is slower or other than it may seem."""
    if recipe.lora is not None and (recipe.lora.use_dora or recipe.lora.dropout):
        yield f"{'use_dora' if recipe.lora.use_dora else 'dropout'} of lora takes more products than plain lora does, and is slower"
    if integers:
        yield "the frozen weights compute forwards with integers, as in generating (integer_forward)"


class _Evaluation:
    """Held-out figures over all sources and for each: the mean loss in nats; of supervised tokens in bits per byte, too."""

    def __init__(self, recipe: Recipe, held: Corpus, objective: Objective) -> None:
        self.recipe, self.objective = recipe, objective
        self.group = 2 if recipe.preference else 1
        self.corpora: dict[str, Corpus] = {}
        for index, source in enumerate(recipe.data):
            documents = (held.sources == index).nonzero()[0]
            if recipe.eval_documents:  # the first ones of each source, the same at every evaluation: figures of one run compare
                documents = documents[: recipe.eval_documents * self.group]
            if len(documents):
                name = Path(source.path).stem
                self.corpora[name if name not in self.corpora else f"{name}_{index}"] = held.select(documents)

    def __call__(self, evaluate: EvaluateBatch) -> dict[str, float]:
        assert self.recipe.max_length is not None
        figures: dict[str, float] = {}
        total: dict[str, float] = {}
        normalizer, size = 0, 0
        for name, corpus in self.corpora.items():
            sums: dict[str, float] = {}
            count = 0
            for batch in sequential_batches(corpus, self.recipe.max_length, self.recipe.batch_size, self.group):
                for figure, value in evaluate(batch).items():
                    sums[figure] = sums.get(figure, 0.0) + value
                count += self.objective.normalizer(batch)
            bytes_ = int(corpus.target_bytes.sum())
            if len(self.corpora) > 1:
                figures |= self._figures(f"{name}_", sums, count, bytes_)
            total = {figure: total.get(figure, 0.0) + value for figure, value in sums.items()}
            normalizer, size = normalizer + count, size + bytes_
        return {**self._figures("eval_", total, normalizer, size), **figures}

    def _figures(self, prefix: str, sums: dict[str, float], normalizer: int, size: int) -> dict[str, float]:
        found = {f"{prefix}{figure}": value / normalizer for figure, value in sums.items()}
        if not self.recipe.preference:
            # Nats per token depend on how long a tokenizer's tokens are; bits for a byte of text compare across tokenizers.
            found[f"{prefix}bits_per_byte"] = sums["loss"] / math.log(2) / size
        return found


class _Exporter:
    """Writes what people take away: the model's folder, or the adapter's."""

    def __init__(
        self, recipe: Recipe, target: Path, source: ModelSource | None, tokenizer_folder: Path, tokenizer: Tokenizer, processes: Processes
    ) -> None:
        """source: the model that training started from; None where it was made."""
        self.recipe, self.target, self.processes = recipe, target, processes
        self.tokenizer_folder, self.tokenizer = tokenizer_folder, tokenizer
        self.base = source.fingerprint if source is not None and recipe.lora is not None else None

    def __call__(self, model: nn.Module, target: Path | None = None) -> None:
        assert isinstance(model, Transformer)
        target = target or self.target
        if self.recipe.lora is None:
            # Every process takes part in gathering, though one alone writes.
            weights = gathered(dict(model.named_parameters())) if self.processes.kind == "fsdp" else None
            if self.processes.is_main:
                whole = model
                if weights is not None:
                    whole = empty_model(model.config)
                    whole.load_state_dict(weights, strict=True, assign=True)
                from llmkit.checkpoint.save import save_model

                save_model(whole, target, source=self.tokenizer_folder, dtype=self.recipe.save_dtype, overwrite=True)
            return
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if self.processes.kind == "fsdp":
            trained = gathered(trained)
        if self.processes.is_main:
            self._write_adapter(model, trained, target)

    def check(self, model: Transformer) -> None:
        """Raise UsageError where what is trained could not be written in the end."""
        if self.recipe.lora is not None:
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            check_writable(self._parts(model, trained), model.config, self._settings(self.recipe.lora))

    def _settings(self, lora: LoraRecipe) -> AdapterSettings:
        assert isinstance(self.recipe.model, str)
        return AdapterSettings(lora.r, lora.alpha, lora.use_rslora, lora.use_dora, base_model_name_or_path=self.recipe.model)

    def _parts(self, model: Transformer, trained: dict[str, Tensor]) -> AdapterWeights:
        """Factors and, of a DoRA, magnitudes by path; weights trained whole by name."""
        from llmkit.lora.inject import NAME, adapted

        assert self.recipe.lora is not None
        paths = [path for path, _ in adapted(model)]
        factors = {path: (trained[f"{path}.lora_A.{NAME}.weight"], trained[f"{path}.lora_B.{NAME}.weight"]) for path in paths}
        magnitudes = {path: trained[f"{path}.magnitude"] for path in paths} if self.recipe.lora.use_dora else {}
        # What is left of the trained parameters are modules that are trained whole (modules_to_save).
        saved = {name: tensor for name, tensor in trained.items() if "lora_" not in name and not name.endswith(".magnitude")}
        return AdapterWeights(factors, magnitudes, saved)

    def _write_adapter(self, model: Transformer, trained: dict[str, Tensor], target: Path) -> None:
        assert self.recipe.lora is not None
        template = self.tokenizer.chat_template
        write_adapter(
            target,
            self._parts(model, trained),
            model.config,
            self._settings(self.recipe.lora),
            base=self.base,
            chat_template=None if template is None else template.source(),
            overwrite=True,
        )


def _samples(recipe: Recipe, export: _Exporter, sample: Sampler, model: nn.Module) -> list[str]:
    """Samples come from a folder such as a person would use, so that they show what that folder really does."""
    with TemporaryDirectory(dir=recipe.output) as folder:  # on the run's disk: /tmp may be memory, and a model is large
        target = Path(folder) / export.target.name
        export(model, target)
        if not export.processes.is_main:
            return []
        try:
            if recipe.lora is None:
                return sample(str(target), None, recipe.prompts)
            assert isinstance(recipe.model, str)
            return sample(recipe.model, target, recipe.prompts)
        except LLMKitError as error:  # a prompt that is too long must not end hours of training
            return [f"no samples: {error}"]


def _objective(recipe: Recipe, model: Transformer, ops: Ops, tokenizer: Tokenizer) -> Objective:
    if recipe.loss == "dpo":
        settings = recipe.dpo or DpoRecipe()
        before = (model, without_adapters(ops)) if recipe.lora is not None else (copy.deepcopy(model).requires_grad_(False).eval(), ops)
        return Dpo(before, settings.beta, settings.label_smoothing, ops=ops)
    if recipe.loss == "orpo":
        return Orpo((recipe.orpo or OrpoRecipe()).beta, ops=ops)
    if recipe.loss == "distill":
        assert recipe.distill is not None
        return Distillation(_teacher(recipe.distill, model, tokenizer), recipe.distill.temperature, recipe.distill.weight, ops=ops)
    return Objective(ops=ops)


def _teacher(settings: DistillRecipe, student: Transformer, tokenizer: Tokenizer) -> Transformer:
    device = next(student.parameters()).device
    source = ModelSource.open(settings.teacher)
    teacher = load_model(source, device=str(device), quantize=settings.quantize)
    if teacher.config.vocab_size != student.config.vocab_size:
        raise UsageError(
            f"distill.teacher {settings.teacher} has a vocabulary of {teacher.config.vocab_size}, the student of "
            f"{student.config.vocab_size}. Take a teacher with the same tokenizer."
        )
    # Distributions over ids are compared, so every id must mean the same: names of tokenizers do not tell, their tokens do.
    theirs = load_tokenizer(source.folder)
    differs = next((i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) != theirs.token_bytes(i)), None)
    if differs is not None:
        raise UsageError(
            f"distill.teacher {settings.teacher} has {theirs.token(differs)!r} for id {differs}, the student "
            f"{tokenizer.token(differs)!r}. Take a teacher with the same tokenizer."
        )
    return teacher.requires_grad_(False).eval()


def _tokenizer_folder(recipe: Recipe, folder: RunFolder, source: ModelSource | None, resume: bool) -> Path:
    """The folder of the tokenizer, which is trained where the recipe says so and, with `resume`, none is there."""
    given = recipe.tokenizer
    if not isinstance(given, TokenizerRecipe):
        if given is None:
            assert source is not None  # the recipe refuses a configuration without a tokenizer
            return source.folder
        return ModelSource.open(given).folder
    if not (resume and (folder.tokenizer / "tokenizer.json").is_file()):
        from llmkit.training.data.vocabulary import train_tokenizer

        train_tokenizer(given, training_texts(recipe.data, recipe.held_out), folder.tokenizer, row_length(recipe.max_length, None))
        tokenizer = load_tokenizer(folder.tokenizer)
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids), **recipe.generation}
        (folder.tokenizer / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return folder.tokenizer


def _model(recipe: Recipe, source: ModelSource | None, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The model to train on its device: float32 weights, or with `lora` frozen ones as they are stored and a float32 adapter."""
    if source is None:
        model = _new_model(recipe, tokenizer).to(device)
    elif recipe.lora is not None:
        return _adapted(recipe, recipe.lora, source, load_model(source, device=str(device), quantize=recipe.quantize))
    elif source.quantized:
        raise UsageError(f"the weights of {recipe.model} are quantized and cannot be trained. Set lora: {{}}, or take the original.")
    else:
        model = load_model(source, dtype="float32", device=str(device))
    torch.manual_seed(recipe.seed)  # whatever loading has drawn, training starts from the recipe's seed
    return model


def _new_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """A model with random weights, from the configuration that the recipe gives; what it leaves out is the tokenizer's."""
    assert isinstance(recipe.model, Mapping)
    hf = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": recipe.max_length,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
        "dtype": recipe.save_dtype,
        **recipe.model,
    }
    # As if it stood in a config.json: keys of the recipe win, and what nobody says is left to the family.
    model = Transformer(read_config({name: value for name, value in hf.items() if value is not None}))
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    return model


def _adapted(recipe: Recipe, lora: LoraRecipe, source: ModelSource, model: Transformer) -> Transformer:
    """The model with an adapter to be trained. PEFT is imported here and in its like: it takes seconds, and only lora needs it."""
    from llmkit.lora.inject import LoraSettings, inject, start_from

    torch.manual_seed(recipe.seed)
    inject(
        model,
        LoraSettings(
            lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.use_rslora, lora.use_dora, modules_to_save=lora.modules_to_save
        ),
    )
    if recipe.adapter is not None:
        from llmkit.lora.adapter import check_base, read_adapter

        adapter = read_adapter(recipe.adapter, model.config)
        check_base(adapter, source, "Set model to that one, or put it into the weights first (llmkit merge --any-base).")
        start_from(model, adapter)
    return model


def _integers(recipe: Recipe, model: Transformer) -> bool:
    """Whether frozen weights compute forwards in integers: where they can, unless the recipe says otherwise."""
    if recipe.lora is None or recipe.integer_forward is False:
        return False
    from llmkit.lora.inject import integers_possible

    possible = integers_possible(model)
    if recipe.integer_forward and not possible:
        raise UsageError(
            "integer_forward needs q4 or q8 weights on a CPU and the native kernels. Set quantize=q4, or drop integer_forward."
        )
    return possible


def _check_lengths(recipe: Recipe, model: Transformer, tokenizer: Tokenizer) -> None:
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:  # an embedding may be larger, padded for speed; a smaller one lacks rows
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size is {config.vocab_size}. "
            "Leave model.vocab_size out or raise it."
        )
    assert recipe.max_length is not None
    if recipe.max_length > config.max_position_embeddings:
        raise UsageError(
            f"max_length is {recipe.max_length}, more than the model's {config.max_position_embeddings} positions. "
            f"Set max_length={config.max_position_embeddings} or less."
        )


def _device(name: str, processes: Processes) -> torch.device:
    if name == "auto":
        return processes.device
    device = usable_device(name)
    return processes.device if device.type == processes.device.type else device
