"""Builds the training text of the embedded story teller: JSONL files in one folder, the same ones for the same input.

    python recipes/stories_sampler.py ../shared/data runs/stories-data/samples      # the teacher's stories; may be stopped at any time
    python recipes/stories_data.py ../shared/data runs/stories-data                 # about a minute

Sources: real TinyStories (CDLA-Sharing-1.0), stories sampled from stories260K (MIT) and public-domain books. What is written:

    heldout.jsonl            real stories kept apart (5%, by a hash of the text); no training file holds one, nor a near copy of one
    real-plain.jsonl         real stories as they are
    real-prompted.jsonl      each real story several times, as the answer to different requests, most of them with nouns exchanged
    sampled-plain.jsonl      the teacher's stories
    sampled-prompted.jsonl   the same as answers
    openings.jsonl           only the first sentences of both, as answers to "Begin a story about a dog and a kite."
    books.jsonl              passages of the books

No line of any training file holds both nouns of a pair of stories_pairs.json, in any inflection: how often the trained model
uses both when it is asked for them is what stories_eval.py measures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stories_text import (
    AMBIGUOUS,
    MASS,
    NOUN_CLASS,
    UNIQUE,
    exchange,
    nouns_in,
    plural,
    read_stories,
    shingles,
    stands_as_noun,
    together,
    with_article,
    words,
)

Row = dict[str, Any]
PAIRS = Path(__file__).with_name("stories_pairs.json")

ASK = [
    "Tell me a story about {x}.",
    "Tell me a story about {x}",
    "tell me a story about {x}",
    "tell me a story about {x} please",
    "Please tell me a story about {x}.",
    "Can you tell me a story about {x}?",
    "Could you tell me a short story with {x}?",
    "Write a short story about {x}.",
    "Write a story with {x}.",
    "write a short story with {x}",
    "Write me a story that has {x} in it.",
    "Make up a story about {x}.",
    "I want to hear a story about {x}!",
    "I would like a bedtime story with {x}, please.",
    "A story about {x}, please.",
    "Let's have a story about {x}.",
    "story about {bare} please",
    "a story about {bare}",
]
ASK_WORDS = ["Tell me a story. Use the words {bare}.", "Write a short story with the words {bare}.", "{bare}"]  # for two nouns and more
FAVOURITE = 0.35  # share of the requests that take the first form, which is what most people type
ASK_ANY = [
    "Tell me a story.", "tell me a story", "Tell me a story", "Can you tell me a story?", "Please write a short story.", "Write a story.",
    "A story, please.", "I want to hear a story!", "Tell me a bedtime story.", "story please", "Hello!", "hello", "Hi", "Hi! Who are you?",
    "Good evening!", "What can you do?", "I am bored.", "Surprise me.", "Once upon a time",
]  # fmt: skip
BEGIN = ["Begin a story about {x}.", "Start a story about {x}.", "How does a story about {x} begin?", "begin a story about {bare}"]
AGAIN = [
    "Another one, about {x}.",
    "Now a story about {x}.",
    "And now one with {x}?",
    "Tell me another story, please. This time about {x}.",
]

MEN = words("boy man dad brother grandpa prince king policeman fireman wizard")
WOMEN = words("girl woman mom sister grandma princess queen fairy witch nurse mermaid")
NEVER_REPLACED = AMBIGUOUS | UNIQUE | words("mom dad grandma grandpa friend baby room house park")  # "Mom said": used like names
COMMON = words("mom dad girl boy man park toy house room tree")  # a story tells of them unasked
OPENING = 240  # characters: the first two or three sentences
OPENING_SENTENCES = re.compile(rf".{{20,{OPENING}}}[.!?]\"?(?=\s|$)", re.DOTALL)
EXCHANGE_SHARE = 0.8  # of the requests; with a half, a model of two million parameters was slow to see that the request matters
_COMPOUND = re.compile(r"\b(?:teddy|polar|ice|living|dining|rain|snow|hot|potato|tooth|swimming) (?=\w)", re.IGNORECASE)


def request(rng: random.Random, nouns: Sequence[str], forms: Sequence[str] = ASK) -> str:
    """Asks for a story with these nouns (one to three)."""
    form = forms[0] if rng.random() < FAVOURITE else rng.choice([*forms, *(ASK_WORDS if forms is ASK and len(nouns) > 1 else [])])

    def listed(parts: list[str]) -> str:
        return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))

    many = rng.random() < 0.08 and not (set(nouns) & (MASS | UNIQUE))
    return form.format(x=listed([plural(noun) if many else with_article(noun) for noun in nouns]), bare=listed(list(nouns)))


def salient(story: str) -> dict[str, float]:
    """The nouns one may ask for to get this story, each with a weight: those that come early or come back, and stand as nouns.

    The first sentences weigh most: there a request tells most about the words that follow, and a small model learns it soonest."""
    first, opening = nouns_in(story[:OPENING]), nouns_in(story[: len(story) // 3])
    counts = {noun: count for noun, count in nouns_in(story).items() if count > 1 or noun in opening}
    return {
        noun: min(count, 5) * (0.3 if noun in COMMON else 1.0) * (8.0 if noun in first else 1.0)
        for noun, count in counts.items()
        if noun != "friend" and stands_as_noun(noun, story)
    }


def choose(rng: random.Random, weights: dict[str, float], count: int) -> list[str]:
    """Up to `count` different nouns at random, by weight (exponential keys, Efraimidis and Spirakis 2006)."""
    return sorted(weights, key=lambda noun: -(rng.random() ** (1 / weights[noun])))[:count]


def stand_ins(noun: str) -> list[str]:
    """The nouns that may take this noun's place: of its class, as countable as it, and of no other gender."""
    other = WOMEN if noun in MEN else MEN if noun in WOMEN else MEN | WOMEN
    return [
        new
        for new, kind in NOUN_CLASS.items()
        if kind == NOUN_CLASS[noun] and new not in (noun, "friend") and new not in other | UNIQUE and (new in MASS) == (noun in MASS)
    ]


