"""Judges a story teller: bits per byte beside its teacher's on the same held-out text, and whether its stories hold what was asked for.

    python recipes/stories_eval.py runs/stories/model --data ../shared/data --stories runs/stories-data

Bits per byte: every held-out story is scored from BOS; it is cut at a word so that it fits into the context of both models, and both
are judged by all bytes of the same text (the end-of-text token is not scored).
Pairs: "Tell me a story about a dog and a kite." for the pairs of stories_pairs.json, which never meet in one document of the training
text, sampled at the model's own defaults. A story counts if both nouns stand in it, in any inflection; the request is not searched.
By chance: the same stories searched for the nouns of the next pair. Copied: eight-word runs that stand in a real training story.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stories_text import mentions, shingles, with_article

import llmkit
from llmkit.llm.api import LLM

PAIRS = Path(__file__).with_name("stories_pairs.json")


@dataclass(frozen=True)
class Told:
    """A story and the pair it was asked for."""

    pair: tuple[str, str]
    story: str
    ended: bool  # by the model itself, not by the context

    @property
    def both(self) -> bool:
        return all(mentions(noun, self.story) for noun in self.pair)


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def from_bos(llm: LLM, text: str) -> list[int]:
    """BOS and the text's tokens, whatever the tokenizer does by itself."""
    if llm.bos_id is None:
        raise llmkit.LLMKitError(f"{llm.name} has no BOS token to score a story from. Name a model that has one.")
    return [llm.bos_id, *llm.tokenizer.encode(text, bos=False)]


def common_cut(text: str, models: Sequence[LLM]) -> str:
    """The longest beginning of the text, in whole words, that fits into the context of every model."""

    def fits(end: int) -> bool:
        return all(len(from_bos(llm, text[:end])) <= llm.ctx_size for llm in models)

    ends = [i for i, character in enumerate(text) if character.isspace()] + [len(text)]
    low, high = 0, len(ends) - 1
    while low < high:  # ends[low] fits throughout: a beginning never has more tokens than the whole
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(ends[middle]) else (low, middle - 1)
    return text[: ends[low]]


def bits_per_byte(llm: LLM, texts: Sequence[str]) -> float:
    """Bits over all texts divided by their UTF-8 bytes."""
    nats = -sum(llm.score(from_bos(llm, text)).log_likelihood for text in texts)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def tell(llm: LLM, pair: tuple[str, str], samples: int, seed: int) -> list[Told]:
    """Some stories for a pair, at the sampling defaults of the model.

    Draws depend on seed, sample and position only: pairs get seeds of their own, or all would be told with the same luck."""
    first, second = map(with_article, pair)
    replies: Any = llm.chat(f"Tell me a story about {first} and {second}.", n=samples, seed=seed)
    return [Told(pair, reply.text, reply.finish_reason == "stop") for reply in (replies if samples > 1 else [replies])]


def report(told: Sequence[Told], training: Sequence[str]) -> dict[str, float]:
    """The shares that a set of stories is judged by, each between 0 and 1, and their mean length in words."""
    pairs = list(dict.fromkeys(story.pair for story in told))
    following = dict(zip(pairs, pairs[1:] + pairs[:1], strict=True))
    known = set().union(*map(shingles, training))
    runs = [run for story in told for run in shingles(story.story)]
    count = len(told)
    return {
        "both_nouns": sum(story.both for story in told) / count,
        "both_nouns_by_chance": sum(all(mentions(noun, story.story) for noun in following[story.pair]) for story in told) / count,
        "one_noun": sum(mentions(noun, story.story) for story in told for noun in story.pair) / count / 2,
        "ended": sum(story.ended for story in told) / count,
        "copied_runs": sum(run in known for run in runs) / max(1, len(runs)),
        "words": sum(len(story.story.split()) for story in told) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLMKIT_TEST_DATA", "../shared/data")), help="the data folder")
    parser.add_argument("--stories", type=Path, default=Path("runs/stories-data"), help="what stories_data.py wrote")
    parser.add_argument("--samples", type=int, default=4, help="stories per pair")
    parser.add_argument("--json", type=Path, help="write all figures and stories to this file")
    args = parser.parse_args()

    llm = llmkit.load(args.model)
    teacher = llmkit.load(args.data / "models" / "stories260K-hf")
    texts = [common_cut(text, (llm, teacher)) for text in read_texts(args.stories / "heldout.jsonl")]
    pairs = [(a, b) for a, b in json.loads(PAIRS.read_text())]
    told = [story for seed, pair in enumerate(pairs) for story in tell(llm, pair, args.samples, seed)]
    figures: dict[str, Any] = {
        "bits_per_byte": bits_per_byte(llm, texts),
        "bits_per_byte_stories260K": bits_per_byte(teacher, texts),
        "held_out_stories": len(texts),
        "held_out_bytes": sum(len(text.encode()) for text in texts),
        "pairs": len(pairs),
        "stories": len(told),
        **report(told, read_texts(args.stories / "real-plain.jsonl")),
    }
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    for story in told[:: max(1, len(told) // 3)]:
        print(f"\n{' and '.join(story.pair)}, {'both' if story.both else 'not both'}:\n{story.story}")
    if args.json:
        figures["sampling"] = llm.defaults
        args.json.write_text(json.dumps({**figures, "told": [asdict(story) for story in told]}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
