"""A recipe from start to end: tokenizer, documents, model, loop, and a Hugging Face folder out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from llmkit.checkpoint.hub import resolve
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.save import save_model
from llmkit.errors import ConfigError, LLMKitError, UsageError
from llmkit.families import read_config
from llmkit.model.transformer import Transformer, init_weights
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.corpus import Corpus, load_corpora
from llmkit.training.data import RowStream, sequential_batches
from llmkit.training.documents import training_texts
from llmkit.training.loop import Export, Trainer
from llmkit.training.loss import cross_entropy
from llmkit.training.recipe import Recipe, TokenizerRecipe, to_dict
from llmkit.training.report import Report
from llmkit.training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its things."""

    root: Path

    @property
    def model(self) -> Path:
        """The Hugging Face folder, rewritten with every checkpoint."""
        return self.root / "model"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.pt"


def run_recipe(recipe: Recipe, resume: bool = False, sample: Callable[[Path, str], str] | None = None) -> Path:
    """Train as the recipe says and return the Hugging Face folder with the result.

    resume: go on from the run's last checkpoint. sample: continues a prompt with the model in a folder, for looking at.

    Raises:
        LLMKitError: of the kind that fits; TrainingError where the loss stops being a number.
        KeyboardInterrupt: after an orderly stop with a checkpoint.
    """
    folder = RunFolder(Path(recipe.output))
    if not resume and folder.checkpoint.exists():
        raise UsageError(f"{folder.root} already holds a run. Go on with it (--resume), or choose another output.")
    folder.root.mkdir(parents=True, exist_ok=True)
    report = Report(folder.root)
    if not resume:
        report.metrics.unlink(missing_ok=True)

    tokenizer_folder = _tokenizer_folder(recipe, folder, resume)
    tokenizer = load_tokenizer(tokenizer_folder)
    train, held, data_report = load_corpora(recipe.data, tokenizer, recipe.held_out, recipe.max_length)
    device = _device(recipe.device)
    model = _model(recipe, tokenizer, device)
    _check_lengths(recipe, model, tokenizer)
    (folder.root / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")

    stream = RowStream(train, [source.weight for source in recipe.data], recipe.max_length, recipe.seed, recipe.epochs)
    report.say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(train):,} documents, {train.target_count:,} targets, "
        f"{stream.rows_per_epoch:,} rows of {recipe.max_length} per epoch; {len(held):,} documents held out"
    )
    for line in data_report.lines():
        report.say(line)

    def write(trained: nn.Module, target: Path = folder.model) -> None:
        assert isinstance(trained, Transformer)
        save_model(trained, target, source=tokenizer_folder, dtype=recipe.save_dtype, overwrite=True)

    trainer = Trainer(
        model,
        stream,
        recipe,
        report,
        folder.checkpoint,
        evaluate=_Evaluation(recipe, held) if len(held) else None,
        export=write,
        sample=_sampler(recipe, folder, write, sample),
    )
    if resume:
        trainer.resume()
    trainer.train()
    return folder.model


class _Evaluation:
    """Held-out loss in nats per token and in bits per byte, over all sources and for each."""

    def __init__(self, recipe: Recipe, held: Corpus) -> None:
        self.recipe = recipe
        self.corpora: dict[str, Corpus] = {}
        for index, source in enumerate(recipe.data):
            documents = (held.sources == index).nonzero()[0]
            if recipe.eval_documents:
                documents = documents[: recipe.eval_documents]
            if len(documents):
                name = Path(source.path).stem
                self.corpora[name if name not in self.corpora else f"{name}_{index}"] = held.select(documents)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        figures: dict[str, float] = {}
        total, targets, size = 0.0, 0, 0
        for name, corpus in self.corpora.items():
            nats, count = 0.0, 0
            for batch in sequential_batches(corpus, self.recipe.max_length, self.recipe.batch_size):
                nats += cross_entropy(model, batch.to(device)).item()
                count += batch.target_count
            bytes_ = int(corpus.target_bytes.sum())
            if len(self.corpora) > 1:
                figures[f"{name}_loss"] = nats / count
                figures[f"{name}_bits_per_byte"] = nats / math.log(2) / bytes_
            total, targets, size = total + nats, targets + count, size + bytes_
        return {"eval_loss": total / targets, "eval_bits_per_byte": total / math.log(2) / size, **figures}


def _sampler(
    recipe: Recipe, folder: RunFolder, write: Export, sample: Callable[[Path, str], str] | None
) -> Callable[[nn.Module], list[str]] | None:
    """Samples come from the folder a person would use, so that they show what that folder really does."""
    if sample is None or not recipe.prompts:
        return None

    def texts(model: nn.Module) -> list[str]:
        write(model)
        shown = []
        for prompt in recipe.prompts:
            try:
                shown.append(sample(folder.model, prompt))
            except LLMKitError as error:  # a prompt that is too long must not end hours of training
                shown.append(f"no sample for {prompt!r}: {error}")
        return shown

    return texts


def _tokenizer_folder(recipe: Recipe, folder: RunFolder, resume: bool) -> Path:
    if isinstance(recipe.tokenizer, TokenizerRecipe):
        if not (resume and (folder.tokenizer / "tokenizer.json").is_file()):
            train_tokenizer(recipe.tokenizer, training_texts(recipe.data, recipe.held_out), folder.tokenizer, recipe.max_length)
            tokenizer = load_tokenizer(folder.tokenizer)
            generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids), **recipe.generation}
            (folder.tokenizer / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        return folder.tokenizer
    name = recipe.tokenizer or recipe.model
    assert isinstance(name, str)  # the recipe refuses a configuration without a tokenizer
    return resolve(name)


def _model(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The model to train, float32, on its device."""
    if isinstance(recipe.model, str):
        return load_model(resolve(recipe.model), dtype="float32", device=str(device))
    hf = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": recipe.max_length,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
        "dtype": recipe.save_dtype,
        **recipe.model,
    }
    config = read_config({name: value for name, value in hf.items() if value is not None})
    model = Transformer(config)
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    torch.manual_seed(recipe.seed)
    return model.to(device)


def _check_lengths(recipe: Recipe, model: Transformer, tokenizer: Tokenizer) -> None:
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size is {config.vocab_size}. "
            "Leave model.vocab_size out or raise it."
        )
    if recipe.max_length > config.max_position_embeddings:
        raise UsageError(
            f"max_length is {recipe.max_length}, more than the model's {config.max_position_embeddings} positions. "
            f"Set max_length={config.max_position_embeddings} or less."
        )


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
