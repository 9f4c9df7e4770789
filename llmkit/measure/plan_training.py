"""How much memory a training run takes, term by term, and what to change in its recipe where it does not fit. No torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from llmkit.checkpoint.weights import EMBEDDING, HEAD
from llmkit.config import LayerConfig, ModelConfig
from llmkit.kernels import native_problem
from llmkit.measure.facts import Facts, Storage, storage_bytes
from llmkit.measure.plan import CONSTANTS, Change, Constants, Terms, attention_sizes, without_zeros
from llmkit.quant.schemes import Choice, choose
from llmkit.training.recipe import LoraRecipe, Recipe


@dataclass(frozen=True)
class Setting:
    """What of a recipe decides its memory."""

    tokens: int  # in one forward pass
    length: int
    lora: bool
    factors: int  # numbers in adapters
    saved: int  # numbers in modules trained whole beside them
    ranks: int  # of all adapters together
    quantize: str | None
    checkpointing: bool
    accumulates: bool
    optimizer: str
    ema: bool
    bfloat16: bool  # of products, on a GPU
    loss: str
    native: bool  # the kernels run here: on a CPU they attend
    fused: bool  # all of an adapter goes through lora/fused.py, in float32 on a CPU

    @property
    def trained(self) -> int:
        return self.factors + self.saved


def setting(recipe: Recipe, facts: Facts, checkpointing: bool = False) -> Setting:
    """checkpointing: what the recipe leaves open is decided so."""
    lora = recipe.lora
    length = recipe.max_length or min(2048, facts.config.max_position_embeddings)
    factors, saved, ranks = (0, facts.parameters, 0) if lora is None else _adapter_numbers(lora, facts)
    return Setting(
        tokens=recipe.batch_size * length * _group(recipe),
        length=length,
        lora=lora is not None,
        factors=factors,
        saved=saved,
        ranks=ranks,
        quantize=recipe.quantize,
        checkpointing=checkpointing if recipe.checkpointing is None else recipe.checkpointing,
        accumulates=recipe.grad_accumulation > 1,
        optimizer=recipe.optimizer,
        ema=recipe.ema is not None,
        bfloat16=recipe.dtype != "float32",
        loss=recipe.loss,
        native=native_problem() is None,
        fused=lora is not None and not lora.use_dora and not lora.dropout and recipe.dtype != "bfloat16",
    )


def _group(recipe: Recipe) -> int:
    """Rows of `max_length` for each of a batch: a pair of answers is two."""
    return 2 if recipe.preference else 1


def _adapter_numbers(lora: LoraRecipe, facts: Facts) -> tuple[int, int, int]:
    """Numbers in the factors (DoRA's magnitudes too), in whole modules, and of all ranks."""
    wanted = lora.target_modules
    names = (wanted,) if isinstance(wanted, str) else wanted
    linears = {name.removesuffix(".weight"): shape for name, shape in facts.linears.items()}
    hit = [shape for name, shape in linears.items() if wanted == "all-linear" or any(name == n or name.endswith("." + n) for n in names)]
    factors = sum(lora.r * (rows + columns) + (rows if lora.use_dora else 0) for rows, columns in hit)
    whole = [name for name in facts.shapes if name.rpartition(".")[0].endswith(lora.modules_to_save)]
    return factors, sum(math.prod(facts.shapes[name]) for name in whole), lora.r * len(hit)


def base_storage(name: str, shape: tuple[int, ...], stored: Storage, how: Setting) -> Storage:
    """How a parameter is held: float32 where it is trained, else as it is stored, or in the codes of a 4-bit base."""
    if not how.lora:
        return "F32"
    if how.quantize is not None and not isinstance(stored, Choice):
        return choose(how.quantize, name, shape) or stored
    return stored


def training(
    how: Setting, facts: Facts, device: str = "cpu", teacher: Facts | None = None, data_bytes: int = 0, constants: Constants = CONSTANTS
) -> Terms:
    """A training run at its fullest: in the backward pass of a step after the first."""
    config, on_cpu = facts.config, device.startswith("cpu")
    size = 2 if how.bfloat16 and not on_cpu else 4  # of a number that flows between linears
    terms: Terms = {}
    if on_cpu:
        terms["process"] = constants.training_process + int(constants.tokenizer * facts.tokenizer_bytes)
        terms["process"] += constants.adapter_process if how.lora else 0
        terms["data"] = int(constants.data * data_bytes)
    else:
        terms["process"] = constants.cuda_context
    held = {name: base_storage(name, shape, facts.storage[name], how) for name, shape in facts.shapes.items()}
    terms["weights"] = sum(storage_bytes(storage, facts.shapes[name]) for name, storage in held.items())
    if how.lora:
        terms["adapters"] = 4 * how.factors
    elif how.loss == "dpo":
        terms["the model as it was"] = terms["weights"]
    if teacher is not None:
        terms["teacher"] = teacher.stored_bytes
    terms["optimizer"] = _optimizer_bytes(how, facts)
    if how.ema:
        terms["average of the weights"] = 4 * how.trained

    attends, pooled = on_cpu and how.native, on_cpu and how.native and how.fused
    layers = [_saved_numbers(config, layer, how) for layer in config.layers]
    if how.checkpointing:  # what PyTorch's attention gave is kept; see model/transformer.py
        kept = 4 * config.hidden_size
        kept += 0 if attends else size * (config.num_attention_heads * config.head_dim + config.num_attention_heads)
        activations = how.tokens * (len(layers) * kept + size * max(layers))
    else:
        activations = how.tokens * size * sum(layers)
    activations += how.tokens * 3 * config.hidden_size * 4  # embedding, final norm and what the loss keeps
    rows = min(how.tokens, max(1, constants.logit_elements // config.vocab_size))
    # A frozen head's logits stand in one buffer, which becomes their gradient (training/loss.py).
    once = how.lora and how.loss != "distill" and config.final_logit_softcapping is None and how.saved == 0
    copies = 1 if once else constants.logit_copies * (2 if how.loss == "distill" else 1)
    logits = copies * rows * config.vocab_size * 4
    head = EMBEDDING if HEAD not in facts.shapes else HEAD
    if isinstance(held[head], Choice) or (held[head] != "F32" and not once):
        logits += 4 * math.prod(facts.head)
    elif held[head] != "F32" and not pooled:  # widened a part at a time
        logits += constants.logit_elements
    inner = max(_mlp_numbers(config, layer) for layer in config.layers)
    backward = how.tokens * (5 * inner // 2 + 3 * config.hidden_size) * size + _widened(facts, held, pooled)
    terms["activations"] = activations
    if pooled:
        terms["holes between them"] = _huge_pages(how, config, constants)
    elif on_cpu:
        terms["holes between them"] = int((constants.fewer_holes if how.checkpointing else constants.holes) * activations)
    gradients = 4 * how.trained
    if not how.lora and not how.accumulates:
        # While gradients come, activations go; those of head and embedding come first and last.
        gradients = max(0, gradients - activations) + 4 * math.prod(facts.head)
    terms["gradients"] = gradients
    terms["logits or backward buffers"] = max(logits, backward)
    kept_piece = constants.kept_piece_checkpointing if how.checkpointing else constants.kept_piece
    if pooled and how.tokens * 4 * config.intermediate_size <= kept_piece:  # the pool gave them up for logits, the C library keeps them
        terms["logits or backward buffers"] = logits + backward
    return without_zeros(terms)


def _widened(facts: Facts, held: dict[str, Storage], pooled: bool) -> int:
    """Bytes of the matrices that stand in float32 beside a product on the way back: the native ones read 16 bits as they are, and
    take all that have one input together."""
    if not pooled:
        return 4 * max((math.prod(facts.shapes[name]) for name in facts.linears if held[name] != "F32"), default=0)
    together: dict[str, int] = {}
    for name, shape in facts.linears.items():
        if isinstance(held[name], Choice):
            place, linear = name.removesuffix(".weight").rsplit(".", 1)
            group = f"{place}.out" if linear in ("o_proj", "down_proj") else place
            together[group] = together.get(group, 0) + 4 * math.prod(shape)
    return max(together.values(), default=0)


def _huge_pages(how: Setting, config: ModelConfig, constants: Constants) -> int:
    """What the room behind the pieces of the pool (`model.native.Memory`: a quarter of each) takes. It is not written to, but the large
    pieces lie in huge pages, of which the last is half used on average."""
    hidden, (q, kv) = config.hidden_size, attention_sizes(config)
    found = []
    for layer in config.layers:
        mlp = _mlp_numbers(config, layer)
        pieces = [hidden] * _norms(config) + [q, q, kv, kv] + ([mlp // 2] * 2 if config.gated_mlp else [mlp])
        sizes = [4 * how.tokens * numbers for numbers in pieces]
        found.append(sum(min(size // 4, constants.huge_page // 2) for size in sizes if 5 * size // 4 >= constants.huge_array))
    return max(found) if how.checkpointing else sum(found)


def _norms(config: ModelConfig) -> int:
    return {"pre": 2, "post": 2, "sandwich": 4}[config.norm_placement]


def _optimizer_bytes(how: Setting, facts: Facts) -> int:
    """AdamW: two numbers for each that is trained. Muon: one for each of the hidden matrices, and a stack of equal ones on the way."""
    if how.optimizer != "muon":
        return 8 * how.trained
    count = how.factors if how.lora else sum(map(math.prod, facts.linears.values()))
    return 4 * count + 8 * (how.trained - count)


def _saved_numbers(config: ModelConfig, layer: LayerConfig, how: Setting) -> int:
    """Numbers that a layer keeps for the backward pass, for each token.

    Low-rank (lora/fused.py): the inputs of norms and of linears once each, x A^T, query, key, value, the attention's result, gate, up.
    All weights trained: each norm also its normalised input, and the MLP its activation and product.
    """
    hidden, (q, kv) = config.hidden_size, attention_sizes(config)
    own = 1 if how.lora else 2
    numbers = (own * _norms(config) + 2) * hidden + 2 * q + 2 * kv + config.num_attention_heads + 2 + how.ranks // len(config.layers)
    if config.qk_norm is not None:
        numbers += own * (q + kv)
    if config.attn_logit_softcapping is not None:
        numbers += 2 * config.num_attention_heads * how.length + 2 * (q - kv)  # tanh and softmax; keys and values for every head
    numbers += (1 if how.lora else 2) * _mlp_numbers(config, layer)
    if layer.moe is not None:
        numbers += 2 * layer.moe.num_experts_per_tok * hidden + 3 * layer.moe.num_experts
    return numbers


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
    checkpointing (a quarter slower), then a base in 8 or 4 bits, then shorter rows, then an adapter instead of all weights."""
    how = setting(recipe, facts)
    rows = recipe.batch_size
    batches = [rows >> n for n in range(rows.bit_length())]
    lengths = [size for n in range(8) if (size := how.length >> n) >= min(how.length, 128)]
    # A recipe that leaves checkpointing open turns it on by itself where that makes it fit.
    checkpoints = [True] if recipe.checkpointing is None or how.checkpointing else [False, True]
    kinds: list[tuple[bool, str | None]] = [(how.lora, how.quantize)]
    if how.lora and how.quantize is None and not facts.quantized:
        kinds += [(True, "q8"), (True, "q4")]
    elif not how.lora and isinstance(recipe.model, str):
        kinds += [(True, None), (True, "q8"), (True, "q4")]
    options = []
    for (b, batch), (c, checkpoint), (k, (lora, scheme)), (cut, size) in itertools.product(
        enumerate(batches), enumerate(checkpoints), enumerate(kinds), enumerate(lengths)
    ):
        cost = b + 3 * c + 20 * cut + (10 if how.lora else 15) * k
        options.append((cost, batch, checkpoint, lora, scheme, size))
    for _, batch, checkpoint, lora, scheme, size in sorted(options, key=lambda option: option[0]):
        tokens, accumulates = batch * size * _group(recipe), how.accumulates or batch < rows
        tried = replace(how, tokens=tokens, length=size, checkpointing=checkpoint, accumulates=accumulates, quantize=scheme)
        if lora and not how.lora:
            factors, saved, ranks = _adapter_numbers(LoraRecipe(), facts)
            tried = replace(tried, lora=True, factors=factors, saved=saved, ranks=ranks, fused=recipe.dtype != "bfloat16")
        total = sum(training(tried, facts, device, teacher, data_bytes).values())
        if total <= available:
            words = ["lora={}"] if lora and not how.lora else []
            if batch != rows:
                words += [f"batch_size={batch}", f"grad_accumulation={-(-rows * recipe.grad_accumulation // batch)}"]
            words += ["checkpointing=true"] if checkpoint and recipe.checkpointing is False else []
            words += [f"quantize={scheme}"] if scheme != how.quantize else []
            words += [f"max_length={size}"] if size != how.length else []
            return Change(tuple(words), total)
    return None
