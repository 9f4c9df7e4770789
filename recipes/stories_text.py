"""Words and stories: what the recipes of the embedded model know about nouns and the split of the data. Pure functions, no torch."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

HELD_OUT_SHARE = 0.05
END_OF_STORY = "<|endoftext|>"


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Concrete nouns of small children's stories by class; a noun may be exchanged for another one of its class and the story stays a story.
CLASSES: dict[str, str] = {
    "animals": """dog cat bird rabbit mouse fish bear frog puppy kitten lion fox squirrel monkey horse bee spider owl elephant pig cow duck
        hen chicken goat sheep lamb wolf tiger giraffe zebra turtle snake lizard crab whale shark dolphin octopus penguin seal ant bug
        butterfly ladybug worm snail caterpillar hamster parrot deer donkey pony kangaroo dinosaur dragon bunny crow eagle goose swan
        beaver mole hedgehog panda koala camel crocodile hippo rhino rooster raccoon otter unicorn""",
    "people": """girl boy man woman mom dad brother sister grandma grandpa friend baby princess prince king queen teacher doctor farmer
        fairy witch wizard pirate nurse policeman fireman painter driver clown giant monster robot sailor baker neighbor knight soldier
        singer dancer cook captain mermaid elf""",
    "things": """ball doll toy box hat book bag blanket kite balloon bell key basket bucket spoon cup bowl plate pot jar bottle button
        rope string ribbon crown necklace brush comb pencil pen crayon paper letter map coin drum guitar flute whistle puzzle block
        mirror lamp candle clock umbrella shirt dress coat scarf shoe sock boot glove sweater towel pillow broom mop shovel hammer nail
        needle tape net ladder wand sword shield mask flashlight camera phone radio magnet telescope suitcase purse wallet envelope
        stick stone rock shell feather leaf flower gem diamond treasure flag card picture tent jacket backpack vase bone marble yo-yo""",
    "food": """cake cookie apple banana carrot pie sandwich pizza egg bread cheese honey milk juice soup candy chocolate lollipop muffin
        pancake potato tomato pumpkin corn orange lemon pear peach cherry strawberry berry grape melon nut onion bean salad rice jam
        popcorn lunch snack cupcake mushroom sugar butter donut cucumber cabbage""",
    "places": """park house garden room kitchen forest beach store school yard pond lake river castle farm cave hill mountain meadow
        field town village zoo shop market playground bridge tower island library hospital barn church museum street road tunnel
        attic basement bedroom bathroom garage cottage jungle desert circus valley palace restaurant bakery""",
    "vehicles": "car truck boat train bike plane bus ship rocket tractor wagon scooter helicopter sled canoe taxi bicycle ambulance",
    "nature": "tree sun moon star cloud rainbow rain snow wind storm grass sand mud puddle fire bush branch seed nest ocean sky waterfall",
    "furniture": "bed table chair door window wall fence couch shelf bench oven fridge closet desk cage gate sofa lock roof drawer stove",
}
NOUN_CLASS: dict[str, str] = {noun: name for name, nouns in CLASSES.items() for noun in nouns.split()}
MASS = words(
    """paper treasure bread cheese honey milk juice soup candy chocolate corn salad rice jam popcorn sugar butter rain snow grass sand
    mud"""
)
UNIQUE = words("sun moon sky ocean")  # asked for with "the"
# Words of the list that are verbs or adjectives as often: they may be asked for, but other words are never put in their place.
AMBIGUOUS = words(
    """fish bear duck train orange cook ship store box nail rock string button tape net stick brush lock book park fire farm"""
)
IRREGULAR = {
    "mouse": "mice", "fish": "fish", "sheep": "sheep", "deer": "deer", "goose": "geese", "wolf": "wolves", "man": "men", "woman": "women",
    "policeman": "policemen", "fireman": "firemen", "leaf": "leaves", "shelf": "shelves", "elf": "elves", "yo-yo": "yo-yos",
    "potato": "potatoes", "tomato": "tomatoes", "octopus": "octopuses",
}  # fmt: skip
_DETERMINER = r"(?:an?|the|some|his|her|their|my|your|its|our|this|that|two|many|another)"


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"(?:s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def with_article(noun: str) -> str:
    """The noun as one asks for it: "a dog", "an owl", "some milk", "the moon"."""
    if noun in UNIQUE:
        return f"the {noun}"
    if noun in MASS:
        return f"some {noun}"
    return f"{'an' if noun[0] in 'aeiou' and noun != 'unicorn' else 'a'} {noun}"


@cache
def noun_pattern(noun: str) -> re.Pattern[str]:
    """Matches the noun in any inflection ("dog", "dogs", "Dog's") as a whole word; group 1 holds the plural where it differs."""
    return re.compile(rf"(?<![\w-])(?:({re.escape(plural(noun))})|{re.escape(noun)})(?![\w-])", re.IGNORECASE)


def mentions(noun: str, text: str) -> bool:
    return noun_pattern(noun).search(text) is not None


_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_FORMS = {form: noun for noun in NOUN_CLASS for form in (noun, plural(noun))}


def nouns_in(text: str) -> dict[str, int]:
    """The nouns of the list that occur in the text, each with its number of occurrences, in the order of their first one."""
    counts: dict[str, int] = {}
    for word in _WORD.findall(text.lower()):
        noun = _FORMS.get(word)
        if noun is not None:
            counts[noun] = counts.get(noun, 0) + 1
    return counts


@cache
def _as_noun(noun: str) -> re.Pattern[str]:
    return re.compile(rf"\b{_DETERMINER} (?:[\w,]+ ){{0,2}}(?:{re.escape(noun)}|{re.escape(plural(noun))})(?![\w-])", re.IGNORECASE)


def stands_as_noun(noun: str, text: str) -> bool:
    """Whether the word follows a determiner somewhere, so that "He will fish" alone does not count as a story about a fish."""
    return _as_noun(noun).search(text) is not None


def exchange(text: str, old: str, new: str) -> str:
    """Puts one noun in the place of another throughout: singular and plural, capitals, and the article before it."""

    def replacement(match: re.Match[str]) -> str:
        article, many = match["article"] or "", match["many"]
        word = plural(new) if many and plural(old) != old else new
        first = (match["many"] or match["one"])[0]
        word = word.capitalize() if first.isupper() else word
        if article:
            vowel = new[0] in "aeiou" and new != "unicorn"
            article = article[0] + ("n" if vowel else "") + article[-1]
        return article + word

    shape = rf"(?P<article>\b[Aa]n?\s)?(?<![\w-])(?:(?P<many>{re.escape(plural(old))})|(?P<one>{re.escape(old)}))(?![\w-])"
    return re.sub(shape, replacement, text, flags=re.IGNORECASE)


def together(pairs: Iterable[Sequence[str]], text: str) -> bool:
    """Whether both nouns of one of the pairs occur in the text."""
    present = nouns_in(text)
    return any(a in present and b in present for a, b in pairs)


def is_held_out(story: str) -> bool:
    """A stable choice by the text itself: it does not depend on the order of the file."""
    return int.from_bytes(hashlib.blake2b(story.encode(), digest_size=8).digest()) < HELD_OUT_SHARE * 2**64


def shingles(story: str, size: int = 8) -> set[tuple[str, ...]]:
    """All runs of `size` words: two stories that share many of them are copies of each other."""
    words = re.findall(r"\w+", story.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def split_stories(text: str, separator: str = END_OF_STORY) -> tuple[list[str], list[str]]:
    """(training stories, held-out stories). The last story is left out where no separator ends it; copies are dropped, and so is every
    training story that shares a tenth of its eight-word runs with one held-out story."""
    pieces = text.split(separator)[:-1]
    stories = list(dict.fromkeys(" \n".join(line.strip() for line in piece.strip().splitlines()).replace(" \n", "\n") for piece in pieces))
    stories = [story for story in stories if len(story) > 100]
    held_out = [story for story in stories if is_held_out(story)]
    owner = {run: number for number, story in enumerate(held_out) for run in shingles(story)}
    training = []
    for story in stories:
        if is_held_out(story):
            continue
        runs = shingles(story)
        hits: dict[int, int] = {}
        for run in runs & owner.keys():
            hits[owner[run]] = hits.get(owner[run], 0) + 1
        if max(hits.values(), default=0) < 0.1 * max(1, len(runs)):
            training.append(story)
    return training, held_out


def read_stories(data: Path) -> tuple[list[str], list[str]]:
    return split_stories((data / "text" / "tinystories_2MB.txt").read_text(encoding="utf-8"))


ADJECTIVES = [
    "little", "big", "small", "old", "funny", "happy", "sad", "shiny", "red", "blue",
    "green", "yellow", "pretty", "kind", "brave", "tiny", "new", "special", "lost",
]  # fmt: skip


def opening(rng: random.Random, stories: Sequence[str]) -> str:
    """A first sentence for the teacher: nothing, one of a real story, or one around nouns from the list."""
    kind = rng.random()
    if kind < 0.55:
        return ""
    if kind < 0.85:
        sentence = re.match(r".{20,120}?[.!?](?=\s[A-Z])", rng.choice(stories))
        return sentence[0] if sentence else ""
    who = rng.choice([noun for noun in NOUN_CLASS if NOUN_CLASS[noun] in ("animals", "people")])
    what = rng.choice([noun for noun in NOUN_CLASS if NOUN_CLASS[noun] not in ("people", "animals", "places") and noun not in UNIQUE])
    adjective, other = rng.sample(ADJECTIVES, 2)
    an = "an" if adjective[0] in "aeiou" else "a"
    return rng.choice(
        [
            f"Once upon a time, there was {an} {adjective} {who}.",
            f"Once upon a time, there was {an} {adjective} {who} who loved {with_article(what)}.",
            f"Once upon a time, {with_article(who)} found {with_article(what)}.",
            f"One day, {an} {adjective} {who} saw {with_article(what)}.",
            f"There was once {an} {adjective} {who}. The {who} had {with_article(what)}.",
            f"Once there was {with_article(who)} and {with_article(what)}. The {what} was {other}.",
            f"One day, Tom and Lily saw {with_article(what)}. A {adjective} {who} came to them.",
        ]
    )
