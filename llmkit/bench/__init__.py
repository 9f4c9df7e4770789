"""Speed and memory of llmkit itself: `llmkit bench`. Comparisons with other programs stand in benchmarks/, outside the wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from llmkit.errors import UsageError

CHECKOUT = Path(__file__).resolve().parents[2]  # the folder that holds llmkit/, and in a source checkout benchmarks/


def comparison(module: str) -> ModuleType:
    """Return a module of benchmarks/. UsageError where llmkit is installed without its source checkout."""
    if not (CHECKOUT / "benchmarks" / f"{module}.py").is_file():
        raise UsageError("comparisons with other programs need llmkit's source checkout. Clone the repository, or leave out --against.")
    if str(CHECKOUT) not in sys.path:  # an editable install finds llmkit alone
        sys.path.append(str(CHECKOUT))
    return importlib.import_module(f"benchmarks.{module}")
