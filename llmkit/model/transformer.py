"""THE decoder-only transformer. One class for every family; what differs is in the `ModelConfig`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llmkit.compat import fused_attention_ops
from llmkit.config import ModelConfig, PartConfig, RopeConfig
from llmkit.model.attention import DocumentAttention, LayerCaches, NoCache, Rotary
from llmkit.model.layers import Embedding, Linear, make_norm
from llmkit.model.rope import rotary_tables


def build(part: PartConfig, config: ModelConfig, layer: int) -> nn.Module:
    """Return the module of a mixer or a feed-forward, which names its class."""
    path, _, name = part.module.partition(":")
    module: nn.Module = getattr(importlib.import_module(path), name)(part, config, layer)
    return module


class Block(nn.Module):
    """One layer: a mixer and a feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        described = config.layers[layer]
        for part in described.parts:
            self.add_module(part.name, build(part, config, layer))
        self.mixer_name, self.feed_forward_name = (part.name for part in described.parts)
        self.residual_multiplier = config.residual_multiplier
        self.norm_names = described.norm_names
        for name in self.norm_names:
            if name is not None:
                self.add_module(name, make_norm(config, config.hidden_size))

    def _norm(self, slot: int, x: Tensor) -> Tensor:
        name = self.norm_names[slot]
        return x if name is None else self._modules[name](x)  # type: ignore[misc]

    def forward(self, x: Tensor, rotary: Rotary | None, caches: LayerCaches, rows: Tensor | None = None) -> Tensor:
        """x `[batch, seq, hidden]`; rows: return `[len(rows), hidden]`, these of the flattened batch alone."""
        mixed = self._norm(1, self._modules[self.mixer_name](self._norm(0, x), rotary, caches, rows))  # type: ignore[misc]
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        x = torch.add(x, mixed, alpha=self.residual_multiplier)
        fed = self._norm(3, self._modules[self.feed_forward_name](self._norm(2, x)))  # type: ignore[misc]
        return torch.add(x, fed, alpha=self.residual_multiplier)


# How a block is run: (block, x, rotary, caches, rows) -> x. Training may put activation checkpointing in its place.
RunBlock = Callable[[Block, Tensor, Rotary | None, LayerCaches, Tensor | None], Tensor]


def run_block(block: Block, x: Tensor, rotary: Rotary | None, caches: LayerCaches, rows: Tensor | None) -> Tensor:
    out: Tensor = block(x, rotary, caches, rows)
    return out


def run_checkpointed(block: Block, x: Tensor, rotary: Rotary | None, caches: LayerCaches, rows: Tensor | None) -> Tensor:
    """Keep a block's input and what PyTorch's fused attention gave; the rest is computed again in the backward pass.

    Attention's work grows with the square of the length, so its result is kept. That of the native kernels is none of PyTorch's
    operations and is computed again, as attention with soft caps is.
    """
    if not torch.is_grad_enabled():
        return run_block(block, x, rotary, caches, rows)
    kept = partial(create_selective_checkpoint_contexts, fused_attention_ops())
    out: Tensor = checkpoint(block, x, rotary, caches, rows, use_reentrant=False, context_fn=kept)
    return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head. Its parameters carry the `model.` prefix of checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.learned_positions else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.run: RunBlock = run_block

    def forward(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int], caches: LayerCaches, rows: Tensor | None = None) -> Tensor:
        """rows: those that leave the last block; nothing looks at the others once they gave it their keys and values."""
        config, last = self.config, self.layers[-1]
        x = self.embed_tokens(tokens)
        if x.dtype != torch.float32 and x.device.type == "cpu":
            x = x.float()  # on a CPU all arithmetic is float32, whatever the weights are stored in
        if config.embedding_multiplier != 1:
            x = x * config.embedding_multiplier
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).to(x.dtype)

        tables: dict[tuple[RopeConfig, int] | None, Rotary | None] = {None: None}
        for rope, dim in config.rotaries:
            cos, sin = rotary_tables(rope, dim, positions, lengths)
            tables[rope, dim] = cos.to(x.dtype), sin.to(x.dtype)
        for block, layer in zip(self.layers, config.layers, strict=True):
            x = self.run(block, x, tables[layer.mixer.rotary], caches, rows if block is last else None)  # type: ignore[arg-type]
        return self.norm(x)


class Transformer(nn.Module):
    """Token ids and positions in, logits out. No text, no sampling, no loading; gradients flow through everything."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.of_documents: DocumentAttention | None = None  # what attends without a cache; training may put a fused one here
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        follows: Mapping[int, int] | None = None,
        lengths: Sequence[int] | None = None,
        caches: LayerCaches | None = None,
        rows: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Logits `[batch, seq, vocab]`, or `[len(rows), vocab]` for some rows of the flattened batch.

        tokens, positions: int64 `[batch, seq]`; positions default to 0, 1, 2, ...
        segments: int64 `[batch, seq]`, the document of each token in packed rows; documents do not see each other.
        follows: segments that go on from another one and so see it: it stands before them, and their positions go on from its last.
        lengths: the sequence length the rotary frequencies are chosen for, one for all or one per token (dynamic and
            longrope only); by default the largest position plus one.
        caches: where keys, values and states live; by default the tokens of this call see each other and nothing else.
        hidden: return the final normed hidden states instead of logits.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if caches is None:
            caches = NoCache(self.config, positions, segments, self.of_documents, follows)
        if lengths is None:
            lengths = (int(positions.max()) + 1,) if self.config.rope_depends_on_length else (0,)
        x = self.model(tokens, positions, lengths, caches, rows)
        return x if hidden else self.logits(x)

    @property
    def head(self) -> Any:
        """The matrix that makes logits: a linear, or the embedding where both are one; `dequantize()` gives it `[vocab, hidden]`."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, x: Tensor) -> Tensor:
        """The head on final hidden states `[..., hidden]`."""
        config = self.config
        logits = self.model.embed_tokens.logits(x) if self.lm_head is None else self.lm_head(x)
        if config.logits_scaling != 1:
            logits = logits / config.logits_scaling
        if config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits


def set_checkpointing(model: Transformer, on: bool) -> None:
    """Whether activations are computed again on the way back (arXiv:1604.06174): a quarter slower, a fraction of their memory."""
    model.model.run = run_checkpointed if on else run_block


@torch.no_grad()
def init_weights(model: Transformer, generator: torch.Generator | None = None) -> None:
    """Random weights to train from: N(0, 0.02), the projections into the residual stream divided by sqrt(2 layers) (GPT-2)."""
    config = model.config
    depth = (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        described = config.parameters[name]
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02 * (depth if described.output == "residual" else 1.0), generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0 - config.norm_offset)
