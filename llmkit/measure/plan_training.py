"""How much memory a training run takes, term by term, and what to change in its recipe where it does not fit. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmkit.config import LayerConfig, ModelConfig
from llmkit.measure.facts import Facts, Storage, storage_bytes
from llmkit.measure.plan import CONSTANTS, Change, Constants, Terms, attention_sizes, without_zeros
from llmkit.quant.schemes import NF4, Choice, choose
from llmkit.training.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides its memory."""

    tokens: int  # in one forward pass
    targets: int  # of them, that go through the head
    length: int
    lora: bool
    rank: int
    factors: int  # numbers in adapters
    saved: int  # numbers in modules trained whole beside them
    quantize: str | None
    checkpointing: bool
    accumulates: bool
    optimizer: str
    ema: bool
    dtype: str
    loss: str

    @property
    def trained(self) -> int:
        return self.factors + self.saved


def setting(recipe: Recipe, facts: Facts, checkpointing: bool | None = None) -> Setting:
    """checkpointing: what "auto" is to mean."""
    lora: Any = getattr(recipe, "lora", None)
    adapts = getattr(recipe, "train", "full") == "lora"
    length = recipe.max_length or min(2048, facts.config.max_position_embeddings)
    loss = getattr(recipe, "loss", "sft")
    # A preference row is two: chosen and rejected.
    rows = recipe.batch_size * (2 if loss in ("dpo", "orpo") else 1)
    factors, saved = _adapter_numbers(lora, facts) if adapts else (0, facts.parameters)
    said = getattr(recipe, "checkpointing", False)
    said = checkpointing if said == "auto" else said
    return Setting(
        tokens=rows * length,
        targets=rows * length,
        length=length,
        lora=adapts,
        rank=lora.r if adapts else 0,
        factors=factors,
        saved=saved,
        quantize=getattr(recipe, "quantize", None) if adapts else None,
        checkpointing=bool(said) and str(said).lower() != "false",
        accumulates=recipe.grad_accumulation > 1,
        optimizer=recipe.optimizer,
        ema=recipe.ema is not None,
        dtype=recipe.dtype,
        loss=loss,
    )


def _adapter_numbers(lora: Any, facts: Facts) -> tuple[int, int]:
    """Numbers in the factors (DoRA's magnitudes too), and in whole modules."""
    wanted = getattr(lora, "target_modules", "all-linear")
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    linears = {name.removesuffix(".weight"): shape for name, shape in facts.linears.items()}
    hit = [shape for name, shape in linears.items() if wanted == "all-linear" or any(name == n or name.endswith("." + n) for n in names)]
    factors = sum(lora.r * (shape[0] + shape[1]) + (shape[0] if getattr(lora, "use_dora", False) else 0) for shape in hit)
    whole = tuple(getattr(lora, "modules_to_save", None) or ())
    saved = sum(math.prod(shape) for name, shape in facts.shapes.items() if any(name.rpartition(".")[0].endswith(one) for one in whole))
    return factors, saved


def base_storage(name: str, shape: tuple[int, ...], stored: Storage, how: Setting) -> Storage:
    """How a frozen or trained parameter is held: float32, or the codes of a 4-bit base."""
    if isinstance(stored, Choice):
        return stored
    if how.quantize is not None:
        return choose(how.quantize, name, shape) or ("F32" if how.quantize != NF4 else stored)
    return "F32"


