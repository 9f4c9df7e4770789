"""A few documents about things that no model knows, and an index of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.rag.index import Index
from llmkit.rag.ingest import add

GUIDE = """\
# Harbour pump

The Harbour pump moves 340 litres of water per minute. It was designed by Marta Lindqvist in 1987.

## Care

Grease the bearing every 200 hours of use. Do not open the valve while the motor runs.

| part | number | weight |
| --- | --- | --- |
| impeller | H-17 | 2 kg |
| seal | H-22 | 1 kg |

## Storage

Store the pump dry and above freezing. A frozen housing cracks.
"""
BOAT = """\
The ferry Aurora crosses the sound twice a day. Captain Jonas Berg has commanded the ferry since 2011.

Tickets cost 12 crowns for adults. Children under six travel without a ticket.
"""


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "guide.md").write_text(GUIDE)
    (folder / "boat.txt").write_text(BOAT)
    return folder


@pytest.fixture
def index(tmp_path: Path, docs: Path) -> Index:
    made = Index.create(tmp_path / "index")
    add(made, [docs])
    return made
