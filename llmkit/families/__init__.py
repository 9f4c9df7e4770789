"""Families: how a Hugging Face `config.json` and its tensor names become ours. No torch.

A family is a small declarative file: a function from the `config.json` dictionary to a `ModelConfig` and,
only where its tensor names or layouts differ from Llama's, a few reversible rules. To add one, write the
file, name its `model_type` in `MODEL_TYPES` and run the parity test (`tests/families/`).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.config import ModelConfig
from llmkit.errors import ConfigError
from llmkit.families.common import ChoiceError

# model_type in config.json -> module in this package
MODEL_TYPES: dict[str, str] = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
}


@dataclass(frozen=True)
class Rule:
    """One of their tensors as one or several of ours; `{i}` and `{j}` stand for numbers (layer, expert).

    `ours` with several names cuts the tensor along its rows, after the transpose, into as many rows each as ours have.
    The rule runs backwards on saving; where several rules give the same of ours (old and new names), the first is written.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False  # theirs is [in, out] (GPT-2's Conv1D), ours [out, in]


@dataclass(frozen=True)
class Family:
    """How one family of checkpoints is read and written."""

    config: Callable[[Mapping[str, Any]], ModelConfig]
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = ()  # regular expressions: their tensors that may be skipped (buffers, vision towers)


def family(model_type: str) -> Family:
    """The family of a `model_type`; ConfigError names the nearest known one."""
    if model_type not in MODEL_TYPES:
        near = difflib.get_close_matches(model_type, MODEL_TYPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"model_type {model_type!r:.80} is not a family llmkit knows; {hint}known are {', '.join(sorted(MODEL_TYPES))}.")
    module = importlib.import_module(f"llmkit.families.{MODEL_TYPES[model_type]}")
    found: Family = module.FAMILY
    return found


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """A `config.json` dictionary (old or transformers 5 spelling) as a `ModelConfig`.

    Raises ConfigError where it cannot be; everything in it that llmkit does not know is named at once.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json has no usable model_type (found {model_type!r}); is this a model folder?")
    read, left, problems = family(model_type).config, dict(hf), ""
    while True:
        try:
            config = read(left)
        except ChoiceError as error:
            problems += f"{error} "
            kept = {name: value for name, value in left.items() if name not in error.fields}
            if len(kept) == len(left):  # it stands further in (text_config): what else is wrong shows once this is mended
                raise ConfigError(problems.strip()) from error
            left = kept
        except ConfigError as error:
            raise ConfigError(f"{problems}{error}") from error
        else:
            break
    if problems:
        raise ConfigError(problems.strip())
    return config
