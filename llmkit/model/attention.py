"""Attention: grouped-query (arXiv:2305.13245), causal, optionally in a sliding window, with or without a KV cache.

    query heads   q0 q1 q2 q3 q4 q5      num_attention_heads = 6
                   \\ | /    \\ | /
    kv heads        k0        k1         num_key_value_heads = 2: each serves a group of 3 query heads

A mask is never a padding convention. It comes from positions: a key is visible iff
`0 <= key position <= query position`, `query position - key position < window`, and both are of the same sequence, or the
query's sequence goes on from the key's (its parent). Here is attention as a function; the module with its weights is in `layers.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.config import ModelConfig, RopeConfig
from llmkit.errors import UsageError
from llmkit.rope import inverse_frequencies

# One layer's recurrence over consecutive tokens of a sequence: (inputs [batch, tokens, ...], states, each [batch, *State.shape])
# -> (outputs [batch, tokens, ...], the states after the last token). It makes new tensors and leaves those it is given as they are.
Recurrence = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]


class LayerCaches(Protocol):
    """What the tokens of one forward know of those before them. A mixer asks it with the number of its own layer.

    `NoCache` below knows the given tokens alone; `cache.StepCaches` everything before them too.
    """

    @property
    def rope_lengths(self) -> Sequence[int]:
        """The lengths of text that rotary frequencies are chosen for, one for all tokens or one for each; (0,) where none depend on it."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep keys and values, and attend to all a query can see: q `[b, t, heads, d]`, k, v `[b, t, kv_heads, d]` -> q's shape."""
        ...

    def recur(self, layer: int, inputs: Tensor, recurrence: Recurrence) -> Tensor:
        """Run a recurrence along every sequence from the state it has, and keep the state it ends with.

        inputs `[b, t, ...]`: all tokens of the forward; returns the outputs of all, in the same order. `recurrence` is called with
        runs of consecutive tokens of one sequence (or with one token of several), and with states as `config.states` describes them,
        those of kind "kv" left out: float32, zeros before the first token.
        """
        ...


# --- rotary position embeddings (RoFormer, arXiv:2104.09864): queries and keys turn by an angle that grows with the position ----------


Rotary = tuple[Tensor, Tensor]  # cos and sin, each [batch, seq, 1, rotary_dim]


def rotary_tables(rope: RopeConfig, head_dim: int, positions: Tensor, lengths: Sequence[int]) -> Rotary:
    """cos and sin for every token, float32 `[batch, seq, 1, rotary_dim]`, ready for `rotate`.

    positions: `[batch, seq]`. lengths: one for all, or one per token of the flattened batch: the sequence lengths for
    which frequencies are chosen. The first half of `sin` is negated, so that rotating is one roll and one multiply-add.
    """
    distinct = tuple(sorted(set(lengths)))
    # factor: what YaRN and longrope multiply cos and sin with, so that attention keeps its temperature on longer texts.
    inv_freq, factor = _frequencies(rope, head_dim, distinct, positions.device)
    if len(distinct) > 1:  # sequences of one step may have frequency sets of their own
        which = torch.tensor([distinct.index(length) for length in lengths], device=positions.device)
        inv_freq = inv_freq[which].view(*positions.shape, -1)
    angles = positions.unsqueeze(-1).float() * inv_freq  # [batch, seq, rotary_dim / 2]; float32 holds every position up to 2^24
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


