"""The other end of `bench_train`: a program that takes optimizer steps when it is asked to.

All programs read the same settings and derive everything else from them, so that nothing but the program differs: the token ids of
every step, the chats of every step, and the first values of the adapter.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmkit.bench.process import Answer, Settings, main
from llmkit.errors import UsageError
from llmkit.model.attention import PackedSequences
from llmkit.planning.memory import check_gpu, check_limit, limit_gpu, peak_bytes
from llmkit.training.data.packing import IGNORE, Batch

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01  # torch's own
LOWEST, HIGHEST = 3, 7000  # of random token ids: none of the special ones, and embeddings that a cache could hold

Ids = NDArray[np.int64]
Chat = tuple[Ids, NDArray[np.bool_]]  # token ids, and which of them are supervised


class TrainingModel(Protocol):
    """A model with a fresh adapter and its optimizer. A step returns its loss, the mean over its supervised tokens."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def full(self, ids: Ids) -> float:
        """Take one step on rows `[batch, length]`, in which every token but the first is a target."""

    def chats(self, chats: Sequence[Chat], micro_batch: int) -> tuple[float, int]:
        """Take one step on chats and return its loss, and how many slots the model computed, padding included."""

    def renew_optimizer(self) -> None:
        """Make the optimizer again, as at the start."""

    def report(self) -> dict[str, Any]:
        """Return what only this program knows of itself, JSON-ready."""


class OwnTraining:
    """llmkit: what `llmkit finetune` does in a step on this device, but for clipping."""

    def __init__(
        self, folder: str, device: str, dtype: str | None, quantize: str | None, checkpointing: bool, rows: int, length: int
    ) -> None:
        from llmkit.checkpoint.load import load_model_with_report
        from llmkit.compat import keep_freed_memory
        from llmkit.lora.fused import training_ops
        from llmkit.lora.inject import LoraSettings, inject, integers_possible
        from llmkit.training.loop import product_dtype
        from llmkit.training.objective import Objective

        self.device, self.rows, self.length = torch.device(device), rows, length
        if self.device.type == "cpu":
            keep_freed_memory()
        model, report = load_model_with_report(folder, dtype, device, quantize)
        self._bfloat16 = 2 * report.num_parameters
        self._base = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
        inject(model, LoraSettings(r=RANK, lora_alpha=ALPHA))
        integers = integers_possible(model)
        self.dtype = product_dtype("auto", self.device)
        products = "integer" if integers else "float32" if self.dtype is None else "bfloat16"
        self.path = f"{quantize or report.dtype}, {products} forward{', checkpointing' if checkpointing else ''}"
        self.model: nn.Module = model.train()
        self.objective = Objective(ops=training_ops(self.device, adapters=True, checkpointing=checkpointing, integers=integers))
        self.renew_optimizer()

    # What follows is what `training/loop.py` does in a step, without what only a run needs: the schedule, reports, checkpoints.

    def renew_optimizer(self) -> None:
        from llmkit.training.optimizer import make_optimizers

        (self.optimizer,) = make_optimizers(self.model, "adamw", LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def full(self, ids: Ids) -> float:
        tokens = torch.from_numpy(ids)
        # Random tokens: every row is one sequence, and every token but the first is a label.
        labels = torch.cat((tokens[:, 1:], torch.full((len(tokens), 1), IGNORE)), 1)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self._step([Batch(tokens, labels, positions, PackedSequences(torch.zeros_like(tokens)))])

    def chats(self, chats: Sequence[Chat], micro_batch: int) -> tuple[float, int]:
        """Packed into rows of `length` slots, `rows` of them at a time; micro_batch is a rival's affair."""
        from llmkit.training.data.packing import make_batch, rows_of
        from llmkit.training.data.sources import Corpus

        count = len(chats)
        corpus = Corpus(
            np.concatenate([ids for ids, _ in chats]).astype(np.int32),
            np.concatenate([learned for _, learned in chats]),
            np.cumsum([0, *(len(ids) for ids, _ in chats)]),
            np.zeros(count, np.int64),
            np.zeros(count, np.bool_),
            np.zeros(count, np.int64),
            [""] * count,
        )
        rows = rows_of(corpus, range(count), self.length)
        batches = [make_batch(corpus, rows[start : start + self.rows]) for start in range(0, len(rows), self.rows)]
        return self._step(batches), sum(batch.tokens.numel() for batch in batches)

    def _step(self, batches: Sequence[Batch]) -> float:
        normalizer, total = sum(self.objective.normalizer(batch) for batch in batches), 0.0
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is not None):
                loss = self.objective.loss_sum(self.model, batch.to(self.device)) / normalizer
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def report(self) -> dict[str, Any]:
        return {"base_bytes": self._base, "bf16_base_bytes": self._bfloat16, "flags": self.path}