def exchanged(rng: random.Random, story: str, nouns: Sequence[str]) -> tuple[str, list[str]]:
    """The story with other nouns in the place of these, where that is possible, and the nouns it tells of now.

    What is asked for and what is told then agree for no other reason than the request, so that a model learns to read it."""
    asked = []
    for noun in nouns:
        present = nouns_in(story)
        compound = any(story[m.end() :].lower().startswith(noun) for m in _COMPOUND.finditer(story))
        choices = [] if noun in NEVER_REPLACED or compound else [new for new in stand_ins(noun) if new not in present]
        if choices and rng.random() < 0.85:
            new = rng.choice(choices)
            story = exchange(story, noun, new)
            noun = new
        asked.append(noun)
    return story, asked


def answer(rng: random.Random, story: str, exchange_share: float, forms: Sequence[str] = ASK) -> tuple[str, str]:
    """(request, story): the request names zero to three nouns that the story uses."""
    nouns = choose(rng, salient(story), rng.choices([0, 1, 2, 3], [0.06, 0.26, 0.62, 0.06])[0])
    if not nouns:
        general = [text for text in ASK_ANY if text != "Once upon a time" or story.startswith(text)]
        return rng.choice(general), story
    if rng.random() < exchange_share:
        story, nouns = exchanged(rng, story, nouns)
    rng.shuffle(nouns)
    return request(rng, nouns, forms), story


def prompted(rng: random.Random, story: str, others: Sequence[str], exchange_share: float) -> Row:
    """A chat: one request and its story, now and then a second one."""
    turns = [answer(rng, story, exchange_share)]
    if rng.random() < 0.04 and len(story) < 900 and len(second := rng.choice(others)) < 900:
        turns.append(answer(rng, second, exchange_share, AGAIN))
    roles = ("user", "assistant")
    return {"messages": [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]}


def begun(rng: random.Random, story: str) -> Row | None:
    """A chat that asks for the beginning of a story about two nouns, and gets its first sentences; None where they hold no two.

    In a whole story two words of two hundred tell whether the request was read; here it is two of thirty, so a small model learns
    to read requests from far less text."""
    sentences = OPENING_SENTENCES.match(story)
    nouns = choose(rng, salient(sentences[0]), 2) if sentences else []
    if not sentences or len(nouns) < 2:
        return None
    text, nouns = exchanged(rng, sentences[0], nouns)
    rng.shuffle(nouns)
    return {"messages": [{"role": "user", "content": request(rng, nouns, BEGIN)}, {"role": "assistant", "content": text}]}


def whole_text(row: Row) -> str:
    return row["text"] if "text" in row else "\n".join(message["content"] for message in row["messages"])


def is_sound(story: str, vocabulary: frozenset[str]) -> bool:
    """Whether a sampled story is worth learning from: of fair length, ends as a sentence, every word a word (names aside), and it does
    not go round in circles."""
    sentences = re.findall(r"[^.!?\n]{12,}[.!?]", story)
    tokens = re.findall(r"[a-z]+", story.lower())
    runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return (
        250 <= len(story) <= 1600
        and story[-1] in '.!?"'
        and story[0].isupper()
        and re.search(r"[^\x20-\x7e\n]", story) is None
        and story.count('"') % 2 == 0
        and max(Counter(sentences).values(), default=9) < 3
        and len(set(runs)) > 0.7 * len(runs)
        and re.search(r"\b(?!very|so|had|that)(\w+) \1\b", story) is None
        and set(re.findall(r"(?<![\w'-])[a-z]+(?![\w'-])", story)) <= vocabulary
    )


