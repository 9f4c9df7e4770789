"""Blocks of the KV cache: who holds which, what is kept for reuse, and when there is room. Numbers only; the backend has the bytes.

The cache of a sequence is a table of block ids, `block_size` positions each (PagedAttention, arXiv:2309.06180).
A full block is known by a hash chained over all tokens before it, so equal beginnings find each other. Layers
with the same sliding window share one *group* of blocks; a windowed group lets go of blocks no later query can see.
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

AHEAD = 64  # blocks a growing sequence takes at once, so that its ids stay consecutive beside other growing sequences
HELD = np.iinfo(np.int64).max
ABSENT = -1  # in a block table: let go, or not yet taken


class BlockPool:
    """The blocks of one group: ids 0 to num_blocks - 1 with reference counts.

    A block nobody holds is *free*; while its contents are still known by a hash it is also *cached*: a later
    sequence may take it back, and it is emptied only when no run of empty blocks is left that is long enough.
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
        """One more reference to a block that is known."""
        if self.references[block] == 0:
            self._last_used[block] = HELD
            self.num_free -= 1
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one leaves the block cached if its contents are known, else empty."""
        self.references[block] -= 1
        if self.references[block] == 0:
            self._releases += 1
            self._last_used[block] = 0 if self._hashes[block] is None else self._releases
            self.num_free += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes the contents of a held block findable; where another block already has them, that one stays."""
        if block_hash not in self.known:
            self.known[block_hash] = block
            self._hashes[block] = block_hash

    def allocate(self, count: int, after: int = ABSENT) -> list[int]:
        """`count` blocks with one reference each, in one run of ids if there is one, at best the ids following `after`.

        The caller has made sure that `count` blocks are free.
        """
        blocks: list[int] = []
        while len(blocks) < count:
            start, size = self._place(count - len(blocks), after + 1)
            for block in range(start, start + size):
                self._take(block)
            blocks.extend(range(start, start + size))
        return blocks

    def _place(self, count: int, following: int) -> tuple[int, int]:
        """Start and length of the run to take next.

        First choice are empty blocks. Where cached ones must go, it is the run at `following`, so that the sequence stays
        in one piece, or else the run whose most recently used block is the oldest.
        """
        continues = 0 < following <= self.num_blocks - count
        if continues and not self._last_used[following : following + count].any():
            return following, count
        newest = sliding_window_view(self._last_used, count).max(axis=1)
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
class BlockTables:
    """One sequence's blocks in every group."""

    tables: list[Table]  # per group int32 [blocks of the whole request]
    hashes: list[bytes]  # chained, one per full block whose tokens are known
    first: list[int] = field(default_factory=list)  # per group: table entries [first, stop) are held
    stop: list[int] = field(default_factory=list)
    promised: list[int] = field(default_factory=list)  # per group: see KVCache.admit
    published: int = 0  # blocks whose contents are computed and findable
    root: bytes = b""