def random_rows(rows: int, length: int, vocab_size: int, step: int) -> Ids:
    """The token ids of a step, the same on every model."""
    return np.random.default_rng([1, step]).integers(LOWEST, min(vocab_size, HIGHEST), (rows, length))


class Chats:
    """The chats of a data file, in an order of their own: so many for each step, from the start again when all were seen."""

    def __init__(self, folder: str, data: str, length: int, count: int) -> None:
        from llmkit.text.tokenizer import load_tokenizer
        from llmkit.training.data.sources import load_corpora
        from llmkit.training.recipe import Source

        self.corpus, _, _ = load_corpora([Source(data)], load_tokenizer(folder), 0.0, length)
        self.count = count
        if len(self.corpus) < count:
            raise UsageError(f"{data} holds {len(self.corpus)} documents to learn from, and a step takes {count}. Give a larger file.")
        self.order = np.random.default_rng(2).permutation(len(self.corpus))

    def of_step(self, step: int) -> list[Chat]:
        places = np.arange(step * self.count, (step + 1) * self.count) % len(self.order)
        spans = [slice(self.corpus.offsets[d], self.corpus.offsets[d + 1]) for d in self.order[places]]
        return [(self.corpus.tokens[span].astype(np.int64), self.corpus.learned[span]) for span in spans]


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by the path of their linear and their letter: `model.layers.0.mlp.up_proj.A`."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        path, is_factor, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if is_factor:
            found[f"{path}.{rest[0]}"] = parameter
    return found


@torch.no_grad()
def start_adapter(model: nn.Module) -> None:
    """First values as PEFT's: A uniform within 1 / sqrt(in), B zero; drawn from the path, so that they are the same everywhere."""
    for name, factor in factors(model).items():
        if name.endswith(".A"):
            bound = 1 / math.sqrt(factor.shape[1])
            drawn = np.random.default_rng(zlib.crc32(name.encode())).uniform(-bound, bound, tuple(factor.shape))
            factor.copy_(torch.from_numpy(drawn))
        else:
            factor.zero_()


def load_model(settings: Settings) -> TrainingModel:
    """Load llmkit's model with its adapter."""
    return OwnTraining(**{name: settings[name] for name in ("folder", "device", "dtype", "quantize", "checkpointing", "rows", "length")})


def serve(settings: Settings, answer: Answer, load: Callable[[Settings], TrainingModel] = load_model) -> None:
    """Take optimizer steps as they are asked for, until standard input ends."""
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    check_gpu(settings["device"], "Leave out --device.")
    on_cuda = settings["device"].startswith("cuda")
    if settings["memory"] is not None:
        check_limit(settings["device"], settings["memory"])
        limit_gpu(settings["device"], settings["memory"])
    chats = Chats(settings["folder"], settings["data"], settings["length"], settings["chats"]) if settings["data"] else None
    model = load(settings)
    start_adapter(model.model)
    adapter = {name: list(factor.shape) for name, factor in sorted(factors(model.model).items())}
    device = torch.cuda.get_device_name(settings["device"]) if on_cuda else settings["device"]
    answer({"adapter": adapter, "threads": torch.get_num_threads(), "device": device, **model.report()})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "peak":
            answer({"peak_bytes": torch.cuda.max_memory_allocated(settings["device"]) if on_cuda else peak_bytes()})
        elif request["do"] == "renew":
            start_adapter(model.model)
            model.renew_optimizer()
            answer({})
        elif request["do"] == "full":
            ids = random_rows(settings["rows"], settings["length"], settings["vocab_size"], request["step"])
            start = time.perf_counter()
            loss = model.full(ids)
            if on_cuda:
                torch.cuda.synchronize(settings["device"])  # the optimizer's part
            answer({"seconds": time.perf_counter() - start, "loss": loss, "slots": ids.size, "targets": ids.size - len(ids)})
        else:
            assert chats is not None
            documents = chats.of_step(request["step"])
            start = time.perf_counter()
            loss, slots = model.chats(documents, request["micro_batch"])
            seconds = time.perf_counter() - start
            answer({"seconds": seconds, "loss": loss, "slots": slots, "targets": sum(int(learned[1:].sum()) for _, learned in documents)})


if __name__ == "__main__":
    main(serve)
