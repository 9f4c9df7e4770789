"""How much memory a training run takes, term by term, and what to change in its recipe where it does not fit. No torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from llmkit.checkpoint.weights import EMBEDDING, HEAD
from llmkit.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, Param
from llmkit.kernels import native_problem
from llmkit.planning.inference import CONSTANTS, Change, Constants, Terms, inner_size, quantizing_work, without_zeros
from llmkit.planning.model_info import Facts, Storage, made, storage_bytes, widths
from llmkit.quant.schemes import NF4, Choice, choose
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


def base_storage(param: Param, stored: Storage, how: Setting) -> Storage:
    """How a parameter is held: float32 where it is trained, else as it is stored, or in the codes of a 4-bit base."""
    if not how.lora:
        return "F32"
    if how.quantize is not None and not isinstance(stored, Choice):
        return choose(how.quantize, param) or stored
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
    held = {name: base_storage(param, facts.storage[name], how) for name, param in config.parameters.items()}
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
    activations = _activation_bytes(how, facts, size, attends, between=4 if held[EMBEDDING] == "F32" else size)
    once = how.lora and how.loss != "distill" and config.final_logit_softcapping is None and how.saved == 0
    tile = constants.logit_tile if on_cpu else constants.logit_elements
    columns = min(config.vocab_size, max(constants.logit_columns, tile // max(how.tokens, config.hidden_size)))
    logits = _logit_bytes(how, facts, held[HEAD if HEAD in facts.shapes else EMBEDDING], size, columns if once else 0, pooled, constants)
    inner = max(sum(_feed_forward_pieces(config, layer)) for layer in config.layers)
    backward = how.tokens * (3 * inner // 2 + 2 * config.hidden_size) * size  # an MLP's product, what it is made of, and gradients
    backward += max(how.tokens * inner * size, _widened(facts, held, pooled, size))  # those inside come after the product
    terms["activations"] = activations
    if pooled:
        terms["holes between them"] = _huge_pages(how, config, constants)
    elif on_cpu:
        terms["holes between them"] = int((constants.fewer_holes if how.checkpointing else constants.holes) * activations)
    gradients = 4 * how.trained
    if not how.accumulates and not pooled:  # the pool keeps its memory
        # While gradients come, activations go; those of head and embedding come first and last.
        gradients = max(0, gradients - activations) + 4 * (how.saved if how.lora else math.prod(facts.head))
    terms["gradients"] = gradients
    if on_cpu and any(isinstance(storage, Choice) and storage.scheme == NF4 for storage in held.values()):
        terms["work on 4 bits"] = constants.nf4_work
        if how.quantize == NF4 and not how.checkpointing:  # the C library keeps what quantizing took
            terms["work on 4 bits"] += quantizing_work(facts)
    terms["logits or backward buffers"] = max(logits, backward)
    if pooled and not (once and _shared(how, config, columns, constants)):
        terms["logits or backward buffers"] = logits + backward
    return without_zeros(terms)


def _activation_bytes(how: Setting, facts: Facts, size: int, attends: bool, between: int) -> int:
    """What is kept for the backward pass. Of a number: `size` bytes at linears, `between` between blocks, 4 in norms."""
    config = facts.config
    norms = (4 - size) * (1 if how.lora else 2)
    layers = [size * _saved_numbers(config, layer, how) + norms * _norm_inputs(config, layer) for layer in config.layers]
    ends = (4 + 2 * size) * config.hidden_size  # the final norm's input, what it gives and what the loss keeps
    if how.checkpointing:  # a block's input, and what PyTorch's attention gave; see model/transformer.py
        attended = 0 if attends else max(size * mixer.query_size + 4 * mixer.num_heads for mixer in attention_mixers(config))
        return how.tokens * (len(layers) * (between * config.hidden_size + attended) + max(layers) - attended + ends)
    # Without adapters autocast keeps a copy of the weights.
    copies = sum(2 * math.prod(shape) for shape in facts.linears.values()) if size == 2 and not how.lora else 0
    return how.tokens * (sum(layers) + ends) + copies


def _logit_bytes(how: Setting, facts: Facts, head: Storage, size: int, columns: int, pooled: bool, constants: Constants) -> int:
    """What the loss takes while it goes over `columns` of the logits of all rows, of a frozen head; 0: over all of some rows. See
    training/objective.py."""
    config, numbers = facts.config, math.prod(facts.head)
    if columns:
        wide = 0 if pooled or head == ("F32" if size == 4 else "BF16") else size * columns * config.hidden_size
        whole = 4 * numbers if isinstance(head, Choice) else 0
        return how.tokens * (columns * (4 if size == 4 else 6) + (4 + size) * config.hidden_size) + wide + whole
    rows = min(how.tokens, max(1, constants.logit_elements // config.vocab_size))
    logits = constants.logit_copies * (2 if how.loss == "distill" else 1) * rows * config.vocab_size * 4
    if size == 2:  # the head in 16 bits, and where it is trained its gradient in these, and in 32 beside the one so far
        return logits + (2 if how.lora else 8) * numbers
    return logits + (0 if head == "F32" else 4 * numbers)


def _shared(how: Setting, config: ModelConfig, columns: int, constants: Constants) -> bool:
    """Whether logits and the buffers of the way back lie in the same memory: the pool (`model.native.Memory`) has pieces that fit both,
    or gives up pieces that are so large that the C library gives them back."""
    piece, kept = inner_size(config), constants.kept_piece_checkpointing if how.checkpointing else constants.kept_piece
    return piece <= 5 * columns // 4 <= 2 * piece or 4 * how.tokens * piece > kept


def _widened(facts: Facts, held: dict[str, Storage], pooled: bool, size: int) -> int:
    """Bytes of the matrices that are made in the products' own format, `size` bytes a number, on the way back: one after the other; the
    native products read 16 bits as they are, and take all that have one input together."""
    if not pooled:
        own = "F32" if size == 4 else "BF16"
        return size * max((math.prod(facts.shapes[name]) for name in facts.linears if held[name] != own), default=0)
    together: dict[str, int] = {}
    for name, shape in facts.linears.items():
        if isinstance(held[name], Choice):
            place = name.removesuffix(".weight").rpartition(".")[0] + " " + facts.config.parameters[name].input
            together[place] = together.get(place, 0) + 4 * math.prod(shape)
    return max(together.values(), default=0)


def _huge_pages(how: Setting, config: ModelConfig, constants: Constants) -> int:
    """What the room behind the pieces of the pool (`model.native.Memory`: a quarter of each) takes. It is not written to, but the large
    pieces lie in huge pages, of which the last is half used on average."""
    found = []
    for layer in config.layers:
        pieces = [config.hidden_size] * _norms(layer) + list(widths(layer.mixer, config).values()) + _feed_forward_pieces(config, layer)
        sizes = [4 * how.tokens * numbers for numbers in pieces]
        found.append(sum(min(size // 4, constants.huge_page // 2) for size in sizes if 5 * size // 4 >= constants.huge_array))
    return max(found) if how.checkpointing else sum(found)


def _norms(layer: LayerConfig) -> int:
    return sum(name is not None for name in layer.norm_names)


def _norm_inputs(config: ModelConfig, layer: LayerConfig) -> int:
    """Numbers that the norms of a layer take, for each token."""
    inside, params = widths(layer.mixer, config), layer.mixer.params(config)
    return _norms(layer) * config.hidden_size + sum(inside[name] for name in {param.input for param in params if param.role == "norm"})


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
    hidden, mixer = config.hidden_size, layer.mixer
    own = 1 if how.lora else 2
    numbers = own * _norm_inputs(config, layer) + 2 * hidden + sum(widths(mixer, config).values()) + how.ranks // len(config.layers)
    if isinstance(mixer, AttentionConfig):
        numbers += mixer.num_heads + 2
        if mixer.softcap is not None:  # tanh and softmax; keys and values for every head
            numbers += 2 * mixer.num_heads * how.length + 2 * (mixer.query_size - mixer.kv_size)
    numbers += (1 if how.lora else 2) * sum(_feed_forward_pieces(config, layer))
    if isinstance(layer.feed_forward, MoEConfig):
        numbers += 2 * layer.feed_forward.num_experts_per_tok * hidden + 3 * layer.feed_forward.num_experts
    return numbers


def _feed_forward_pieces(config: ModelConfig, layer: LayerConfig) -> list[int]:
    """Numbers of gate and up, each of all experts that a token goes through."""
    chosen = layer.feed_forward.num_experts_per_tok if isinstance(layer.feed_forward, MoEConfig) else 1
    return [chosen * size for size in made(layer.feed_forward, config).values()]


def attention_mixers(config: ModelConfig) -> list[AttentionConfig]:
    return [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]


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
