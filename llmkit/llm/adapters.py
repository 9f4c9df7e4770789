"""Which adapters `llmkit.load` is given, read and checked against the model. No torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from llmkit.checkpoint.arrays import text_fingerprint
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import UsageError
from llmkit.lora.adapter import Adapter, check_base, read_adapter
from llmkit.text.chat import ChatTemplate

logger = logging.getLogger(__name__)

AdapterArgument = str | Path | Sequence[str | Path] | Mapping[str, str | Path]

NONE = "none"  # what a person types for the model without an adapter
_NAME = re.compile(r"[\w.-]+")


def load_adapters(
    given: AdapterArgument | None, model: ModelSource, chat_template: ChatTemplate | None, *, any_base: bool = False
) -> list[Adapter]:
    """Read the adapters for a model, in the order given.

    chat_template: the one that the model uses.
    given: a folder or hub id, several, or by names of their own; a text may be NAME=PATH too.
    any_base: take an adapter that is proven to have been trained on another model of the same shape.
    Raises CheckpointError for one that cannot be had or does not fit, UsageError for names that cannot be.
    """
    if any_base and not given:
        raise UsageError("any_base has no effect without an adapter. Leave it out.")
    adapters: dict[str, Adapter] = {}
    for name, source in _sources(given):
        adapter = read_adapter(source, model.config, name=name)
        if not _NAME.fullmatch(adapter.name) or adapter.name == NONE:
            raise UsageError(f"an adapter cannot be called {adapter.name!r}. Give it a name of letters and digits, as in NAME=PATH.")
        if adapter.name in adapters:
            raise UsageError(f"two adapters are called {adapter.name!r}. Give them names of their own, as in NAME=PATH.")
        _check(adapter, model, chat_template, any_base)
        adapters[adapter.name] = adapter
    return list(adapters.values())


def unknown_adapter(name: object, known: Sequence[str]) -> UsageError:
    """Return the error for a name that a request gave, where no such adapter is loaded."""
    near = get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Loaded are {', '.join(known)}." if known else "None is loaded; give one to load."
    return UsageError(f"adapter {name!r} is not loaded. {hint}")


def _sources(given: AdapterArgument | None) -> list[tuple[str | None, str | Path]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return list(given.items())
    several = [given] if isinstance(given, str | Path) else list(given)
    return [_named(one) for one in several]


def _named(source: str | Path) -> tuple[str | None, str | Path]:
    """NAME=PATH, where there is no folder of that very name."""
    name, equals, rest = str(source).partition("=")
    if isinstance(source, str) and equals and _NAME.fullmatch(name) and not Path(source).exists():
        return name, rest
    return None, source


def _check(adapter: Adapter, model: ModelSource, chat_template: ChatTemplate | None, any_base: bool) -> None:
    """What can be proven of the model and the template it was trained with."""
    if not any_base:
        check_base(adapter, model)
    template = None if chat_template is None else text_fingerprint(chat_template.source())
    if adapter.template is not None and template not in (None, adapter.template):
        own = adapter.folder / "chat_template.jinja"
        remedy = f": --chat-template {own}" if own.is_file() else ""
        logger.warning(
            "The adapter %r was trained with another chat template than the model has now. Give the one it was trained with%s.",
            *(adapter.name, remedy),
        )
    if adapter.does_nothing:
        logger.warning("The adapter %r changes nothing: all of its B are zero. Was it saved before its first training step?", adapter.name)
