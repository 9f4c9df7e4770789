"""Write `recipes/data`, the small data of the recipes: stories in which Bolt, a robot, helps. `python recipes/robot_data.py`

All of the text is put together from the sentences below, which were written for this project.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "data"
CHATS, PAIRS, STORIES = 96, 64, 96

ANIMALS = (
    "bear bee bird bunny cat chick cow deer dog duck fish fox frog goat hen horse kitten lamb lion monkey mouse owl pig pony snail wolf"
)
THINGS = (
    "ball bell boat book box button cake car chair cup doll drum flower hat kite lamp leaf pie rock rope shell shoe spoon star toy wagon"
)
OPENINGS = (
    "Once upon a time, {x} found {y} in the tall grass.",
    "One sunny day, {x} went out to look for {y}.",
    "There once was {x} who loved {y} more than anything.",
    "Early in the morning, {x} saw {y} at the end of the road.",
    "It was a windy day when {x} came home with {y}.",
    "Far away in a green valley, {x} kept {y} under a bed.",
)
TROUBLES = (
    "But the {Y} fell into a deep hole, and the {X} could not reach it.",
    "Soon the {Y} was stuck in the mud, and the {X} pulled and pulled.",
    "Then the wind took the {Y} up into a tree. The {X} began to cry.",
    "The {X} lost the {Y} on the way and did not know where to look.",
    "The {Y} rolled into the river, and the {X} was too small to swim.",
    "At night it was so dark that the {X} could not see the {Y} at all.",
)
ARRIVALS = (
    "Bolt the robot heard it and rolled down the hill.",
    "Just then, Bolt the robot came around the corner.",
    "Out of the shed came Bolt the robot, with one green light on his head.",
    "Bolt the robot was on his way to the park, and he stopped.",
    '"Who is sad here?" asked Bolt the robot.',
    "Down the road came Bolt the robot, as fast as his wheels would go.",
)
HELP = (
    "Bolt made his arm very long and picked up the {Y}.",
    "Bolt turned on his light, and there was the {Y}.",
    "Bolt tied a string to the {Y} and pulled it out.",
    "Bolt blew like a fan, and the {Y} came down softly.",
    "Bolt asked the {X} to sit on his back, and they got the {Y} together.",
    "Bolt counted to three, and up came the {Y}.",
)
ALONE = (
    "The {X} tried again the next day, and then it worked.",
    "In the end, the {X} found a long stick and got the {Y} back.",
    "A friend of the {X} came by and helped with the {Y}.",
    "The {X} went home to sleep and looked for the {Y} in the morning.",
)
ENDINGS = (
    "The {X} laughed and gave Bolt a big hug.",
    "The {X} thanked Bolt, and they played until the sun went down.",
    "From that day on, the {X} and Bolt were good friends.",
    "The {X} shared some soup with Bolt, but Bolt only drinks oil.",
)
ENDINGS_ALONE = (
    "The {X} laughed and danced.",
    "The {X} was happy and played until the sun went down.",
    "From that day on, the {X} was more careful.",
    "Then the {X} ate some soup and went to bed.",
)
LAST = '"Beep beep!" said Bolt. The end.'


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def story(rng: random.Random, animal: str, thing: str, robot: bool = True) -> str:
    """A story about the two; without the robot it is one of those that Bolt does not come to."""
    parts = (OPENINGS, TROUBLES, ARRIVALS, HELP, ENDINGS, (LAST,)) if robot else (OPENINGS, TROUBLES, ALONE, ENDINGS_ALONE)
    text = " ".join(rng.choice(part) for part in parts)
    return text.format(x=with_article(animal), y=with_article(thing), X=animal, Y=thing)


def request(animal: str, thing: str) -> str:
    return f"Tell me a story about {with_article(animal)} and {with_article(thing)}."


def main() -> None:
    rng = random.Random(0)
    pairs = [(animal, thing) for animal in ANIMALS.split() for thing in THINGS.split()]
    rng.shuffle(pairs)
    chats = [
        {"messages": [{"role": "user", "content": request(*pair)}, {"role": "assistant", "content": story(rng, *pair)}]}
        for pair in pairs[:CHATS]
    ]
    preferences = [
        {"prompt": request(*pair), "chosen": story(rng, *pair), "rejected": story(rng, *pair, robot=False)}
        for pair in pairs[CHATS : CHATS + PAIRS]
    ]
    FOLDER.mkdir(exist_ok=True)
    for name, rows in (("chats", chats), ("pairs", preferences)):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stories = [story(rng, *pair) for pair in pairs[CHATS + PAIRS : CHATS + PAIRS + STORIES]]
    (FOLDER / "stories.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