def training(
    how: Setting, facts: Facts, device: str = "cpu", teacher: Facts | None = None, data_bytes: int = 0, constants: Constants = CONSTANTS
) -> Terms:
    """A training run at its fullest: in the backward pass of a step after the first."""
    config, on_cpu = facts.config, device.startswith("cpu")
    terms: Terms = {}
    if on_cpu:
        terms["process"] = constants.training_process + int(constants.tokenizer * facts.tokenizer_bytes)
        terms["process"] += constants.adapter_process if how.lora or how.quantize == NF4 else 0
        terms["data"] = int(constants.data * data_bytes)
    else:
        terms["process"] = constants.cuda_context
    held = {name: base_storage(name, shape, facts.storage[name], how) for name, shape in facts.shapes.items()}
    terms["weights"] = sum(storage_bytes(storage, facts.shapes[name]) for name, storage in held.items())
    if how.lora:
        terms["adapters"] = 4 * how.trained
    if teacher is not None:
        terms["teacher"] = teacher.stored_bytes
    gradients = 4 * how.trained
    terms["optimizer"] = _optimizer_bytes(how, facts)
    if how.ema:
        terms["average of the weights"] = 4 * how.trained

    size = 4 if how.dtype == "float32" or on_cpu else 2
    saved = [_saved_numbers(config, layer, how) for layer in config.layers]
    if how.checkpointing:
        activations = how.tokens * (config.num_hidden_layers * config.hidden_size * 4 + max(saved) * size)
    else:
        activations = how.tokens * sum(saved) * size
    activations += how.tokens * 3 * config.hidden_size * 4  # embedding, final norm and what the loss keeps
    rows = min(how.targets, max(1, constants.logit_elements // config.vocab_size))
    logits = constants.logit_copies * (2 if how.loss == "distill" else 1) * rows * config.vocab_size * 4
    inner = max(_mlp_numbers(config, layer) for layer in config.layers)
    backward = how.tokens * (5 * inner + 3 * config.hidden_size) * size
    widened = 4 * max(math.prod(shape) for shape in facts.linears.values()) if any(s != "F32" for s in held.values()) else 0
    terms["activations"] = activations
    if how.lora:
        terms["gradients"] = gradients
        terms["logits and backward buffers"] = max(logits, backward + widened)
    else:
        # While gradients come, activations go; those of head and embedding come first and last.
        terms["gradients"] = gradients if how.accumulates else max(0, gradients - activations) + 4 * math.prod(facts.head)
        terms["logits and backward buffers"] = max(logits, backward)
    return without_zeros(terms)


def _optimizer_bytes(how: Setting, facts: Facts) -> int:
    """AdamW: two numbers for each that is trained. Muon: one for each of the hidden matrices, and a stack of equal ones on the way."""
    if how.optimizer != "muon":
        return 8 * how.trained
    count = how.factors if how.lora else sum(map(math.prod, facts.linears.values()))
    return 4 * count + 8 * (how.trained - count)


def _saved_numbers(config: ModelConfig, layer: LayerConfig, how: Setting) -> int:
    """Numbers that a layer keeps for the backward pass, for each token.

    Low-rank (lora/fused.py): the inputs of norms and of linears once each, query, key, value, the attention's result, gate and up, and the
    rank for every adapter. All weights trained: each norm also its normalised input, and the MLP its activation and product.
    """
    hidden, (q, kv) = config.hidden_size, attention_sizes(config)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[config.norm_placement]
    own = 1 if how.lora else 2
    numbers = (own * norms + 2) * hidden + 2 * q + 2 * kv + config.num_attention_heads + 2
    if config.qk_norm is not None:
        numbers += own * (q + kv)
    if config.attn_logit_softcapping is not None:
        numbers += 4 * config.num_attention_heads * how.length
    numbers += (1 if how.lora else 2) * _mlp_numbers(config, layer)
    if layer.moe is not None:
        numbers += 2 * layer.moe.num_experts_per_tok * hidden + 3 * layer.moe.num_experts
    return numbers + how.rank * (4 + (3 if layer.moe is None else 3 * layer.moe.num_experts_per_tok))


def _mlp_numbers(config: ModelConfig, layer: LayerConfig) -> int:
    """Gate and up of all experts that a token goes through."""
    each = 2 if config.gated_mlp else 1
    if layer.moe is None:
        return each * config.intermediate_size
    return each * layer.moe.moe_intermediate_size * layer.moe.num_experts_per_tok


def predict(
    recipe: Recipe, facts: Facts, device: str = "cpu", *, available: int | None = None, teacher: Facts | None = None, data_bytes: int = 0
) -> Terms:
    """Bytes of each term of a training run at its peak. available: what `checkpointing: auto` goes by; None: there is enough."""
    plain = training(setting(recipe, facts, False), facts, device, teacher, data_bytes)
    if available is None or sum(plain.values()) <= available:
        return plain
    return training(setting(recipe, facts, True), facts, device, teacher, data_bytes)


def cheaper_recipe(
    recipe: Recipe, facts: Facts, available: int, device: str = "cpu", teacher: Facts | None = None, data_bytes: int = 0
) -> Change | None:
    """The change of a recipe that costs least and fits: fewer rows at once (with more accumulation the run stays the same), then
    checkpointing (a third slower), then a base in 8 or 4 bits, then shorter rows, then adapters instead of all weights."""
    how = setting(recipe, facts, True)
    rows, length = recipe.batch_size, how.length
    batches = [rows >> n for n in range(rows.bit_length())]
    lengths = [size for n in range(8) if (size := length >> n) >= min(length, 128)]
    checkpoints = [False, True] if hasattr(recipe, "checkpointing") and not how.checkpointing else [how.checkpointing]
    has_lora = hasattr(recipe, "train")
    bases: list[tuple[bool, str | None]] = [(how.lora, how.quantize)]
    if how.lora and how.quantize is None and not facts.quantized:
        bases += [(True, "q8"), (True, "q4")]
    elif not how.lora and has_lora:
        bases += [(True, None), (True, "q8"), (True, "q4")]
    options = []
    for (b, batch), checkpoint, (base, (lora, scheme)), (cut, size) in itertools.product(
        enumerate(batches), checkpoints, enumerate(bases), enumerate(lengths)
    ):
        cost = b + (3 if checkpoint and not how.checkpointing else 0) + 10 * base + 20 * cut
        options.append((cost, batch, checkpoint, lora, scheme, size))
    for _, batch, checkpoint, lora, scheme, size in sorted(options, key=lambda option: option[0]):
        tried = _changed(how, recipe, facts, batch, checkpoint, lora, scheme, size)
        total = sum(training(tried, facts, device, teacher, data_bytes).values())
        if total <= available:
            return Change(tuple(_recipe_words(recipe, how, batch, checkpoint, lora, scheme, size)), total)
    return None


def _changed(
    how: Setting, recipe: Recipe, facts: Facts, batch: int, checkpoint: bool, lora: bool, scheme: str | None, size: int
) -> Setting:
    tokens = how.tokens * batch * size // (recipe.batch_size * how.length)
    accumulates = how.accumulates or batch < recipe.batch_size
    changed = replace(how, tokens=tokens, targets=tokens, length=size, checkpointing=checkpoint, accumulates=accumulates, quantize=scheme)
    if lora and not how.lora:
        settings: Any = getattr(recipe, "lora", None)
        factors, saved = _adapter_numbers(settings, facts)
        changed = replace(changed, lora=True, rank=settings.r, factors=factors, saved=saved)
    return changed


def _recipe_words(recipe: Recipe, how: Setting, batch: int, checkpoint: bool, lora: bool, scheme: str | None, size: int) -> Iterator[str]:
    if lora and not how.lora:
        yield "train=lora"
    if batch != recipe.batch_size:
        yield f"batch_size={batch}"
        yield f"grad_accumulation={-(-recipe.batch_size * recipe.grad_accumulation // batch)}"
    if checkpoint and not how.checkpointing:
        yield "checkpointing=true"
    if scheme != how.quantize:
        yield f"quantize={scheme}"
    if size != how.length:
        yield f"max_length={size}"
