"""What a model folder says beside its weights: configuration, tokenizer, sampling defaults, special ids. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.files import load_config, read_json
from llmkit.checkpoint.hub import resolve
from llmkit.config import ModelConfig
from llmkit.engine.sampling import SamplingParams
from llmkit.errors import CheckpointError, TemplateError, UsageError
from llmkit.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from llmkit.text.chat import ChatTemplate

# What generation_config.json may say about sampling, by our names.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, read."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None  # None: ids go in and out, text does not
    given_template: ChatTemplate | None  # in place of the tokenizer's
    defaults: Mapping[str, Any]  # sampling arguments by the names of SamplingParams
    eos_ids: tuple[int, ...]
    bos_id: int | None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template that was given, else the tokenizer's own, which is built when it is first asked for."""
        return self.given_template or (None if self.tokenizer is None else self.tokenizer.chat_template)


def read_folder(model: str, *, revision: str | None = None, chat_template: str | Path | None = None) -> ModelFolder:
    """Read everything but the weights; `model` is a folder, a hub id or HUB_ID@REVISION."""
    path = resolve(model, revision)
    config = load_config(path)
    tokenizer = _tokenizer(path)
    generation = path / "generation_config.json"
    said = read_json(generation) if os.path.lexists(generation) else {}
    try:
        eos_ids, bos_id = special_ids(tokenizer, config, said)
        defaults = sampling_defaults(said)
    except UsageError as error:  # nobody typed it: it stands in a file
        raise CheckpointError(f"{path} has a value in generation_config.json or config.json that cannot be: {error}") from error
    return ModelFolder(
        path=path,
        config=config,
        tokenizer=tokenizer,
        given_template=None if chat_template is None else read_template(chat_template, tokenizer),
        defaults=defaults,
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def read_template(template: str | Path, tokenizer: Tokenizer | None) -> ChatTemplate:
    """A chat template from its own Jinja source, by its name in the tokenizer's files ("tool_use"), or from a file."""
    if tokenizer is None:
        raise UsageError("a chat template needs a tokenizer, and this model has none. Add a tokenizer.json to its folder.")
    source = str(template)
    named = {} if tokenizer.chat_template is None else tokenizer.chat_template.sources
    if source in named:
        source = named[source]
    elif "{" not in source:
        try:
            source = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            names = f" or one of {', '.join(named)}" if named else ""
            raise TemplateError(f"chat template {source} cannot be read ({error}). Give a file with a Jinja template{names}.") from error
    from llmkit.text.chat import ChatTemplate

    return ChatTemplate(source, tokenizer.special_tokens)


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling arguments of a generation_config.json; `do_sample: false` means greedy, whatever else it says.

    Raises UsageError for a value that no request may have.
    """
    defaults = {ours: generation_config[theirs] for theirs, ours in SAMPLING.items() if generation_config.get(theirs) is not None}
    if generation_config.get("do_sample") is False:
        defaults["temperature"] = 0.0
        for name in ("top_k", "top_p", "min_p"):
            defaults.pop(name, None)
    SamplingParams(**defaults)
    return defaults


def special_ids(
    tokenizer: Tokenizer | None, config: ModelConfig, generation_config: Mapping[str, Any]
) -> tuple[tuple[int, ...], int | None]:
    """The ids that end a text (all that generation_config.json, config.json and the tokenizer name) and the one that begins it.

    Raises UsageError where a file names something that is no id.
    """
    eos = [] if tokenizer is None else list(tokenizer.eos_ids)
    bos = [] if tokenizer is None or tokenizer.bos_id is None else [tokenizer.bos_id]
    for file in (generation_config, config.hf):
        eos += _ids("eos_token_id", file.get("eos_token_id"))
        bos += _ids("bos_token_id", file.get("bos_token_id"))
    return tuple(dict.fromkeys(eos)), next(iter(bos), None)


def _ids(name: str, said: Any) -> list[int]:
    """A token id, or a list of them, or null."""
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise UsageError(f"{name} is {said!r:.80}; it must be a token id or a list of them.")
    return ids


def _tokenizer(path: Path) -> Tokenizer | None:
    """None where there is none of the files a tokenizer can be in; a damaged one is an error."""
    patterns = ("tokenizer.json", "*.model", "*.tiktoken", "merges.txt")
    try:
        names = os.listdir(path)
    except OSError as error:
        raise CheckpointError(f"The folder {path} cannot be listed ({error.strerror}). Check its permissions.") from error
    return load_tokenizer(path) if any(fnmatch(name, pattern) for name in names for pattern in patterns) else None
