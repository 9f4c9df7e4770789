"""Find the words of docs/words.txt where they should not be: `python docs/check_words.py`; exit code 1 where there are any."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS = ROOT / "docs" / "words.txt"
SUFFIXES = {".py", ".pyi", ".md", ".yaml", ".cpp", ".h", ".inl"}
# What is written in the words of children's stories: their generator, and questions asked about them.
STORIES = ("recipes/stories_", "recipes/robot_data.py", "llmkit/stories/")
# Lists of English words by which texts are compared.
VOCABULARIES = ("llmkit/rag/",)


def banned() -> dict[str, str]:
    """Return the words, and what is said in place of each."""
    lines = [line for line in WORDS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {word: instead for word, _, instead in (line.partition(": ") for line in lines)}


def pages() -> Iterator[Path]:
    """Yield the files that are looked through."""
    for folder in ("llmkit", "benchmarks", "docs", "recipes", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in SUFFIXES and not name.startswith((*STORIES, *VOCABULARIES)):
                yield path
    yield from sorted(ROOT.glob("*.md"))


def found(text: str, words: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield the line and the spelling of each banned word in a text."""
    pattern = re.compile(rf"(?<![a-z])(?:{'|'.join(map(re.escape, words))})(?![a-z])", re.IGNORECASE)
    for number, line in enumerate(text.splitlines(), 1):
        for match in pattern.finditer(line):
            yield number, match[0]


def main() -> int:
    """Print where a word stands and what to say."""
    words, count = banned(), 0
    for path in pages():
        for number, word in found(path.read_text(encoding="utf-8"), words):
            print(f"{path.relative_to(ROOT)}:{number}: {word!r}; say {words[word.lower()]}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
