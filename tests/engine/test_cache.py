"""Block accounting: ids in one piece, the oldest prefix forgotten first."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.engine.cache import BlockPool, CacheManager, SequenceCache, blocks_for, most_held


def fill(cache: CacheManager, tokens: np.ndarray, prompt: int, total: int) -> SequenceCache:
    """A sequence that is computed token by token after its prompt, and still holds its blocks."""
    tables = cache.open(b"", tokens[:prompt], total)
    assert cache.admit(tables, cache.match(tables))
    for end in [*range(512, prompt, 512), *range(prompt, len(tokens) + 1)]:
        cache.prepare(tables, tables.published * cache.block_size, end)
        cache.publish(tables, tokens[:end])
    return tables


def test_one_sequence_after_another_stays_in_one_piece_when_the_cache_is_full() -> None:
    """What is forgotten makes room in one run of ids, whatever the lengths: contiguous keys are a backend's fast path."""
    random = np.random.default_rng(0)
    cache = CacheManager((None,), 16, max_tokens=4096, max_step_tokens=512)
    for _ in range(60):
        prompt, reply, spare = random.integers(1, 900), random.integers(1, 300), random.integers(0, 600)
        tokens = random.integers(0, 9999, prompt + reply).astype(np.int32)
        tables = fill(cache, tokens, int(prompt), int(prompt + reply + spare))
        assert (np.diff(tables.tables[0][: blocks_for(len(tokens), 16)]) == 1).all()
        cache.close(tables)


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    cache = CacheManager((None,), 4, max_tokens=48, max_step_tokens=64)
    prompts = [np.full(16, token, dtype=np.int32) for token in range(4)]
    for prompt in prompts[:3]:
        cache.close(fill(cache, prompt, 15, 16))
    cache.close(fill(cache, prompts[0], 15, 16))  # used again: the second is the oldest now
    cache.close(fill(cache, prompts[3], 15, 16))
    assert [cache.match(cache.open(b"", prompt, 16)) for prompt in prompts] == [3, 0, 3, 3]


def test_an_empty_run_is_preferred_to_a_cached_prefix() -> None:
    pool = BlockPool(8)
    first = pool.allocate(4)
    for index, block in enumerate(first):
        pool.publish(block, bytes([index]))
        pool.release(block)
    assert pool.allocate(3, after=1) == [4, 5, 6]
    assert len(pool.known) == 4


def test_blocks_are_scattered_only_where_no_run_is_long_enough() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(6)
    for block in (0, 2, 3, 5):
        pool.release(blocks[block])
    assert sorted(pool.allocate(3)) == [0, 2, 3]
    assert pool.num_free == 1
    assert pool.allocate(1) == [5]


def test_a_cached_prefix_taken_back_is_room_no_more() -> None:
    """Five of twelve blocks are free, and all five are the prefix: the two blocks beyond it do not fit."""
    cache = CacheManager((None,), 4, max_tokens=48, max_step_tokens=64)
    prompt = np.zeros(20, dtype=np.int32)
    cache.close(fill(cache, prompt, 20, 20))
    other = cache.open(b"other", prompt, 28)
    assert cache.admit(other, 0)
    again = cache.open(b"", np.append(prompt, np.int32(0)), 28)
    assert cache.match(again) == 5
    assert not cache.admit(again, 5)
    cache.close(other)
    assert cache.admit(again, 5)


def test_equal_contents_computed_twice_are_known_once() -> None:
    """Two replies that happen to be equal: the second copy must not outlive, nor take along, what is known of the first."""
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    for block in (first, second):
        pool.publish(block, b"same")
    pool.release(first)
    pool.release(second)
    assert pool.known == {b"same": first}
    pool.allocate(2)
    assert pool.known == {}


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_most_held_is_reached_and_never_passed(window: int, step: int) -> None:
    """Over every alignment of a whole step: the reservation made for a windowed group is exact."""
    worst = 0
    for start in range(20, 24):
        cache = CacheManager((window,), 4, max_tokens=400, max_step_tokens=step)
        tables = cache.open(b"", np.zeros(1, dtype=np.int32), 200)
        assert cache.admit(tables, 0)
        for end in range(1, start + 1):
            cache.prepare(tables, end - 1, end)
        cache.prepare(tables, start, start + step)
        worst = max(worst, tables.stop[0] - tables.first[0])
        cache.close(tables)
        assert cache.pools[0].num_free == cache.pools[0].num_blocks
    assert worst == most_held(window, 4, step)
