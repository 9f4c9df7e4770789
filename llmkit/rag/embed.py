"""Embedders: text to unit vectors, by a decoder-only checkpoint in our own transformer or by an encoder in transformers.

What a model needs done is read from its folder, as sentence-transformers writes it: modules.json, 1_Pooling/config.json,
sentence_bert_config.json, config_sentence_transformers.json (prompts). Vectors are of length one, so their dot product is the cosine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmkit.checkpoint.files import read_json
from llmkit.checkpoint.hub import resolve
from llmkit.errors import CheckpointError, UsageError
from llmkit.families import MODEL_TYPES
from llmkit.rag.index import Settings
from llmkit.rag.states import batches, pooled_states

if TYPE_CHECKING:
    from llmkit.llm.api import LLM

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]

POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "mean_sqrt_len": "mean_sqrt_len", "lasttoken": "last"}
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers; another one would change the vectors
ENCODER_TOKENS = 1024  # of one forward pass of an encoder: its activations stay in the cache, an eighth faster than 4096
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"  # Qwen3-Embedding's model card
_WORD = re.compile(r"\w+|[^\w\s]")


class Embedder(Protocol):
    """What turns texts into vectors.

    Attributes:
        name: the folder or hub id, as given.
        fingerprint: of its configuration and the shapes of its weights.
        dimension: of a vector.
        max_tokens: of a text; more are cut off.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...

    def count(self, text: str) -> int:
        """The number of the embedder's tokens in a text."""
        ...

    def documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors float32 `[len(texts), dimension]` of passages."""
        ...

    def queries(self, texts: Sequence[str]) -> Vectors:
        """The same of questions, which some models want prefixed."""
        ...


def words(text: str) -> int:
    """The measure of a text without an embedder: words and marks."""
    return sum(1 for _ in _WORD.finditer(text))


def check_embedder(settings: Settings, embedder: Embedder | None) -> None:
    """UsageError where an index was made with another embedder."""
    if embedder is None and settings.dimension:
        raise UsageError(f"the index holds vectors of {settings.embedder}, and no embedder was given. Give that one.")
    if embedder is not None and not settings.dimension:
        raise UsageError(f"the index has full text only, and the embedder {embedder.name} was given. Leave it out, or make a new index.")
    if embedder is not None and embedder.fingerprint != settings.fingerprint:
        raise UsageError(
            f"the index holds vectors of {settings.embedder}, and {embedder.name} is another embedder, whose vectors cannot be compared "
            "with them. Give the same one, or make a new index."
        )


@dataclass(frozen=True)
class Recipe:
    """What to do around the model, as its folder says."""

    pooling: str
    max_tokens: int | None
    query_prompt: str
    document_prompt: str


def read_recipe(folder: Path, *, decoder: bool) -> Recipe:
    """From the folder's own files. Without them a decoder is pooled at its last token with Qwen3-Embedding's instruction.

    Raises CheckpointError for a module or pooling that is not known: leaving it out would give other vectors.
    """
    modules = _modules(folder / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if unknown := [kind for kind in kinds if kind not in MODULES]:
        raise CheckpointError(
            f"{folder} has a module {unknown[0]!r} after its transformer, which llmkit does not run. Choose another embedder."
        )
    if not modules and not decoder:
        raise CheckpointError(
            f"{folder} has no modules.json, so its pooling is unknown. Give an embedder in the sentence-transformers layout."
        )
    pooling = "last"
    if "Pooling" in kinds:
        place = str(modules[kinds.index("Pooling")].get("path", "1_Pooling"))
        said = read_json(folder / place / "config.json")
        modes = [name.removeprefix("pooling_mode_") for name, on in said.items() if name.startswith("pooling_mode_") and on is True]
        modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes] or [str(said.get("pooling_mode"))]
        if len(modes) != 1 or modes[0] not in POOLINGS:
            raise CheckpointError(f"{folder} pools by {modes}, and llmkit knows one of {', '.join(POOLINGS)}. Choose another embedder.")
        pooling = POOLINGS[modes[0]]
    limits = folder / "sentence_bert_config.json"
    max_tokens = read_json(limits).get("max_seq_length") if limits.exists() else None
    prompts_file = folder / "config_sentence_transformers.json"
    prompts = (read_json(prompts_file).get("prompts") or {}) if prompts_file.exists() else {}
    query = prompts.get("query") or (INSTRUCTION if decoder else "")
    return Recipe(pooling, max_tokens, query, prompts.get("document") or prompts.get("passage") or "")


def _modules(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        modules = json.loads(file.read_bytes())
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            raise ValueError("it is no list of modules")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Fetch the model again.") from error
    return modules


def load_embedder(model: str, *, device: str | None = None, threads: int | None = None) -> Embedder:
    """A folder or hub id: a decoder-only family runs in llmkit's transformer (4-bit folders too), any other through transformers."""
    folder = resolve(model)
    config = read_json(folder / "config.json")
    if config.get("model_type") in MODEL_TYPES:
        return DecoderEmbedder(model, folder, device=device, threads=threads)
    return EncoderEmbedder(model, folder, device=device, threads=threads)


