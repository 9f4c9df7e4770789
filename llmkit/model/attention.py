"""Attention: grouped-query (arXiv:2305.13245), causal, optionally in a sliding window, with or without a KV cache.

    query heads   q0 q1 q2 q3 q4 q5      num_attention_heads = 6
                   \\ | /    \\ | /
    kv heads        k0        k1         num_key_value_heads = 2: each serves a group of 3 query heads

A mask is never a padding convention. It comes from positions: a key is visible iff
`0 <= key position <= query position`, `query position - key position < window`, and both are of the same segment, or the
query's segment goes on from the key's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import AttentionConfig, ModelConfig
from llmkit.errors import UsageError
from llmkit.model.layers import Linear, Products, make_norm

# One layer's recurrence over consecutive tokens of a sequence: (inputs [batch, tokens, ...], states, each [batch, *State.shape])
# -> (outputs [batch, tokens, ...], the states after the last token). It makes new tensors and leaves those it is given as they are.
Recurrence = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]


class LayerCaches(Protocol):
    """What the tokens of one forward know of those before them. A mixer asks it with the number of its own layer.

    `NoCache` below knows the given tokens alone; `cache.StepCaches` everything before them too.
    """

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


Rotary = tuple[Tensor, Tensor]

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

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None:
        mask = mask.unsqueeze(1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and queries > 1, scale=scale, enable_gqa=group > 1)
        return out.transpose(1, 2)

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
class Documents:
    """Where the documents of a flattened batch lie, one behind the other, and where their keys.

    lengths: rows of q that are each document's. places: int64, of all documents' keys one document behind the other, the own ones
    last, where some go on from others; None: a document's keys are its own. key_lengths: how many are each document's.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    places: Tensor | None = None

    def keys(self, k: Tensor) -> Tensor:
        """The keys (or values) `[keys, kv_heads, head_dim]` of all documents, of k `[batch, seq, kv_heads, head_dim]`."""
        k = k.flatten(0, 1)
        return k if self.places is None else k.index_select(0, self.places)


# Attention within documents: (q, k, v, documents, window, scale) -> [b, t, heads, d].
DocumentAttention = Callable[[Tensor, Tensor, Tensor, Documents, int | None, float], Tensor]


