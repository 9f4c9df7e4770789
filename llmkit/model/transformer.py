"""THE decoder-only transformer. One class for every family; what differs is in the `ModelConfig`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import ModelConfig, PartConfig, RopeConfig
from llmkit.model.attention import LayerCaches, NoCache, PackedSequences, Rotary, rotary_tables
from llmkit.model.layers import PLAIN, Embedding, ForwardContext, Linear, Ops, make_norm


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

    def _norm(self, slot: int, x: Tensor, ops: Ops) -> Tensor:
        name = self.norm_names[slot]
        return x if name is None else self._modules[name](x, ops)  # type: ignore[misc]

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x `[batch, seq, hidden]`; returns its rows that leave the layer (`ForwardContext.select`)."""
        mixer, feed_forward = self._modules[self.mixer_name], self._modules[self.feed_forward_name]
        # Norms 0 and 2 stand before mixer and feed-forward (pre-norm), 1 and 3 behind them (post-norm); Gemma has all four.
        mixed = self._norm(1, mixer(self._norm(0, x, context.ops), context), context.ops)  # type: ignore[misc]
        x = torch.add(context.select(x), mixed, alpha=self.residual_multiplier)
        fed = self._norm(3, feed_forward(self._norm(2, x, context.ops), context), context.ops)  # type: ignore[misc]
        return torch.add(x, fed, alpha=self.residual_multiplier)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head. Its parameters carry the `model.` prefix of checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.learned_positions else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)

    def forward(self, tokens: Tensor, positions: Tensor, caches: LayerCaches, logits_indices: Tensor | None, ops: Ops) -> Tensor:
        """tokens, positions `[batch, seq]`; returns normed hidden states `[batch, seq, hidden]`, or `[len(logits_indices), hidden]`."""
        config, last = self.config, self.layers[-1]
        x = self.embed_tokens(tokens)
        if x.dtype != torch.float32 and x.device.type == "cpu":
            x = x.float()  # on a CPU all arithmetic is float32, whatever the weights are stored in
        if config.embedding_multiplier != 1:  # Gemma: sqrt(hidden); Granite: a number of its own
            x = x * config.embedding_multiplier
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).to(x.dtype)

        # Layers may rotate differently (Gemma 3's windows have a base of their own) or not at all; tables are computed once for each kind.
        tables: dict[tuple[RopeConfig, int] | None, Rotary | None] = {None: None}
        for rope, dim in config.rotaries:
            cos, sin = rotary_tables(rope, dim, positions, caches.rope_lengths)
            # Angles of far positions need float32's bits; their cosines and sines do not.
            tables[rope, dim] = cos.to(x.dtype), sin.to(x.dtype)
        for block, layer in zip(self.layers, config.layers, strict=True):
            context = ForwardContext(ops, caches, tables[layer.mixer.rotary], logits_indices if block is last else None)
            x = ops.run_block(block, x, context)
        return self.norm(x, ops)


class Transformer(nn.Module):
    """Token ids and positions in, logits out. No text, no sampling, no loading; gradients flow through everything."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # A tied head has no module: checkpoints of such models store no lm_head, and `logits` multiplies with the embedding.
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        packed: PackedSequences | None = None,
        caches: LayerCaches | None = None,
        logits_indices: Tensor | None = None,
        hidden: bool = False,
        ops: Ops = PLAIN,
    ) -> Tensor:
        """Return logits `[batch, seq, vocab]`, or `[len(logits_indices), vocab]` for some rows of the flattened batch.

        tokens, positions: int64 `[batch, seq]`; positions default to 0, 1, 2, ...
        packed: where several sequences share a row; by default a row is one sequence.
        caches: where keys, values and states live; by default the tokens of this call see each other and nothing else.
        hidden: return the final normed hidden states instead of logits.
        ops: what computes; every choice gives the same up to rounding.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if caches is None:
            caches = NoCache(self.config, positions, packed, ops.attend_packed)
        x = self.model(tokens, positions, caches, logits_indices, ops)
        return x if hidden else self.logits(x, ops)

    @property
    def head(self) -> Any:
        """The matrix that makes logits: a linear, or the embedding where both are one; `dequantize()` gives it `[vocab, hidden]`."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, x: Tensor, ops: Ops = PLAIN) -> Tensor:
        """Return the head's logits `[..., vocab]` of final hidden states `[..., hidden]`."""
        config = self.config
        logits = self.model.embed_tokens.logits(x) if self.lm_head is None else ops.matmuls(x, (self.lm_head,))[0]
        if config.logits_scaling != 1:  # Granite divides
            logits = logits / config.logits_scaling
        if config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits


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
        else:  # norms
            parameter.fill_(1.0 - config.norm_offset)