def fingerprint(folder: Path) -> str:
    """Of the configuration, and of the names, shapes and first bytes of the weights: not of gigabytes."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            digest.update(head + stream.read(min(int.from_bytes(head, "little"), 1 << 24)))
            stream.seek(size // 2)
            digest.update(stream.read(1 << 16))
        digest.update(str(size).encode())
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


class DecoderEmbedder:
    """A decoder-only embedding checkpoint (Qwen3-Embedding, arXiv:2506.05176): the hidden state at the last token, normalised."""

    def __init__(self, name: str, folder: Path, *, device: str | None = None, threads: int | None = None) -> None:
        from llmkit.llm.api import load

        self.name = name
        self.fingerprint = fingerprint(folder)
        self._recipe = read_recipe(folder, decoder=True)
        if self._recipe.pooling not in ("last", "mean"):
            raise CheckpointError(
                f"{folder} pools a decoder by {self._recipe.pooling}. llmkit pools decoders at the last token or by the mean."
            )
        self._llm: LLM = load(folder, device=device, threads=threads, speculate="off")
        self._backend = self._llm.new_backend()
        self.dimension = self._llm.config.hidden_size
        self.max_tokens = min(self._recipe.max_tokens or 8192, self._llm.ctx_size)

    def count(self, text: str) -> int:
        return len(self._llm.tokenizer.encode(text, bos=False))

    def documents(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._recipe.document_prompt)

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._recipe.query_prompt)

    def _ids(self, text: str) -> list[int]:
        """As the tokenizer's own post-processor ends them (Qwen3: end of text), cut before that end."""
        tokenizer = self._llm.tokenizer
        ids, bare = tokenizer.encode(text), tokenizer.encode(text, bos=False)
        added = len(ids) - len(bare)
        prefix = 1 if ids[:1] != bare[:1] and added else 0
        suffix = ids[len(ids) - (added - prefix) :] if added > prefix else []
        return ids[:prefix] + bare[: self.max_tokens - added] + suffix

    def _embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        ids = [self._ids(prompt + text) or [0] for text in texts]
        out = np.zeros((len(texts), self.dimension), np.float32)
        for batch in batches([len(one) for one in ids]):
            out[batch] = pooled_states(self._backend, [ids[i] for i in batch], last=self._recipe.pooling == "last")
        return unit(out)


class EncoderEmbedder:
    """An encoder (BERT and its kin) in the sentence-transformers layout."""

    def __init__(self, name: str, folder: Path, *, device: str | None = None, threads: int | None = None) -> None:
        import torch
        import transformers
        from tokenizers import Tokenizer

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = name
        self.fingerprint = fingerprint(folder)
        self._recipe = read_recipe(folder, decoder=False)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(
                f"{folder} has no tokenizer.json. Save its tokenizer with transformers' AutoTokenizer, or choose another embedder."
            )
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            # A folder names the code and the pickles it would like to run: weights alone are read, as safetensors.
            self._model: Any = transformers.AutoModel.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
            self._model = self._model.eval().to(self._device)
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # transformers and tokenizers raise anything for a damaged folder
            raise CheckpointError(
                f"{folder} cannot be loaded as an encoder ({' '.join(str(error).split())[:200]}). Choose another embedder."
            ) from error
        config = self._model.config
        self.dimension = int(config.hidden_size)
        # RoBERTa's positions begin after the padding id, so two of them are never used.
        positions = int(getattr(config, "max_position_embeddings", 512)) - (2 if "roberta" in config.model_type else 0)
        self.max_tokens = min(self._recipe.max_tokens or positions, positions)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._counter = Tokenizer.from_str(self._tokenizer.to_str())
        self._tokenizer.enable_truncation(self.max_tokens)
        self._pad = int(config.pad_token_id or 0)

    def count(self, text: str) -> int:
        return len(self._counter.encode(text, add_special_tokens=False).ids)

    def documents(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._recipe.document_prompt)

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._recipe.query_prompt)

    def _embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        import torch

        encoded = [one.ids for one in self._tokenizer.encode_batch([prompt + text for text in texts])]
        out = np.zeros((len(texts), self.dimension), np.float32)
        with torch.inference_mode():
            for batch in batches([len(ids) for ids in encoded], ENCODER_TOKENS):
                longest = max(len(encoded[i]) for i in batch)
                ids = torch.full((len(batch), longest), self._pad)
                mask = torch.zeros((len(batch), longest), dtype=torch.long)
                for row, i in enumerate(batch):
                    ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
                    mask[row, : len(encoded[i])] = 1
                ids, mask = ids.to(self._device), mask.to(self._device)
                states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                out[batch] = pooled(states, mask, self._recipe.pooling).float().cpu().numpy()
        return unit(out)


def pooled(states: Any, mask: Any, pooling: str) -> Any:
    """One vector of each row of hidden states `[batch, seq, hidden]`, with a mask `[batch, seq]` of the real tokens (padding right)."""
    import torch

    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    wide = mask.unsqueeze(-1).to(states.dtype)
    if pooling == "max":
        return states.masked_fill(wide == 0, -torch.inf).max(1).values
    total, count = (states * wide).sum(1), wide.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if pooling == "mean_sqrt_len" else count)


def unit(vectors: Vectors) -> Vectors:
    """Each row divided by its length; a row of zeros stays."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


class DeferredEmbedder:
    """An embedder that is loaded when it is first needed; its fingerprint is read from its folder before."""

    def __init__(self, name: str, device: str | None = None, threads: int | None = None) -> None:
        self.name = name
        self.fingerprint = fingerprint(resolve(name))
        self._device, self._threads = device, threads
        self._loaded: Embedder | None = None

    def _model(self) -> Embedder:
        if self._loaded is None:
            self._loaded = load_embedder(self.name, device=self._device, threads=self._threads)
        return self._loaded

    @property
    def dimension(self) -> int:
        return self._model().dimension

    @property
    def max_tokens(self) -> int:
        return self._model().max_tokens

    def count(self, text: str) -> int:
        return self._model().count(text)

    def documents(self, texts: Sequence[str]) -> Vectors:
        return self._model().documents(texts)

    def queries(self, texts: Sequence[str]) -> Vectors:
        return self._model().queries(texts)
