"""A quote supports a sentence only if numbers, names and negations agree too."""

from __future__ import annotations

import pytest

from llmkit.rag.evidence import numbers, support

QUOTE = "The Harbour pump moves 340 litres of water per minute and was designed by Marta Lindqvist in 1987, not by Karl Berg."


@pytest.mark.parametrize(
    "claim",
    [
        QUOTE,
        "The Harbour pump moves 340 litres per minute.",
        "It was designed by Marta Lindqvist in 1987.",
        "In 1987 Marta Lindqvist designed the Harbour pump.",
        "The pump was not designed by Karl Berg.",
    ],
)
def test_what_the_quote_says_is_supported(claim: str) -> None:
    assert support(claim, QUOTE).supported, support(claim, QUOTE)


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ("The Harbour pump moves 430 litres of water per minute.", "number 430"),
        ("The Harbour pump was designed by Marta Olsson in 1987.", "name"),
        ("The Harbour pump was not designed by Marta Lindqvist.", "negated"),
        ("The Harbour pump was never designed by Marta Lindqvist in 1987.", "negated"),
        ("The Harbour pump was designed by Karl Berg.", "negated"),
        ("The Harbour pump doesn't move water.", "negated"),
    ],
)
def test_a_difference_is_named(claim: str, why: str) -> None:
    found = support(claim, QUOTE)
    assert not found.supported
    assert any(why in problem for problem in found.problems), found


def test_too_little_in_common_is_no_support() -> None:
    found = support("The pump is painted green and sold in Norway by post.", "The pump is heavy.")
    assert not found.supported
    assert support("...", QUOTE).score == 0


def test_opposites() -> None:
    assert not support("Pressure increases with depth.", "Pressure decreases with depth.").supported
    assert support("Pressure increases with depth.", "Pressure increases with depth.").supported


def test_the_heading_may_hold_the_name() -> None:
    claim, quote = "The Harbour pump is greased every 200 hours.", "Grease the bearing of the pump every 200 hours."
    assert not support(claim, quote).supported
    assert support(claim, quote, about="Harbour pump > Care").supported


def test_a_similar_vector_helps_but_does_not_overrule() -> None:
    claim, quote = "Motors lacking oil seize early today.", "Motors without any lubricant seize."
    assert (
        support("The motor seizes quickly", "A motor soon seizes up when dry", similarity=0.9).score
        > support("The motor seizes quickly", "A motor soon seizes up when dry").score - 1e-9
    )
    assert not support("It moves 341 litres.", "It moves 340 litres.", similarity=1.0).supported
    assert support(claim, quote, similarity=None).score < 0.6


def test_numbers_however_written() -> None:
    assert numbers("1,000 people, four boats, the 6th and the sixth, 5.50 kg, −3 degrees, 1990s") == {
        "1000": 1,
        "4": 1,
        "6": 2,
        "5.5": 1,
        "-3": 1,
        "1990": 1,
    }


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("twenty-one arches", "21 arches", True),
        ("twenty-one arches", "twenty-two arches", False),
        ("twenty-one arches", "20 arches", False),
        ("two hundred and five arches", "205 arches", True),
        ("two hundred arches", "100 arches", False),
        ("1.5 million tons", "1,500,000 tons", True),
        ("5 million tons", "5 billion tons", False),
        ("three thousand five hundred tons", "3500 tons", True),
        ("minus 5 degrees", "-5 degrees", True),
        ("minus 5 degrees", "5 degrees", False),
        ("½ litre", "¼ litre", False),
        ("20 five-year plans", "25 plans", False),
        ("twenty and three", "23", False),
        ("release 1.2.3", "release 1.2.3", True),
        ("9" * 50, "9" * 49 + "8", False),
    ],
)
def test_numbers_that_are_made_of_words(one: str, other: str, same: bool) -> None:
    assert (numbers(one) == numbers(other)) is same


@pytest.mark.parametrize(
    ("claim", "quote", "supported"),
    [
        ("Anna defeated Berta in Paris.", "Berta defeated Anna in Paris.", False),
        ("Germany invaded Poland in 1939.", "Poland invaded Germany in 1939.", False),
        ("Anna was defeated by Berta in Paris.", "Berta was defeated by Anna in Paris.", False),
        ("Berta defeated Anna in Paris.", "Anna was defeated by Berta in Paris.", True),
        ("In Paris Anna defeated Berta.", "Anna defeated Berta in Paris.", True),
        ("Berta and Anna signed the treaty.", "Anna and Berta signed the treaty.", True),
    ],
)
def test_names_in_each_others_place(claim: str, quote: str, supported: bool) -> None:
    assert support(claim, quote).supported is supported
