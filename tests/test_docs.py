"""The pages say what is there: their links, their tests, what is generated from the code, and how long the README may be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert not [page for page in PAGES if page.parent != ROOT and page.stem != "index" and f"{page.stem}.md" not in index]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120


def test_every_guarantee_names_a_test() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Guarantees")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w/]*test_\w+\.py)`", table)
    assert len(named) >= 10
    assert not [name for name in named if not (ROOT / "tests" / name).is_file()]


def test_the_references_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # three quarters of a minute
def test_the_api_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--api", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert {"index.html", "llmkit.html"} <= {path.name for path in tmp_path.iterdir()}


def test_no_banned_word_is_used() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "check_words.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_words_are_found_whole_and_in_identifiers() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from check_words import banned, found
    finally:
        sys.path.pop(0)
    words = banned()
    assert words["anew"] == "again"
    assert list(found("a twin_cache\nTwins, between; canew", words)) == [(1, "twin"), (2, "Twins")]
