"""What family files share: typed, range-checked reading of `config.json`, and the fields that all families spell alike. No torch.

A field that is absent takes the family's default, not Llama's: old `config.json` files leave out whatever their configuration class
had as default, so every family file opens with its own `DEFAULTS`. A field that is present and wrong is a ConfigError with its name,
its value and the remedy; a field that asks for something the model does not do is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from llmkit.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig, NormPlacement, PartConfig, RopeConfig
from llmkit.errors import ConfigError

# Buffers that old checkpoints carry and every reader recomputes.
IGNORE = (r".*\.rotary_emb\.inv_freq",)

# HF spells some activations in several ways; these all mean one of four functions.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

FULL, SLIDING = "full_attention", "sliding_attention"
DTYPES = ("float32", "float16", "bfloat16")
ROPE_FIELDS = ("rope_parameters", "rope_scaling")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Every key a `rope_parameters` dictionary may hold; an unknown one could change the frequencies, so it is refused.
ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
    "long_factor", "finetuned",
}  # fmt: skip

# Larger than any model there is; a config.json beyond it is damaged, and building it would only exhaust the memory.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1024
MAX_POSITIONS = 1 << 40
MAX_EXPERT_MODULES = 1 << 15

# The tensors of a layer and of the body, below their prefix: for families that put them below another one.
LAYER_NAMES = [f"self_attn.{name}_proj.{end}" for name in "qkvo" for end in ("weight", "bias")]
LAYER_NAMES += [f"self_attn.{name}_norm.weight" for name in "qk"] + [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
LAYER_NAMES += [f"{name}_layernorm.weight" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
NAMES = ["embed_tokens.weight", "norm.weight", *("layers.{i}." + name for name in LAYER_NAMES)]

LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


class ChoiceError(ConfigError):
    """A value llmkit does not know; without the named fields of config.json, what else is wrong can still be found."""

    def __init__(self, message: str, fields: Sequence[str]) -> None:
        super().__init__(message)
        self.fields = fields


class Fields:
    """The fields of one `config.json`, each checked when it is read.

    `hf` is the dictionary; `defaults` are the family's values for absent fields, on top of those most families share; `spelling` gives
    the family's own names of fields (`hidden_size` is GPT-2's `n_embd`), in which errors speak too; `where` is what they call the file.
    """

    def __init__(
        self, hf: Mapping[str, Any], defaults: Mapping[str, Any], spelling: Mapping[str, str] | None = None, where: str = "config.json"
    ) -> None:
        self.hf = hf
        self.values: dict[str, Any] = {**LLAMA_DEFAULTS, **defaults, **hf}
        self.spelling = spelling or {}
        self.where = where

    def get(self, name: str) -> Any:
        """A field as it stands there, unchecked; None where it is absent."""
        return self.values.get(self.spelling.get(name, name))

    def error(self, name: str, problem: str) -> ConfigError:
        """A ConfigError about one field: its name, its value, what is wrong and what to do."""
        value = repr(self.get(name))
        shown = value if len(value) <= 80 else value[:77] + "..."
        return ConfigError(f"{self.where} has {self.spelling.get(name, name)} = {shown}, {problem}.")

    def integer(self, name: str, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self.optional_integer(name, minimum=minimum, maximum=maximum)
        if value is None:
            raise self.error(name, "but a whole number is needed; give it the value of the model")
        return value

    def optional_integer(self, name: str, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(name, f"but it must be a whole number from {minimum} to {maximum}; correct it or fetch the file again")
        return value

    def number(self, name: str, *, minimum: float = 0.0) -> float:
        value = self.optional_number(name, minimum=minimum)
        if value is None:
            raise self.error(name, "but a number is needed; give it the value of the model")
        return value

    def optional_number(self, name: str, *, minimum: float = 0.0) -> float | None:
        """A finite number above `minimum`, or None where the field is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        # The magnitude is compared before float(): an integer of a thousand digits does not fit into one.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or not value > minimum:
            raise self.error(name, f"but it must be a finite number above {minimum:g}; correct it or fetch the file again")
        return float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(name, f"but it must be a list of {length} numbers; correct it or fetch the file again")
        items = Fields(dict(zip(map(str, range(length)), value, strict=True)), {})
        try:
            return tuple(items.number(str(i)) for i in range(length))
        except ConfigError:
            raise self.error(name, "but every entry must be a finite number above 0; correct it or fetch the file again") from None

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(name, "but it must be true or false; correct it or fetch the file again")
        return value

    def choice(self, name: str, known: Iterable[str]) -> str:
        value = self.get(name)
        if not isinstance(value, str) or value not in known:
            problem = self.error(name, f"which llmkit does not know; it runs {', '.join(known)}")
            raise ChoiceError(str(problem), ROPE_FIELDS if name == "rope_type" else (self.spelling.get(name, name),))
        return value

    def refuse(self, *names: str) -> None:
        """Fields that ask for something the model does not do: absent, null, false, or an error."""
        for name in names:
            if self.get(name) not in (None, False):
                raise self.error(name, f"which llmkit does not do; use a checkpoint without {name}")

    @property
    def num_hidden_layers(self) -> int:
        return self.integer("num_hidden_layers", maximum=MAX_LAYERS)

    @property
    def head_dim(self) -> int:
        given = self.optional_integer("head_dim")
        if given is not None:
            return given
        heads, hidden = self.integer("num_attention_heads"), self.integer("hidden_size")
        if hidden % heads:
            raise self.error("num_attention_heads", f"which does not divide hidden_size = {hidden}; give head_dim or correct one of them")
        return hidden // heads

    @property
    def sliding_window(self) -> int | None:
        return self.optional_integer("sliding_window", maximum=MAX_POSITIONS)

    def windows(self, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
        """The sliding window of every layer: by `layer_types` where it is given, else of those layers that `slides` picks."""
        kinds, count, window = self.get("layer_types"), self.num_hidden_layers, self.sliding_window
        if kinds is None:
            kinds = [SLIDING if slides(i) else FULL for i in range(count)]
        if not isinstance(kinds, list) or len(kinds) != count:
            raise self.error("layer_types", f"but it must be a list with one entry for each of the {count} layers; correct it")
        if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
            raise self.error("layer_types", f"where {unknown[0]!r} is unknown; llmkit runs {FULL} and {SLIDING}")
        if window is None and SLIDING in kinds:
            raise self.error("sliding_window", f"but there are {SLIDING} layers; set the window or make them {FULL}")
        return tuple(window if kind == SLIDING else None for kind in kinds)

    def mapping(self, name: str, known: Collection[str] = ROPE_KEYS) -> dict[str, Any]:
        """A dictionary without its nulls, by default a rotary one; empty where the field is absent or null."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(name, "but it must be a dictionary; correct it or fetch the file again")
        if unknown := ", ".join(sorted(set(map(str, value)) - set(known))):
            raise self.error(name, f"where llmkit does not know {unknown:.80}; it would change the model, or can be removed")
        return {key: item for key, item in value.items() if item is not None}

    def indices(self, name: str) -> list[int]:
        """A list of layer numbers; absent or null is an empty one."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise self.error(name, "but it must be a list of layer numbers; correct it or fetch the file again")
        return value

    def indicators(self, name: str) -> list[bool] | None:
        """A list with 0 or 1 for each layer (it may be longer, as in transformers), or None where it is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < self.num_hidden_layers or any(item not in (0, 1) for item in value):
            raise self.error(name, f"but it must be a list of 0 or 1 for each of the {self.num_hidden_layers} layers; correct it")
        return [bool(item) for item in value]

    def attention(self, *, bias: bool = False, **more: Any) -> AttentionConfig:
        """Return the attention of a layer. bias: of query, key, value and output at once (`attention_bias` of Hugging Face)."""
        heads = self.integer("num_attention_heads")
        kv_heads = heads if self.get("num_key_value_heads") is None else self.integer("num_key_value_heads")
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"which does not divide num_attention_heads = {heads}; correct one of the two")
        shared: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": self.head_dim}
        return AttentionConfig(**(shared | {"qkv_bias": bias, "o_bias": bias} | more))

    def mlp(self, size: str = "intermediate_size", **more: Any) -> MLPConfig:
        """Return the MLP of a layer; `size` names the field with its width."""
        act = ACTIVATIONS[self.choice("hidden_act", ACTIVATIONS)]
        return MLPConfig(intermediate_size=self.integer(size), hidden_act=act, **more)

    def moe(self, num_experts: str, size: str, *, norm_topk_prob: bool) -> MoEConfig:
        """Return the mixture of experts, from the fields in which the family says their number and width."""
        experts = self.integer(num_experts)
        if experts * self.num_hidden_layers > MAX_EXPERT_MODULES:
            raise self.error(num_experts, f"which in {self.num_hidden_layers} layers is more than any model has; correct it")
        chosen = self.integer("num_experts_per_tok")
        if chosen > experts:
            raise self.error("num_experts_per_tok", f"but there are only {experts} experts; correct one of the two")
        return MoEConfig(num_experts=experts, num_experts_per_tok=chosen, expert=self.mlp(size), norm_topk_prob=norm_topk_prob)

    def rope(
        self,
        parameters: Mapping[str, Any] | None = None,
        *,
        theta: str = "rope_theta",
        partial: bool = False,
        renamed: Mapping[str, str] | None = None,
    ) -> RopeConfig:
        """The rotary embedding, in the old spelling (`rope_theta`, `rope_scaling`) or in that of transformers 5 (`rope_parameters`).

        `parameters` stands in for both dictionaries (Gemma 3 has one for each kind of layer), `theta` names the field with the base
        where the dictionary has none, `partial` says that the family may rotate a part of head_dim only, `renamed` gives the present
        names of rope types that the family's older checkpoints spell differently.
        """
        given = dict(self.mapping("rope_scaling") or self.mapping("rope_parameters") if parameters is None else parameters)
        rope_type = given.get("rope_type", given.get("type", "default"))
        given["rope_type"] = (renamed or {}).get(str(rope_type), rope_type)
        given.setdefault("rope_theta", self.get(theta))
        given.setdefault("partial_rotary_factor", self.get("partial_rotary_factor"))
        # As in transformers, original_max_position_embeddings beside the dictionary wins over the one inside it.
        positions = self.integer("max_position_embeddings", maximum=MAX_POSITIONS)
        if self.get("original_max_position_embeddings") is not None:
            given["original_max_position_embeddings"] = self.values["original_max_position_embeddings"]
        given.setdefault("original_max_position_embeddings", positions)
        return _rope(Fields(given, {}, where=f"rope_parameters in {self.where}"), self.head_dim, positions, partial=partial)

    def model(
        self,
        mixers: PartConfig | Sequence[PartConfig],
        feed_forwards: PartConfig | Sequence[PartConfig],
        norm_placement: NormPlacement = "pre",
        **fields: Any,
    ) -> ModelConfig:
        """Return the ModelConfig of these mixers and feed-forwards, one for each layer or one for all.

        What concerns the whole model are the fields all families share, and the ones given here, which win.
        """
        count = self.num_hidden_layers
        mixers, feed_forwards = ([part] * count if isinstance(part, PartConfig) else part for part in (mixers, feed_forwards))
        layers = tuple(LayerConfig(mixer, feed, norm_placement) for mixer, feed in zip(mixers, feed_forwards, strict=True))
        self.refuse("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention", "per_layer_config")
        dtype = "dtype" if self.get("dtype") is not None else "torch_dtype"
        shared: dict[str, Any] = {
            "model_type": self.hf["model_type"],
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": self.integer("hidden_size"),
            "max_position_embeddings": max(self.integer("max_position_embeddings", maximum=MAX_POSITIONS), *map(_reach, layers)),
            "norm_eps": self.number("rms_norm_eps"),
            "tie_word_embeddings": self.flag("tie_word_embeddings"),
            "dtype": "float32" if self.get(dtype) is None else self.choice(dtype, DTYPES),
            "hf": self.hf,
        }
        return ModelConfig(layers=layers, **(shared | fields))


def _reach(layer: LayerConfig) -> int:
    """Return the positions that a dynamic or yarn RoPE was stretched to: config.json may still give those of the original context."""
    rope = None if layer.mixer.rotary is None else layer.mixer.rotary[0]
    if rope is None or rope.rope_type not in ("dynamic", "yarn") or rope.original_max_position_embeddings is None:
        return 0
    return min(MAX_POSITIONS, int(rope.original_max_position_embeddings * rope.factor))


def _rope(own: Fields, head_dim: int, positions: int, *, partial: bool) -> RopeConfig:
    """A rotary dictionary with its defaults filled in, as RopeConfig: what its type needs is read, what it ignores is left alone."""
    rope_type, share = own.choice("rope_type", ROPE_TYPES), own.optional_number("partial_rotary_factor") or 1.0
    if share > 1 or (share < 1 and not partial):
        raise own.error("partial_rotary_factor", "but this family rotates all of head_dim; remove it or correct it")
    rotary_dim = int(head_dim * share)
    # An odd part is rounded up to a pair, as in transformers; an odd head has no room for that.
    if rotary_dim < (3 if rope_type == "dynamic" else 1) or (rotary_dim == head_dim and head_dim % 2):
        raise ConfigError(f"config.json lets {rotary_dim} of {head_dim} dimensions of a head rotate, in pairs; correct head_dim.")
    read: dict[str, Any] = {"rope_theta": own.number("rope_theta", minimum=1.0), "rope_type": rope_type, "partial_rotary_factor": share}
    if rope_type in ("linear", "dynamic", "llama3"):
        read["factor"] = own.number("factor")
    if rope_type == "dynamic":
        read["original_max_position_embeddings"] = positions
    if rope_type in ("llama3", "yarn", "longrope"):
        original = own.integer("original_max_position_embeddings", minimum=2, maximum=MAX_POSITIONS)
        read["original_max_position_embeddings"] = original
    if rope_type in ("yarn", "longrope"):
        # Without a factor, it is how much longer the context became (Phi-3).
        read["factor"] = own.optional_number("factor") or positions / original
        read["attention_factor"] = own.optional_number("attention_factor")
    if rope_type == "llama3":
        low, high = own.number("low_freq_factor"), own.number("high_freq_factor")
        if low >= high:
            raise own.error("high_freq_factor", f"but it must be above low_freq_factor = {low:g}; correct one of the two")
        read |= {"low_freq_factor": low, "high_freq_factor": high}
    if rope_type == "yarn":
        read |= {name: own.optional_number(name) or default for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        read |= {name: own.optional_number(name, minimum=-1.0) for name in ("mscale", "mscale_all_dim")}
        read["truncate"] = own.get("truncate") is None or own.flag("truncate")
    if rope_type == "longrope":
        read |= {name: own.numbers(name, (rotary_dim + 1) // 2) for name in ("short_factor", "long_factor")}
    return RopeConfig(**read)
