"""How the weights of a model are stored: which tensors are quantized, and how finely. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmkit.config import Param
from llmkit.errors import UsageError

NF4 = "nf4"  # not a format of the native kernels, but bitsandbytes'


@dataclass(frozen=True)
class Choice:
    """The storage of one matrix."""

    scheme: str  # q4, q8 or nf4
    group: int  # columns that share a scale


def _q4(param: Param) -> Choice | None:
    """4 bits; finer groups, or 8 bits, where errors weigh more.

    Measured on two trained models (KL per weight that is quantized): values weigh three to five times as much as queries or the MLP's
    inputs, embeddings about three times, keys up to eight times where query heads share them, which also makes them so few that 8 bits
    cost 0.05 bits of the whole model. Llama 3.2 1B has 4.49 bits then; a model in which every query head has a value head, 0.3 more.
    """
    rows, columns = param.shape
    shared_key = param.output == "key" and 2 * rows <= columns
    if param.output == "value" or shared_key:
        return Choice("q8", 32)
    # What goes into the residual stream is seen by every layer behind it.
    fine = param.role in ("embedding", "head") or param.output in ("key", "residual")
    return Choice("q4", 16 if fine else 32)


def _q8(param: Param) -> Choice | None:
    """8 bits in groups of 32: 8.25 bits for each weight."""
    return Choice("q8", 32)


def _nf4(param: Param) -> Choice | None:
    """What transformers holds in 4 bits: the linears of attention and dense MLPs, not embeddings, head and experts."""
    return Choice(NF4, 64) if param.role == "linear" else None


SCHEMES: Mapping[str, Callable[[Param], Choice | None]] = {"q4": _q4, "q8": _q8, NF4: _nf4}
DEFAULT = "q4"


def check_scheme(scheme: str) -> None:
    """UsageError for a scheme there is not."""
    if scheme not in SCHEMES:
        raise UsageError(f"scheme {scheme!r:.80} is unknown. Use one of {', '.join(SCHEMES)}.")


def choose(scheme: str, param: Param) -> Choice | None:
    """Return how a parameter is stored; None: as it is."""
    check_scheme(scheme)
    return SCHEMES[scheme](param) if param.quantizable else None
