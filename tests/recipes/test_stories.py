"""The text of the embedded model: nouns, requests, what is exchanged, what is dropped, and how its stories are judged."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stories_data as data
import stories_eval
import stories_sampler as sampler
import stories_text as text
import torch

STORY = (
    "Once upon a time, there was a little dog named Max. The dog had a red ball and a hat. One day, an owl came to the garden.\n"
    '"Hello, dog!" said the owl. "Dogs like balls." The dog\'s ball rolled to a tree and they played until the sun went down. It was fun.'
)


# --- nouns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noun", "many"),
    [("dog", "dogs"), ("box", "boxes"), ("bench", "benches"), ("bunny", "bunnies"), ("monkey", "monkeys"), ("mouse", "mice")],
)
def test_plural(noun: str, many: str) -> None:
    assert text.plural(noun) == many


@pytest.mark.parametrize(
    ("noun", "asked"), [("dog", "a dog"), ("owl", "an owl"), ("unicorn", "a unicorn"), ("milk", "some milk"), ("moon", "the moon")]
)
def test_article(noun: str, asked: str) -> None:
    assert text.with_article(noun) == asked


def test_every_noun_has_one_class_and_its_own_forms() -> None:
    nouns = [noun for names in text.CLASSES.values() for noun in names.split()]
    assert len(nouns) == len(set(nouns))
    assert set(nouns) >= text.MASS | text.UNIQUE | text.AMBIGUOUS | text.IRREGULAR.keys() | data.MEN | data.WOMEN | data.NEVER_REPLACED
    for noun in nouns:
        assert text.nouns_in(text.plural(noun)) == {noun: 1}


def test_nouns_are_counted_in_every_inflection() -> None:
    assert text.nouns_in(STORY) == {"dog": 5, "ball": 3, "hat": 1, "owl": 2, "garden": 1, "tree": 1, "sun": 1}


@pytest.mark.parametrize("sentence", ["Two Mice ran.", "The mouse's tail", "MOUSE!"])
def test_a_noun_is_mentioned(sentence: str) -> None:
    assert text.mentions("mouse", sentence)


@pytest.mark.parametrize("sentence", ["He wore a mousetrap.", "a mouse-hole", ""])
def test_a_part_of_a_word_is_no_mention(sentence: str) -> None:
    assert not text.mentions("mouse", sentence)


def test_a_verb_does_not_stand_as_noun() -> None:
    assert text.stands_as_noun("fish", "They saw a big, blue fish.")
    assert not text.stands_as_noun("fish", "They like to fish all day.")


# --- exchanging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "before", "after"),
    [
        ("dog", "owl", "A dog and two dogs. Dog! The dog's dogma.", "An owl and two owls. Owl! The owl's dogma."),
        ("owl", "dog", "An owl saw an ant.", "A dog saw an ant."),
        ("mouse", "wolf", "The mice fled; one mouse stayed.", "The wolves fled; one wolf stayed."),
        ("sheep", "goat", "a sheep and many sheep", "a goat and many goat"),  # the form does not tell how many they are
        ("ball", "unicorn", "A ball.", "A unicorn."),
    ],
)
def test_exchange(old: str, new: str, before: str, after: str) -> None:
    assert text.exchange(before, old, new) == after


def test_stand_ins_are_of_the_same_kind() -> None:
    assert {"cat", "lion"} <= set(data.stand_ins("dog")) <= set(text.CLASSES["animals"].split()) - {"dog"}
    assert not set(data.stand_ins("boy")) & data.WOMEN
    assert not set(data.stand_ins("girl")) & data.MEN
    assert set(data.stand_ins("milk")) <= text.MASS
    assert not set(data.stand_ins("cake")) & text.MASS


def test_what_is_asked_for_is_told() -> None:
    rng = random.Random(0)
    requests = set()
    for _ in range(500):
        asked, story = data.answer(rng, STORY, exchange_share=0.5)
        requests.add(asked)
        told = text.nouns_in(story)
        assert set(text.nouns_in(asked)) <= told.keys()
        assert sum(told.values()) == sum(text.nouns_in(STORY).values())  # an exchange neither adds nor swallows a noun
    assert len(requests) > 200


def test_a_compound_stays_whole() -> None:
    story = "She ate a hot dog. The dog was warm."
    for seed in range(20):
        assert data.exchanged(random.Random(seed), story, ["dog"]) == (story, ["dog"])


def test_only_salient_nouns_are_asked_for() -> None:
    assert data.salient(STORY).keys() == {"dog", "ball", "hat", "owl"}  # the tree and the sun pass by once, near the end


def test_a_chat_alternates_and_may_have_two_turns() -> None:
    rng = random.Random(1)
    lengths = set()
    for _ in range(200):
        messages = data.prompted(rng, STORY, [STORY], 0.0)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        lengths.add(len(messages))
    assert lengths == {2, 4}


def test_a_beginning_holds_what_was_asked_for_and_ends_with_a_sentence() -> None:
    requests = set()
    for seed in range(100):
        row = data.begun(random.Random(seed), STORY)
        assert row is not None
        asked, told = (message["content"] for message in row["messages"])
        assert len(text.nouns_in(asked)) == 2
        assert text.nouns_in(asked).keys() <= text.nouns_in(told).keys()
        assert len(told) <= data.OPENING + 40  # a longer noun may have taken a shorter one's place
        assert told[-1] in '.!?"'
        requests.add(re.sub(r" an? [\w-]+| some \w+| the \w+", "", asked))
    assert all("egin" in form or "tart" in form for form in requests)  # no whole story is asked for
    assert data.begun(random.Random(0), "He ran. She ran. They all ran and ran until the night came.") is None


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_pairs_are_known_nouns() -> None:
    pairs = json.loads(data.PAIRS.read_text())
    assert len({frozenset(pair) for pair in pairs}) == 50
    assert {noun for pair in pairs for noun in pair} <= text.NOUN_CLASS.keys()


def test_lines_with_a_pair_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": "The dogs saw two kites."},
        {"text": "The dog saw a cat."},
        {"messages": [{"role": "user", "content": "A story about a kite."}, {"role": "assistant", "content": "The dog ran."}]},
    ]
    data.write(tmp_path / "rows.jsonl", rows, lambda row: not text.together([("dog", "kite")], data.whole_text(row)))
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [rows[1]]
    assert "2 dropped" in capsys.readouterr().out


def numbered_story(number: int) -> str:
    rng = random.Random(number)
    return " ".join(f"word{rng.randrange(10_000)}" for _ in range(60)) + "."


def test_the_split_depends_on_the_story_alone() -> None:
    stories = [numbered_story(i) for i in range(400)]
    training, held_out = text.split_stories("<|endoftext|>".join([*stories, "an unfinished story"]))
    assert sorted(training + held_out) == sorted(stories)
    assert 5 <= len(held_out) <= 40
    assert all(map(text.is_held_out, held_out))
    again, held_again = text.split_stories("<|endoftext|>".join([*reversed(stories * 2), ""]))
    assert (set(again), set(held_again)) == (set(training), set(held_out))
    assert len(again) == len(training)


def test_a_near_copy_of_a_held_out_story_is_not_trained_on() -> None:
    stories = [numbered_story(i) for i in range(400)]
    held_out = next(filter(text.is_held_out, stories))
    copies = [held_out + f" The end {i}." for i in range(20)]
    training, kept_apart = text.split_stories("<|endoftext|>".join([*stories, *copies, ""]))
    assert not set(training) & set(copies)
    assert len(training) + len([s for s in kept_apart if s not in copies]) == len(stories)


VOCABULARY = frozenset(re.findall(r"[a-z]+", STORY.lower()))


def test_sound_stories() -> None:
    sound = STORY + " " + STORY[:40].replace("time,", "time.")
    assert not data.is_sound(sound, VOCABULARY)  # ends in the middle of a sentence
    assert data.is_sound(STORY + " They played.", VOCABULARY)


@pytest.mark.parametrize(
    "flaw",
    [" They plaid.", " And they they played.", ' "They played.', " Théy played.", " They played" + ", played" * 60 + "."],
)
def test_unsound_stories(flaw: str) -> None:
    assert not data.is_sound(STORY + flaw, VOCABULARY)


def test_samples_are_filtered(tmp_path: Path) -> None:
    other = STORY.replace("dog", "owl").replace("little", "red")
    stories = [STORY, STORY, "Too short.", other]
    (tmp_path / "0000.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    assert data.read_samples(tmp_path, ["nothing like it"], VOCABULARY) == ([STORY, other], {"twice": 1, "unsound": 1})
    assert data.read_samples(tmp_path, [STORY], VOCABULARY)[0] == []  # the other one shares more than a tenth of its runs


def test_passages_keep_whole_paragraphs() -> None:
    paragraphs = [f"Paragraph {i} tells ‘something’ of a fair length, {'and more ' * (i % 7)}so it goes." for i in range(40)]
    book = "\n\n".join(["Produced by somebody who typed it all in for us", "CHAPTER I", *paragraphs])
    found = list(data.passages(book, longest=400))
    assert "\n".join(found).split("\n") == [p.replace("‘", "'").replace("’", "'") for p in paragraphs]
    assert all(len(passage) <= 400 for passage in found)


def test_openings() -> None:
    rng = random.Random(0)
    openings = [text.opening(rng, [STORY]) for _ in range(300)]
    assert 120 < openings.count("") < 210
    assert "Once upon a time, there was a little dog named Max." in openings
    assert len(set(openings)) > 30


# --- judging --------------------------------------------------------------------------------------------------------


class Words:
    """A model that reads one token per word."""

    def __init__(self, ctx_size: int) -> None:
        self.ctx_size, self.bos_id, self.name = ctx_size, 0, "words"
        self.tokenizer = SimpleNamespace(encode=lambda text, bos: [1] * len(text.split()))


def test_both_models_are_judged_by_the_same_text() -> None:
    models: Any = (Words(ctx_size=6), Words(ctx_size=9))
    assert stories_eval.common_cut("one two\nthree four five six seven", models) == "one two\nthree four five"  # and BOS
    assert stories_eval.common_cut("one two", models) == "one two"


def test_bits_per_byte_counts_every_byte() -> None:
    model: Any = Words(ctx_size=9)
    model.score = lambda ids: SimpleNamespace(log_likelihood=-np.log(2) * (len(ids) - 1))
    assert stories_eval.bits_per_byte(model, ["éa b", "c"]) == pytest.approx(3 / 6)  # one bit a word


def test_report() -> None:
    told = [
        stories_eval.Told(("dog", "kite"), "The dogs ran after a kite.", True),
        stories_eval.Told(("dog", "kite"), "The dog sat in a boat, and the cat too.", True),
        stories_eval.Told(("cat", "boat"), "A cat.", False),
        stories_eval.Told(("cat", "boat"), "One two three four five six seven eight nine.", True),
    ]
    figures = stories_eval.report(told, ["zero one two three four five six seven eight"])
    assert figures == pytest.approx(
        {"both_nouns": 0.25, "both_nouns_by_chance": 0.25, "one_noun": 0.5, "ended": 0.75, "copied_runs": 0.2, "words": 6.75}
    )


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_draws_follow_the_odds_and_min_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.18, 0.02]).log().repeat(20_000, 1)
    drawn = torch.bincount(sampler.draw(logits, 0.1, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    expected = torch.tensor([0.5, 0.3, 0.18, 0.0]) / 0.98  # 0.02 is less than a tenth of 0.5
    torch.testing.assert_close(drawn, expected, atol=0.012, rtol=0)
    assert drawn[3] == 0


@pytest.mark.real
def test_the_teacher_is_the_llama_that_transformers_runs(data_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = data_dir / "models" / "stories260K-hf"
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher = sampler.Teacher(folder)
    tokens = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = reference(tokens).logits
        cache = teacher.empty_cache(3)
        logits = torch.stack([teacher.step(tokens[:, i], i, cache) for i in range(40)], dim=1)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.real
def test_sampled_stories_begin_as_told_and_repeat_with_the_seed(data_dir: Path) -> None:
    teacher = sampler.Teacher(data_dir / "models" / "stories260K-hf")
    openings = ["One day, a cat saw a red kite.", "", "Tom had a"] * 3
    stories = sampler.sample(teacher, openings, seed=7)
    assert stories == sampler.sample(teacher, openings, seed=7)
    assert len(set(stories)) == len(stories) > 4
    assert sum(story.startswith("One day, a cat saw a red kite.") for story in stories) >= 2
    assert all(len(story) > 50 for story in stories)


@pytest.mark.real
def test_no_held_out_story_is_in_the_training_text(data_dir: Path) -> None:
    training, held_out = text.read_stories(data_dir)
    assert len(training) > 2000
    assert len(held_out) > 80
    assert not set(training) & set(held_out)