class KVCache:
    """The block pools of all groups and the promises made on them, so that an admitted sequence never runs out of blocks.

    Args:
        windows: per group the sliding window in tokens, None for full attention.
        block_size: tokens per block.
        max_tokens: tokens the first group can hold. A windowed group beside it needs less: room for one whole
            window and a quarter of the rest, which is what many short sequences at once share.
        max_step_tokens: most tokens of one sequence in one step.
    """

    def __init__(self, windows: Sequence[int | None], block_size: int, max_tokens: int, max_step_tokens: int):
        self.windows = tuple(windows)
        self.block_size = block_size
        self._max_step_tokens = max_step_tokens
        self.max_tokens = max_tokens // block_size * block_size
        self.pools = [BlockPool(count) for count in pool_sizes(self.windows, block_size, self.max_tokens, max_step_tokens)]
        self._promised = [0] * len(self.windows)

    @property
    def capacity(self) -> int | None:
        """Most tokens of one sequence; None where windows alone bound what it holds."""
        for pool, window in zip(self.pools, self.windows, strict=True):
            if window is None or most_held(window, self.block_size, self._max_step_tokens) > pool.num_blocks:
                return self.max_tokens
        return None

    def open(self, root: bytes, prompt: Tokens, total: int) -> BlockTables:
        """Empty tables for a request of `total` tokens, and the hashes of its prompt. Takes no block yet."""
        count = blocks_for(total, self.block_size)
        tables = BlockTables([np.full(count, ABSENT, dtype=np.int32) for _ in self.windows], [], root=root)
        self._extend_hashes(tables, prompt)
        return tables

    def match(self, tables: BlockTables, prompt_length: int) -> int:
        """How many leading blocks need not be computed: cached in every group as far as later queries look back.

        The last token of the prompt is always computed, for its logits.
        """
        count = min(len(tables.hashes), (prompt_length - 1) // self.block_size)
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

    def admit(self, tables: BlockTables, count: int) -> bool:
        """Takes the `count` leading blocks that `match` found and promises the rest; False, and nothing done, if there is no room.

        Full attention holds every block to the end, so its promise is the blocks still to be taken: it shrinks as they are.
        A windowed group's promise is the most it ever holds at once, and stands to the end: blocks it shares and lets go of
        may stay with another sequence, so that sharing frees nothing for certain.
        """
        found: list[list[int]] = []
        promises: list[int] = []
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            total = len(tables.tables[group])
            blocks = [pool.known[h] for h in tables.hashes[self._first_needed(window, count * self.block_size) : count]]
            found.append(blocks)
            if window is None:
                promises.append(total - count)
                fits = self._promised[group] + promises[group] + sum(map(pool.is_free, blocks)) <= pool.num_free
            else:
                promises.append(min(total, most_held(window, self.block_size, self._max_step_tokens)))
                fits = self._promised[group] + promises[group] <= pool.num_blocks
            if not fits:
                return False
        for group, blocks in enumerate(found):
            for block in blocks:
                self.pools[group].hold(block)
            tables.tables[group][count - len(blocks) : count] = blocks
            self._promised[group] += promises[group]
        tables.first = [count - len(blocks) for blocks in found]
        tables.stop = [count] * len(found)
        tables.promised = promises
        tables.published = count
        return True

    def prepare(self, tables: BlockTables, start: int, end: int) -> bool:
        """Makes room for the tokens up to position `end` and lets go of what those from `start` on no longer see.

        True if a table changed.
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
                    take = min(max(needed, len(tables.hashes)) - stop + AHEAD, tables.promised[group])
                    tables.promised[group] -= take
                    self._promised[group] -= take
                table[stop : stop + take] = pool.allocate(take, int(table[stop - 1]) if stop else ABSENT)
                tables.stop[group] = stop + take
                changed = True
        return changed

    def publish(self, tables: BlockTables, tokens: Tokens) -> None:
        """Makes the full blocks among the computed `tokens` (all from position 0) findable."""
        self._extend_hashes(tables, tokens)
        for index in range(tables.published, len(tokens) // self.block_size):
            for pool, table in zip(self.pools, tables.tables, strict=True):
                if table[index] != ABSENT:
                    pool.publish(int(table[index]), tables.hashes[index])
        tables.published = max(tables.published, len(tokens) // self.block_size)

    def close(self, tables: BlockTables) -> None:
        """Gives everything back; what was published stays cached. The end of a sequence is forgotten before its beginning."""
        for group, pool in enumerate(self.pools):
            for block in tables.tables[group][tables.first[group] : tables.stop[group]][::-1].tolist():
                pool.release(block)
            tables.tables[group][:] = ABSENT
            self._promised[group] -= tables.promised[group]
        tables.first, tables.stop, tables.promised = ([0] * len(self.pools) for _ in range(3))

    def _drop(self, tables: BlockTables, group: int, first: int) -> None:
        table = tables.tables[group]
        for index in range(tables.first[group], first):
            self.pools[group].release(int(table[index]))
            table[index] = ABSENT
        tables.first[group] = first

    def _first_needed(self, window: int | None, position: int) -> int:
        """The first block that a query at `position` or later can see: keys with query - key < window."""
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def _extend_hashes(self, tables: BlockTables, tokens: Tokens) -> None:
        size, hashes = self.block_size, tables.hashes
        while len(hashes) < len(tokens) // size:
            parent = hashes[-1] if hashes else tables.root
            chunk = tokens[len(hashes) * size : (len(hashes) + 1) * size]
            hashes.append(blake2b(parent + chunk.tobytes(), digest_size=16).digest())


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens from position 0."""
    return -(-tokens // block_size)


def most_held(window: int, block_size: int, step_tokens: int) -> int:
    """Most blocks a sequence holds at once in a windowed group: a window and a step, at the worst alignment."""
    return (window + step_tokens + block_size - 3) // block_size + 1


def pool_sizes(windows: Sequence[int | None], block_size: int, max_tokens: int, max_step_tokens: int) -> list[int]:
    """Blocks per group for a cache of `max_tokens`; see KVCache."""
    whole = max_tokens // block_size
    sizes = [whole]
    for window in windows[1:]:
        held = most_held(window or 0, block_size, max_step_tokens)
        sizes.append(min(whole, held + whole // 4))
    return sizes
