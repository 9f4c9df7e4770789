"""The digests of an index's files beside its tables: finding nothing changed need not wait for LanceDB, whose import takes a second.

It is a copy, and only believed while the versions of the table are those that it was written for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

NAME = "files.json"
VERSIONS = Path("chunks.lance") / "_versions"


def write(place: str, digests: Mapping[str, str], chunks: int) -> None:
    """Keep what the index holds now; without effect for one that is not in a folder, or where there is no space."""
    if "://" in place:
        return
    said = {"versions": _versions(place), "chunks": chunks, "files": digests}
    with suppress(OSError):
        part = Path(place) / f"{NAME}.part"
        part.write_text(json.dumps(said), encoding="utf-8")
        os.replace(part, Path(place) / NAME)


def read(place: str) -> tuple[dict[str, str], int] | None:
    """The digests of its files and its number of chunks; None where the index was written since, or nothing is known."""
    try:
        said = json.loads((Path(place) / NAME).read_text(encoding="utf-8"))
        return (said["files"], said["chunks"]) if said["versions"] == _versions(place) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _versions(place: str) -> list[str]:
    return sorted(name for name in os.listdir(Path(place) / VERSIONS) if name.endswith(".manifest"))