class NoCache:
    """`LayerCaches` that keep nothing: the tokens of one forward see each other, as in training and in scoring a whole text.

    Packed rows are cut into their documents, and each attends alone: the work of a row then grows with the squares of
    the documents' lengths, not with the square of the row's, and no mask is built where causal order says it all.
    """

    def __init__(
        self,
        config: ModelConfig,
        positions: Tensor,
        segments: Tensor | None,
        of_documents: DocumentAttention | None = None,
        follows: Mapping[int, int] | None = None,
    ) -> None:
        """positions, segments: `[batch, seq]`; a document is a run of one segment whose positions rise by one.

        of_documents: what attends within documents without soft caps; by default `attention` above. follows: the segments that go
        on from another one, which stands before them as a whole, and those: such a segment's positions go on, too.
        """
        self.config, self.of_documents = config, of_documents
        length = positions.shape[1]
        starts = positions[:, 1:] != positions[:, :-1] + 1
        if segments is not None:
            starts |= segments[:, 1:] != segments[:, :-1]
        self.scattered = False
        self.parents: list[int | None] = []  # of each document, the index of the one that it goes on from
        self.documents: Documents | None = None  # None: every row is one document
        self.masks: dict[int | None, Tensor | None] = dict.fromkeys(config.cache_windows)
        if not starts.any() and not follows:
            for window in config.cache_windows:
                if window is not None and length > window:
                    self.masks[window] = visible(positions, positions, window)
            return
        self.scattered = segments is None or bool((starts & (segments[:, 1:] == segments[:, :-1])).any())
        if self.scattered:  # positions jump within a document, so only they can tell what is visible
            for window in config.cache_windows:
                mask = visible(positions, positions, window)
                self.masks[window] = mask if segments is None else mask & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
            return
        starts = torch.cat((torch.ones_like(starts[:, :1]), starts), 1).flatten()  # a row begins a document, too
        bounds = [*starts.nonzero().flatten().tolist(), len(starts)]
        self.documents = _documents(bounds, segments, follows or {})
        self.parents = [None] * (len(bounds) - 1)
        if follows and segments is not None:
            names = segments.flatten()[torch.tensor(bounds[:-1], device=segments.device)].tolist()
            self.parents = [names.index(follows[name]) if name in follows else None for name in names]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part = self.config.attention(layer)
        window, scale, softcap = part.sliding_window, part.score_scale, part.softcap
        if self.of_documents is not None and softcap is None and not self.scattered and not torch.compiler.is_compiling():
            rows = (q.shape[1],) * q.shape[0]
            return self.of_documents(q, k, v, self.documents or Documents(rows, rows), window, scale)
        if self.documents is None:
            mask = self.masks[window]
            return attention(q, k, v, mask, mask is None, scale, softcap)
        parts = []
        lengths, key_lengths, keys = list(self.documents.lengths), list(self.documents.key_lengths), self.documents.keys
        for qd, kd, vd in zip(q.flatten(0, 1).split(lengths), keys(k).split(key_lengths), keys(v).split(key_lengths), strict=True):
            mask, length = None, len(kd)
            if len(qd) < length or (window is not None and length > window):
                index = torch.arange(length, device=q.device)
                mask = visible(index[-len(qd) :], index, window).unsqueeze(0)
            parts.append(attention(qd.unsqueeze(0), kd.unsqueeze(0), vd.unsqueeze(0), mask, mask is None, scale, softcap))
        return torch.cat(parts, 1).view_as(q)

    def recur(self, layer: int, inputs: Tensor, recurrence: Recurrence) -> Tensor:
        if self.scattered:
            raise UsageError("the positions jump within a text, which a layer with a recurrent state cannot follow. Number them in order.")
        shapes = [state.shape for state in self.config.states[layer] if state.kind != "kv"]

        def zeros(batch: int) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(batch, *shape, device=inputs.device) for shape in shapes)

        if self.documents is None:
            return recurrence(inputs, zeros(len(inputs)))[0]
        outputs: list[Tensor] = []
        ends: list[tuple[Tensor, ...]] = []  # the state after each document, for those that go on from it
        for part, parent in zip(inputs.flatten(0, 1).split(list(self.documents.lengths)), self.parents, strict=True):
            output, end = recurrence(part.unsqueeze(0), zeros(1) if parent is None else ends[parent])
            outputs.append(output)
            ends.append(end)
        return torch.cat(outputs, 1).unflatten(1, inputs.shape[:2]).squeeze(0)


def _documents(bounds: Sequence[int], segments: Tensor | None, follows: Mapping[int, int]) -> Documents:
    """bounds: where documents begin along the flattened batch, and its end."""
    lengths = tuple(end - begin for begin, end in itertools.pairwise(bounds))
    if not follows:
        return Documents(lengths, lengths)
    assert segments is not None
    names = segments.flatten()[torch.tensor(bounds[:-1], device=segments.device)].tolist()
    spans = {name: torch.arange(begin, end) for name, (begin, end) in zip(names, itertools.pairwise(bounds), strict=True)}
    places = []
    for name in names:
        spans[name] = torch.cat((spans[follows[name]], spans[name])) if name in follows else spans[name]
        places.append(spans[name])
    return Documents(lengths, tuple(map(len, places)), torch.cat(places).to(segments.device))


class Attention(nn.Module):
    """The attention block of one layer: project, normalise, rotate, attend, project back."""

    def __init__(self, part: AttentionConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = part.head_dim
        self.products = Products()
        q_size, kv_size = part.query_size, part.kv_size
        self.q_proj = Linear(config.hidden_size, q_size, part.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, part.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, part.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, part.o_bias)
        self.norm_before_heads = part.qk_norm == "full"  # OLMo 2 normalizes all heads at once
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if part.qk_norm is not None:
            self.q_norm = make_norm(config, q_size if part.qk_norm == "full" else part.head_dim)
            self.k_norm = make_norm(config, kv_size if part.qk_norm == "full" else part.head_dim)

    def forward(self, x: Tensor, rotary: Rotary | None, caches: LayerCaches, rows: Tensor | None = None) -> Tensor:
        """x `[batch, seq, hidden]`; rotary None: this layer does not rotate. rows: of the flattened batch, those that are returned."""
        q, k, v = self.products.project(x, (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None and self.norm_before_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and not self.norm_before_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = self.products.rotate(q, rotary), self.products.rotate(k, rotary)
        attended = caches.attend(self.layer, q, k, v).flatten(-2)
        return self.o_proj(attended if rows is None else attended.flatten(0, 1).index_select(0, rows))