def read_samples(folder: Path, held_out: Iterable[str], vocabulary: frozenset[str]) -> tuple[list[str], Counter[str]]:
    """The teacher's stories that are sound, new, and no copies of held-out ones; and why the others were left out."""
    known = set().union(*map(shingles, held_out))
    stories: dict[str, None] = {}
    reasons: Counter[str] = Counter()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            story = json.loads(line)["text"]
            runs = shingles(story)
            if not is_sound(story, vocabulary):
                reasons["unsound"] += 1
            elif story in stories:
                reasons["twice"] += 1
            elif len(runs & known) > 0.1 * len(runs):
                reasons["like a held-out story"] += 1
            else:
                stories[story] = None
    return list(stories), reasons


def passages(book: str, longest: int = 1400) -> Iterator[str]:
    """Whole paragraphs of a book, gathered to passages of up to `longest` characters; front matter and headings are left out."""
    gathered = ""
    for paragraph in re.split(r"\n\s*\n", book.translate(str.maketrans("‘’“”—", "''\"\"-")).replace("_", "")):
        text = " ".join(paragraph.split())
        if len(text) < 40 or re.search(r"Gutenberg|Produced by|Proofread|\[Illustration|CONTENTS|CHAPTER|Copyright", text, re.IGNORECASE):
            continue
        if gathered and len(gathered) + len(text) > longest:
            yield gathered
            gathered = ""
        gathered = f"{gathered}\n{text}" if gathered else text
    if gathered:
        yield gathered


def write(path: Path, rows: Iterable[Row], allowed: Callable[[Row], bool]) -> None:
    """Writes the rows that are allowed, in a shuffled order, and prints the numbers."""
    rows = list(rows)
    kept = [json.dumps(row, ensure_ascii=False) for row in rows if allowed(row)]
    random.Random(path.name).shuffle(kept)
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    dropped = len(rows) - len(kept)
    print(f"{path.name:24} {len(kept):7} rows {path.stat().st_size / 1e6:6.1f} MB   {dropped:5} dropped for a pair", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=os.environ.get("LLMKIT_TEST_DATA", "../shared/data"), help="the data folder")
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/stories-data"))
    parser.add_argument("--variants", type=int, default=8, help="requests per real story")
    parser.add_argument("--samples", type=Path, help="the teacher's shards; samples/ in the output folder by default")
    args = parser.parse_args()
    data, output = Path(args.data), args.output
    output.mkdir(parents=True, exist_ok=True)
    pairs = json.loads(PAIRS.read_text())

    training, held_out = read_stories(data)
    books = [path.read_text(encoding="utf-8") for path in sorted((data / "text" / "books").glob("*.txt"))]
    vocabulary = frozenset(re.findall(r"[a-z]+", "\n".join([*training, *books]).lower()))
    samples, reasons = read_samples(args.samples or output / "samples", held_out, vocabulary)
    print(f"{len(training)} real stories, {len(held_out)} held out; {len(samples)} sampled stories, left out: {dict(reasons)}", flush=True)

    def allowed(row: Row) -> bool:
        return not together(pairs, whole_text(row))

    write(output / "heldout.jsonl", ({"text": story} for story in held_out), lambda row: True)
    write(output / "real-plain.jsonl", ({"text": story} for story in training), allowed)
    write(output / "sampled-plain.jsonl", ({"text": story} for story in samples), allowed)
    write(output / "books.jsonl", ({"text": passage} for book in books for passage in passages(book)), allowed)
    rng = random.Random(0)
    real = (prompted(rng, story, training, EXCHANGE_SHARE) for _ in range(args.variants) for story in training)
    write(output / "real-prompted.jsonl", real, allowed)
    recalled = [story for story in samples if max(nouns_in(story).values(), default=0) > 2]  # something stays its subject
    write(output / "sampled-prompted.jsonl", (prompted(rng, story, recalled, EXCHANGE_SHARE) for story in recalled), allowed)
    repeated = ((training, args.variants), (samples, 3))
    beginnings = (begun(rng, story) for stories, times in repeated for _ in range(times) for story in stories)
    write(output / "openings.jsonl", filter(None, beginnings), allowed)


if __name__ == "__main__":
    main()
