"""Cache blocks and state slots: who holds which, what is kept for reuse, and when there is room. Numbers only; the backend has the bytes.

The KV cache of a sequence is a table of block ids, `block_size` positions each (PagedAttention, arXiv:2309.06180).
A full block is known by a hash chained over all tokens before it, so equal prefixes find each other. Layers
with the same sliding window share one *group* of blocks; a windowed group gives back blocks no later query can see.

Layers with a recurrent state keep one state a sequence, in a *slot*, and overwrite it with every token. To go on from a prefix, or to
take draft tokens back, the state at just that place must have been kept: a step writes it into another slot there. A prefix of n blocks
can be reused where the blocks are cached and a slot is known under the hash of the n-th.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Table = NDArray[np.int32]

AHEAD = 64  # blocks a growing sequence takes at once, so that its ids stay consecutive while other sequences grow, too
STATE_INTERVAL = 512  # tokens of a prompt from one kept state to the next
STATE_SLOTS = (4, 64)  # least and most: a slot is tens of megabytes, and two of them run one sequence
HELD = np.iinfo(np.int64).max
ABSENT = -1  # in a block table: given back, or not yet taken; of a slot: none


class BlockPool:
    """The blocks of one group, or the state slots: ids 0 to num_blocks - 1 with reference counts.

    A block nobody holds is *free*; while its contents are still known by a hash it is also *cached*: a later
    sequence may take it again, and it is emptied only when no run of empty blocks is left that is long enough.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.references = [0] * num_blocks
        self.known: dict[bytes, int] = {}  # hash of contents -> block, held or cached
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._last_used = np.zeros(num_blocks, dtype=np.int64)  # 0: empty; HELD; else cached, and the count of releases then
        self._releases = 0

    def is_free(self, block: int) -> bool:
        return self.references[block] == 0

    def hold(self, block: int) -> None:
        """Add a reference to a block that is known."""
        if self.references[block] == 0:
            self._last_used[block] = HELD
            self.num_free -= 1
        self.references[block] += 1

    def release(self, block: int) -> None:
        """Take a reference away; the last one leaves the block cached if its contents are known, else empty."""
        self.references[block] -= 1
        if self.references[block] == 0:
            self._releases += 1
            self._last_used[block] = 0 if self._hashes[block] is None else self._releases
            self.num_free += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Make the contents of a held block findable; where another block already has them, that one stays."""
        if block_hash not in self.known:
            self.known[block_hash] = block
            self._hashes[block] = block_hash

    def forget(self, block_hash: bytes) -> None:
        """Empty the block of that hash unless a sequence holds it."""
        block = self.known.get(block_hash)
        if block is not None and self.is_free(block):
            del self.known[block_hash]
            self._hashes[block] = None
            self._last_used[block] = 0

    def allocate(self, count: int, after: int = ABSENT) -> list[int]:
        """Return `count` blocks with one reference each, in one run of ids if there is one, at best the ids following `after`.

        Backends read a run in place and gather scattered blocks, so consecutive ids are worth a search. The caller has made sure
        that `count` blocks are free.
        """
        blocks: list[int] = []
        while len(blocks) < count:
            start, size = self._place(count - len(blocks), after + 1)
            for block in range(start, start + size):
                self._take(block)
            blocks.extend(range(start, start + size))
        return blocks

    def _place(self, count: int, following: int) -> tuple[int, int]:
        """Return start and length of the run to take next.

        First choice are empty blocks. Where cached ones must go, it is the run at `following`, so that the sequence stays
        in one piece, or else the run whose most recently used block is the oldest.
        """
        continues = 0 < following <= self.num_blocks - count
        if continues and not self._last_used[following : following + count].any():
            return following, count
        newest = sliding_window_view(self._last_used, count).max(axis=1)  # of each run of `count` blocks, its most recent use
        best = int(newest.argmin())
        if continues and newest[best] > 0 and newest[following] < HELD:
            return following, count
        if newest[best] < HELD:
            return best, count
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self._last_used < HELD, [False]))))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax())
        return int(starts[longest]), int(lengths[longest])

    def _take(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self.known[block_hash]
            self._hashes[block] = None
        self._last_used[block] = HELD
        self.num_free -= 1
        self.references[block] = 1


@dataclass(slots=True, eq=False)
class SequenceCache:
    """One sequence's blocks in every group, and its state slots."""

    tables: list[Table]  # per group int32 [blocks of the whole request]
    hashes: list[bytes]  # chained, one per full block whose tokens are known
    first: list[int] = field(default_factory=list)  # per group: table entries [first, stop) are held
    stop: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)  # per group, blocks: see CacheManager.admit
    published: int = 0  # blocks whose contents are computed and findable
    root: bytes = b""
    prompt_blocks: int = 0  # of the prompt without its last token, which is always computed for its logits
    state: int = ABSENT  # the slot with the state after the computed tokens; other sequences may hold it too, so nobody writes it
    written: dict[int, int] = field(default_factory=dict)  # number of tokens -> slot that gets the state after them in the current step
    reply_state: bytes = b""  # hash of the latest state kept within the reply