@lru_cache(maxsize=64)
def _frequencies(rope: RopeConfig, head_dim: int, lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, float]:
    """Radians per position, float32 `[lengths, rotary_dim / 2]`. Kept on the device: nothing may be copied to it in a captured step."""
    chosen = [inverse_frequencies(rope, head_dim, length) for length in lengths]
    with torch.inference_mode(False):  # training takes them too
        return torch.stack([torch.from_numpy(frequencies) for frequencies, _ in chosen]).to(device), chosen[0][1]


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    """Rotate each pair (i, i + rotary_dim/2) of the leading dimensions of `x` `[batch, seq, heads, head_dim]`."""
    cos, sin = tables
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    rotated = x[..., :dim]  # partial rotary: the dimensions behind are left as they are
    return torch.cat((torch.addcmul(rotated * cos, rotated.roll(dim // 2, -1), sin), x[..., dim:]), -1)


# --- attention ----------------------------------------------------------------------------------------------------

# Scores computed at a time where they must be materialised (soft caps): 64 MiB of float32.
_SCORE_ELEMENTS = 1 << 24


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """Boolean mask `[..., queries, keys]` from positions `[..., queries]` and `[..., keys]`."""
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`softmax(q k^T scale) v` per head, kv heads shared by groups of query heads.

    q `[batch, queries, heads, head_dim]`; k, v `[batch, keys, kv_heads, head_dim]`; returns the shape of q.
    mask: boolean `[batch | 1, queries, keys]`, None: every key is visible, or with `causal` those up to the query's index.
    softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
    """
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    if queries == 1 and softcap is None:
        # Decode: the group's heads become the query axis, so that no key is copied or read twice.
        folded, mask = q.reshape(batch, kv_heads, group, dim), None if mask is None else mask.unsqueeze(1)
        out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
        return out.reshape(batch, 1, heads, dim)

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, queries | keys, head_dim], as SDPA takes them
    if mask is not None:
        mask = mask.unsqueeze(1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and queries > 1, scale=scale, enable_gqa=group > 1)
        return out.transpose(1, 2)

    # Soft caps lie between the scores and the softmax, where no fused kernel lets anybody in: the scores are made, some queries at a time.
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if causal:
        index = torch.arange(queries, device=q.device)
        mask = visible(index, index, None)
    step = max(1, _SCORE_ELEMENTS // (batch * heads * k.shape[2]))
    parts = []
    for start in range(0, queries, step):
        scores = q[:, :, start : start + step] @ k.transpose(-1, -2) * scale
        scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask[..., start : start + step, :], float("-inf"))
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a flattened batch lie, one behind the other, and where the keys that each of them sees.

    lengths: tokens of each sequence. key_lengths: keys that it sees, its own the last of them. key_indices: int64
    `[sum of key_lengths]`, the keys of all sequences as rows of the flattened batch; None: a sequence sees its own alone.
    parents: the index of the sequence that each goes on from.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_indices: Tensor | None = None
    parents: tuple[int | None, ...] = ()

    def gather_keys(self, k: Tensor) -> Tensor:
        """Return all sequences' keys (or values) `[sum of key_lengths, kv_heads, head_dim]` of k `[batch, seq, kv_heads, head_dim]`."""
        k = k.flatten(0, 1)
        return k if self.key_indices is None else k.index_select(0, self.key_indices)


@dataclass(frozen=True)
class PackedSequences:
    """Which tokens belong together where several sequences share a row: sequences do not see each other.

    ids: int64 `[batch, seq]`; a sequence is a run of one id within a row.
    parents: ids that go on from another one and so see it and its parents. A parent stands before them as a whole, and their positions
    go on from its last: what several sequences begin with is computed once.
    """

    ids: Tensor
    parents: Mapping[int, int] = field(default_factory=dict)

    def layout(self) -> PackedLayout | None:
        """Return where sequences begin and end; None where every row is one sequence."""
        changes = self.ids[:, 1:] != self.ids[:, :-1]
        if not self.parents and not changes.any():
            return None
        starts = torch.cat((torch.ones_like(changes[:, :1]), changes), 1).flatten()  # the first token of a row begins a sequence too
        bounds = [*starts.nonzero().flatten().tolist(), len(starts)]
        lengths = tuple(end - begin for begin, end in itertools.pairwise(bounds))
        if not self.parents:
            return PackedLayout(lengths, lengths, None, (None,) * len(lengths))
        names = self.ids.flatten()[torch.tensor(bounds[:-1], device=self.ids.device)].tolist()
        index_of = {name: index for index, name in enumerate(names)}
        parents = tuple(index_of[self.parents[name]] if name in self.parents else None for name in names)
        keys: list[Tensor] = []  # of each sequence: those of its parent, then its own
        for (begin, end), parent in zip(itertools.pairwise(bounds), parents, strict=True):
            own = torch.arange(begin, end)
            keys.append(own if parent is None else torch.cat((keys[parent], own)))
        return PackedLayout(lengths, tuple(map(len, keys)), torch.cat(keys).to(self.ids.device), parents)


# Causal attention within packed sequences: (q, k, v, layout, window, scale, softcap) -> the shape of q; see `attend_packed`.
AttendPacked = Callable[[Tensor, Tensor, Tensor, PackedLayout | None, int | None, float, float | None], Tensor]


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout | None, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """Attend causally within each sequence by PyTorch's operations.

    q `[batch, seq, heads, head_dim]`; k, v `[batch, seq, kv_heads, head_dim]`; returns the shape of q. layout None: every row is one
    sequence. window: how many positions a query sees, its own among them; None: all.

    Sequences attend one by one: the work then grows with the squares of their lengths, not with the square of the row's,
    and no mask is built where causal order says it all.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[rows, queries, heads, head_dim]`, the last of the keys `[rows, keys, kv_heads, head_dim]`."""
        queries, keys = q.shape[1], k.shape[1]
        if queries == keys and (window is None or keys <= window):
            return attention(q, k, v, None, True, scale, softcap)
        index = torch.arange(keys, device=q.device)
        return attention(q, k, v, visible(index[-queries:], index, window).unsqueeze(0), False, scale, softcap)

    if layout is None:
        return attend(q, k, v)
    queries = q.flatten(0, 1).unsqueeze(0).split(list(layout.lengths), 1)
    keys, values = (layout.gather_keys(t).unsqueeze(0).split(list(layout.key_lengths), 1) for t in (k, v))
    return torch.cat(list(map(attend, queries, keys, values)), 1).view_as(q)


class NoCache:
    """`LayerCaches` that keep nothing: the tokens of one forward see each other, as in training and in scoring a whole text."""

    def __init__(
        self,
        config: ModelConfig,
        positions: Tensor,
        packed: PackedSequences | None = None,
        attend_packed: AttendPacked = attend_packed,
    ) -> None:
        """positions: `[batch, seq]`; they rise by one within a sequence, or else they alone tell what is visible."""
        self.config, self.attend_packed = config, attend_packed
        self.rope_lengths = (int(positions.max()) + 1,) if config.rope_depends_on_length else (0,)
        jumps = positions[:, 1:] != positions[:, :-1] + 1  # [batch, seq - 1]
        if packed is not None:  # between two sequences positions may do what they like
            jumps &= packed.ids[:, 1:] == packed.ids[:, :-1]
        self.layout: PackedLayout | None = None
        self.masks: dict[int | None, Tensor] | None = None  # per window `[batch, seq, seq]`, where positions jump
        if not jumps.any():
            self.layout = None if packed is None else packed.layout()
            return
        self.masks = {}
        for window in config.cache_windows:
            mask = visible(positions, positions, window)
            self.masks[window] = mask if packed is None else mask & (packed.ids.unsqueeze(-1) == packed.ids.unsqueeze(-2))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part = self.config.attention(layer)
        if self.masks is not None:
            return attention(q, k, v, self.masks[part.sliding_window], False, part.score_scale, part.softcap)
        return self.attend_packed(q, k, v, self.layout, part.sliding_window, part.score_scale, part.softcap)

    def recur(self, layer: int, inputs: Tensor, recurrence: Recurrence) -> Tensor:
        if self.masks is not None:
            raise UsageError("the positions jump within a text, which a layer with a recurrent state cannot follow. Number them in order.")
        shapes = [state.shape for state in self.config.states[layer] if state.kind != "kv"]

        def zeros(batch: int) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(batch, *shape, device=inputs.device) for shape in shapes)

        if self.layout is None:
            return recurrence(inputs, zeros(len(inputs)))[0]
        outputs: list[Tensor] = []
        ends: list[tuple[Tensor, ...]] = []  # the state after each sequence, for those that go on from it
        for part, parent in zip(inputs.flatten(0, 1).split(list(self.layout.lengths)), self.layout.parents, strict=True):
            output, end = recurrence(part.unsqueeze(0), zeros(1) if parent is None else ends[parent])
            outputs.append(output)
            ends.append(end)
        return torch.cat(outputs, 1).unflatten(1, inputs.shape[:2]).squeeze(0)
