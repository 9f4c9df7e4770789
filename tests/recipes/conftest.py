"""The recipes are scripts beside the package, not a part of it: their folder has to be named."""

from __future__ import annotations

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