class CacheManager:
    """The pools of all groups and of states, and the reservations made on them, so that an admitted sequence never runs out.

    Args:
        windows: per group the sliding window in tokens, None for full attention.
        block_size: tokens per block.
        max_tokens: tokens the first group can hold. A windowed group beside it needs less: room for one whole
            window and a quarter of the rest, which is what many short sequences at once share.
        max_step_tokens: most tokens of one sequence in one step.
        state_slots: how many there are; 0 for a model without recurrent states.
        state_interval: tokens of a prompt from one kept state to the next.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        block_size: int,
        max_tokens: int,
        max_step_tokens: int,
        *,
        state_slots: int = 0,
        state_interval: int = STATE_INTERVAL,
    ):
        self.windows = tuple(windows)
        self.block_size = block_size
        self._max_step_tokens = max_step_tokens
        self.max_tokens = max_tokens // block_size * block_size
        self.pools = [BlockPool(count) for count in pool_sizes(self.windows, block_size, self.max_tokens, max_step_tokens)]
        self._reserved = [0] * len(self.windows)
        self.states = BlockPool(state_slots) if state_slots else None
        self._state_interval = max(1, state_interval // block_size)  # in blocks
        self._admitted = 0  # sequences

    @property
    def capacity(self) -> int | None:
        """The most tokens of one sequence; None where windows alone bound what it holds."""
        for pool, window in zip(self.pools, self.windows, strict=True):
            if window is None or most_held(window, self.block_size, self._max_step_tokens) > pool.num_blocks:
                return self.max_tokens
        return None

    def open(self, root: bytes, prompt: Tokens, total: int) -> SequenceCache:
        """Return empty tables for a request of `total` tokens, with the hashes of its prompt. No block is taken yet."""
        count = blocks_for(total, self.block_size)
        tables = SequenceCache([np.full(count, ABSENT, dtype=np.int32) for _ in self.windows], [], root=root)
        tables.prompt_blocks = (len(prompt) - 1) // self.block_size
        self._extend_hashes(tables, prompt)
        return tables

    def match(self, tables: SequenceCache) -> int:
        """Return how many leading blocks need not be computed: cached in every group as far as later queries look back, with a state.

        The last token of the prompt is always computed, for its logits.
        """
        count = self._match_blocks(tables, tables.prompt_blocks)
        if self.states is None:
            return count
        while count and tables.hashes[count - 1] not in self.states.known:
            # A window looks back from the end of the prefix, so a shorter one may need blocks that the longer one did not.
            count = self._match_blocks(tables, count - 1)
        return count

    def coming(self, tables: SequenceCache, found: int, other: SequenceCache) -> bool:
        """Return whether `other`, which is being computed, will soon publish a longer prefix of `tables` than the `found` blocks."""
        interval = self._state_interval
        counts = (found + 1,) if self.states is None else (other.prompt_blocks, (found // interval + 1) * interval)
        return any(
            found < count <= tables.prompt_blocks
            and other.published < count <= len(other.hashes)
            and other.hashes[count - 1] == tables.hashes[count - 1]
            for count in counts
        )

    def _match_blocks(self, tables: SequenceCache, count: int) -> int:
        """Return the most leading blocks, up to `count`, that are cached in every group as far as later queries look back."""
        for pool, window in zip(self.pools, self.windows, strict=True):
            if window is None:
                count = next((i for i in range(count) if tables.hashes[i] not in pool.known), count)
        while count:
            missing = (
                i
                for pool, window in zip(self.pools, self.windows, strict=True)
                for i in range(self._first_needed(window, count * self.block_size), count)
                if tables.hashes[i] not in pool.known
            )
            last_missing = max(missing, default=None)
            if last_missing is None:
                break
            count = last_missing  # every count above it would need that block too
        return count

    def admit(self, tables: SequenceCache, count: int) -> bool:
        """Take the `count` leading blocks that `match` found and reserve the rest; False, and nothing done, if there is no room.

        Full attention holds every block to the end, so what is reserved is the blocks still to be taken: it shrinks as they are.
        For a windowed group it is the most it ever holds at once, and stands to the end: blocks that it shares and gives back
        may stay with another sequence, so that sharing frees nothing for certain.
        """
        if self.states is not None and 2 * (self._admitted + 1) > self.states.num_blocks:
            return False  # each sequence reads one slot and writes another: a step that is broken off can then be repeated
        found: list[list[int]] = []
        reservations: list[int] = []
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            total = len(tables.tables[group])
            blocks = [pool.known[h] for h in tables.hashes[self._first_needed(window, count * self.block_size) : count]]
            found.append(blocks)
            if window is None:
                reservations.append(total - count)
                fits = self._reserved[group] + reservations[group] + sum(map(pool.is_free, blocks)) <= pool.num_free
            else:
                reservations.append(min(total, most_held(window, self.block_size, self._max_step_tokens)))
                fits = self._reserved[group] + reservations[group] <= pool.num_blocks
            if not fits:
                return False
        for group, blocks in enumerate(found):
            for block in blocks:
                self.pools[group].hold(block)
            tables.tables[group][count - len(blocks) : count] = blocks
            self._reserved[group] += reservations[group]
        tables.first = [count - len(blocks) for blocks in found]
        tables.stop = [count] * len(found)
        tables.reserved = reservations
        tables.published = count
        self._admitted += 1
        if self.states is not None and count:
            tables.state = self.states.known[tables.hashes[count - 1]]
            self.states.hold(tables.state)
        return True

    def prepare(self, tables: SequenceCache, start: int, end: int) -> bool:
        """Make room for the tokens up to position `end` and give back what those from `start` on no longer see.

        Returns whether a table changed.
        """
        needed = blocks_for(end, self.block_size)
        changed = False
        for group, window in enumerate(self.windows):
            if window is not None:
                first = self._first_needed(window, start)
                if first > tables.first[group]:
                    self._drop(tables, group, first)
                    changed = True
            stop = tables.stop[group]
            if needed > stop:
                pool, table = self.pools[group], tables.tables[group]
                take = needed - stop
                if window is None:  # the prompt in one piece, and room to grow
                    take = min(max(needed, len(tables.hashes)) - stop + AHEAD, tables.reserved[group])
                    tables.reserved[group] -= take
                    self._reserved[group] -= take
                table[stop : stop + take] = pool.allocate(take, int(table[stop - 1]) if stop else ABSENT)
                tables.stop[group] = stop + take
                changed = True
        return changed

    def publish(self, tables: SequenceCache, tokens: Tokens) -> None:
        """Make the full blocks among the computed `tokens` (all from position 0) findable."""
        self._extend_hashes(tables, tokens)
        for index in range(tables.published, len(tokens) // self.block_size):
            for pool, table in zip(self.pools, tables.tables, strict=True):
                if table[index] != ABSENT:
                    pool.publish(int(table[index]), tables.hashes[index])
        tables.published = max(tables.published, len(tokens) // self.block_size)

    def prepare_states(self, steps: Sequence[tuple[SequenceCache, int, int, int]]) -> None:
        """Take the slots into which a step writes states: `written` of each sequence.

        steps: of each sequence its cache, the first and the end of its positions in the step, and its length: positions from `length`
            on are draft tokens. Each of them may turn out to be the last, so the state after each is kept; `draft_states` says for
            how many there is room.
        """
        assert self.states is not None
        for cache, _, _, _ in steps:
            self._release_written(cache)  # of a step that was broken off
        for cache, start, end, length in steps:
            cache.written = {tokens: self.states.allocate(1)[0] for tokens in range(max(start + 1, min(length, end)), end + 1)}
        for cache, start, end, _ in steps:  # what is left goes to states within prompts
            for blocks in range(start // self.block_size + 1, min(cache.prompt_blocks, (end - 1) // self.block_size) + 1):
                wanted = blocks == cache.prompt_blocks or blocks % self._state_interval == 0
                if wanted and self.states.num_free and cache.hashes[blocks - 1] not in self.states.known:
                    cache.written[blocks * self.block_size] = self.states.allocate(1)[0]

    def draft_states(self, steps: Sequence[SequenceCache]) -> int:
        """Return how many draft tokens a step of these sequences has room for; each takes a slot."""
        assert self.states is not None
        return self.states.num_free + sum(len(cache.written) for cache in steps) - len(steps)

    def commit_states(self, cache: SequenceCache, computed: int) -> None:
        """After a step: go on from the state after `computed` tokens, and make those findable that are at places of reuse.

        The hashes of all full blocks of the computed tokens must be there (`publish`).
        """
        assert self.states is not None
        for tokens, slot in cache.written.items():
            blocks, beside = divmod(tokens, self.block_size)
            if beside or tokens > computed or not blocks:
                continue
            name = cache.hashes[blocks - 1]
            for_long = blocks == cache.prompt_blocks or blocks % self._state_interval == 0
            if for_long or blocks > cache.prompt_blocks:
                self.states.publish(slot, name)
            if blocks > cache.prompt_blocks:
                # Of a reply the latest is kept too: the next turn of a chat goes on from there.
                self.states.forget(cache.reply_state)
                cache.reply_state = b"" if for_long else name
        if cache.state != ABSENT:
            self.states.release(cache.state)
        cache.state = cache.written.pop(computed)
        self._release_written(cache)

    def _release_written(self, cache: SequenceCache) -> None:
        if self.states is not None:
            for slot in cache.written.values():
                self.states.release(slot)
        cache.written = {}

    def close(self, tables: SequenceCache) -> None:
        """Give everything back; what was published stays cached."""
        self._admitted -= 1
        self._release_written(tables)
        if self.states is not None and tables.state != ABSENT:
            self.states.release(tables.state)
        tables.state = ABSENT
        for group, pool in enumerate(self.pools):
            # The end first: the least recently released is emptied first, and a prefix without its beginning would be of no use.
            for block in tables.tables[group][tables.first[group] : tables.stop[group]][::-1].tolist():
                pool.release(block)
            tables.tables[group][:] = ABSENT
            self._reserved[group] -= tables.reserved[group]
        tables.first, tables.stop, tables.reserved = ([0] * len(self.pools) for _ in range(3))

    def _drop(self, tables: SequenceCache, group: int, first: int) -> None:
        table = tables.tables[group]
        for index in range(tables.first[group], first):
            self.pools[group].release(int(table[index]))
            table[index] = ABSENT
        tables.first[group] = first

    def _first_needed(self, window: int | None, position: int) -> int:
        """Return the first block that a query at `position` or later can see: keys with query - key < window."""
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def _extend_hashes(self, tables: SequenceCache, tokens: Tokens) -> None:
        size, hashes = self.block_size, tables.hashes
        while len(hashes) < len(tokens) // size:
            parent = hashes[-1] if hashes else tables.root
            chunk = tokens[len(hashes) * size : (len(hashes) + 1) * size]
            hashes.append(blake2b(parent + chunk.tobytes(), digest_size=16).digest())


def blocks_for(tokens: int, block_size: int) -> int:
    """Return how many blocks hold `tokens` tokens from position 0."""
    return -(-tokens // block_size)


def most_held(window: int, block_size: int, step_tokens: int) -> int:
    """Return the most blocks that a sequence holds at once in a windowed group: a window and a step, at the worst alignment."""
    return (window + step_tokens + block_size - 3) // block_size + 1


def pool_sizes(windows: Sequence[int | None], block_size: int, max_tokens: int, max_step_tokens: int) -> list[int]:
    """Return the blocks of each group for a cache of `max_tokens`; see CacheManager."""
    whole = max_tokens // block_size
    sizes = [whole for _ in windows[:1]]
    for window in windows[1:]:
        held = most_held(window or 0, block_size, max_step_tokens)
        sizes.append(min(whole, held + whole // 4))
    return sizes


def state_slots(max_tokens: int, interval: int = STATE_INTERVAL) -> int:
    """Return how many state slots go with a cache of `max_tokens`, for a model with recurrent states."""
    least, most = STATE_SLOTS
    return min(least + max_tokens // interval, most)
