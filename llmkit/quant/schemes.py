"""How the weights of a model are stored: which tensors are quantized, and how finely. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmkit.errors import UsageError

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
PROJECTIONS = tuple(f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True)
class Choice:
    """The storage of one matrix."""

    scheme: str  # q4 or q8
    group: int  # columns that share a scale


def q4(name: str) -> Choice:
    """4 bits."""
    return Choice("q4", 16 if name in EMBEDDINGS else 32)


def q8(name: str) -> Choice:
    """8 bits in groups of 32: 8.25 bits for each weight."""
    return Choice("q8", 32)


SCHEMES: Mapping[str, Callable[[str], Choice]] = {"q4": q4, "q8": q8}
DEFAULT = "q4"


def choose(scheme: str, name: str) -> Choice | None:
    """How a parameter is stored; None: as it is (norms, biases, routers, learned positions)."""
    if scheme not in SCHEMES:
        raise UsageError(f"scheme {scheme!r:.80} is unknown. Use one of {', '.join(SCHEMES)}.")
    return SCHEMES[scheme](name) if name in EMBEDDINGS or name.endswith(PROJECTIONS) else None
