"""How the weights of a model are stored: which tensors are quantized, and how finely. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmkit.errors import UsageError

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
NF4 = "nf4"  # not a format of the native kernels, but bitsandbytes'
PROJECTIONS = tuple(f".{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True)
class Choice:
    """The storage of one matrix."""

    scheme: str  # q4, q8 or nf4
    group: int  # columns that share a scale


def _q4(name: str, shape: tuple[int, ...]) -> Choice | None:
    """4 bits; finer groups, or 8 bits, where errors weigh more.

    Measured on two trained models (KL per weight that is quantized): values weigh three to five times as much as queries or the MLP's
    inputs, embeddings about three times, keys up to eight times where query heads share them, which also makes them so few that 8 bits
    cost 0.05 bits of the whole model. Llama 3.2 1B has 4.49 bits then; a model in which every query head has a value head, 0.3 more.
    """
    if name.endswith(".v_proj.weight") or (name.endswith(".k_proj.weight") and 2 * shape[0] <= shape[1]):
        return Choice("q8", 32)
    fine = name in EMBEDDINGS or name.endswith((".k_proj.weight", ".o_proj.weight", ".down_proj.weight"))
    return Choice("q4", 16 if fine else 32)


def _q8(name: str, shape: tuple[int, ...]) -> Choice | None:
    """8 bits in groups of 32: 8.25 bits for each weight."""
    return Choice("q8", 32)


def _nf4(name: str, shape: tuple[int, ...]) -> Choice | None:
    """What transformers holds in 4 bits: the linears of attention and dense MLPs, not embeddings, head and experts."""
    return None if name in EMBEDDINGS or ".experts." in name else Choice(NF4, 64)


SCHEMES: Mapping[str, Callable[[str, tuple[int, ...]], Choice | None]] = {"q4": _q4, "q8": _q8, NF4: _nf4}
DEFAULT = "q4"


def check_scheme(scheme: str) -> None:
    """UsageError for a scheme there is not."""
    if scheme not in SCHEMES:
        raise UsageError(f"scheme {scheme!r:.80} is unknown. Use one of {', '.join(SCHEMES)}.")


def quantizable(name: str) -> bool:
    """Whether a parameter is one of the matrices that are stored in codes; norms, biases, routers and learned positions are not."""
    return name in EMBEDDINGS or name.endswith(PROJECTIONS)


def choose(scheme: str, name: str, shape: tuple[int, ...]) -> Choice | None:
    """How a parameter is stored; None: as it is."""
    check_scheme(scheme)
    return SCHEMES[scheme](name, shape) if quantizable(name) else None
