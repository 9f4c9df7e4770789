"""Every `config.json` becomes the ModelConfig that transformers would run, or a ConfigError that names the field."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.config import ModelConfig, RopeConfig
from llmkit.errors import ConfigError
from llmkit.families import MODEL_TYPES, family, read_config
from tests.families.tiny import LLAMA3, LONG, ORIGINAL, SHORT, VARIANTS, YARN, hf_config, raw_config

CONFIG_CLASSES = {
    "gemma2": "Gemma2Config", "gemma3": "Gemma3Config", "gemma3_text": "Gemma3TextConfig", "gpt2": "GPT2Config",
    "granite": "GraniteConfig", "llama": "LlamaConfig", "mistral": "MistralConfig", "mixtral": "MixtralConfig", "olmo2": "Olmo2Config",
    "phi3": "Phi3Config", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig", "smollm3": "SmolLM3Config",
}  # fmt: skip


def old_spelling(hf: dict[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    old = {name: value for name, value in hf.items() if name not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = hf["dtype"]
    rope = hf.get("rope_parameters") or {}
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            old[name] = rope[name]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor", "rope_type")}
    old["rope_scaling"] = {"type": rope["rope_type"], **scaling} if rope.get("rope_type", "default") != "default" else None
    return old


def test_every_model_type_is_tested() -> None:
    assert MODEL_TYPES.keys() == CONFIG_CLASSES.keys()
    assert {hf_config(name).model_type for name in VARIANTS} == MODEL_TYPES.keys() - {"gemma3"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_absent_fields_take_the_family_defaults(model_type: str) -> None:
    complete = raw_config(getattr(transformers, CONFIG_CLASSES[model_type])())
    bare = {"model_type": model_type} | ({"text_config": {}} if model_type == "gemma3" else {})
    assert read_config(bare) == read_config(complete)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "qwen2-layer-types"])
def test_old_spelling_means_the_same(variant: str) -> None:
    hf = raw_config(hf_config(variant, dtype="bfloat16"))
    if variant == "gemma3":
        hf["sliding_window_pattern"] = 3  # transformers 5 saves the layer types that follow from it
    assert read_config(old_spelling(hf)) == read_config(hf)
    assert read_config(hf).dtype == "bfloat16"


@pytest.mark.parametrize("variant", VARIANTS)
def test_fields_agree_with_transformers(variant: str) -> None:
    theirs, ours = hf_config(variant), read_config(raw_config(hf_config(variant)))
    assert (ours.vocab_size, ours.hidden_size, ours.num_hidden_layers) == (theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers)
    assert ours.attention(0).num_heads == theirs.num_attention_heads
    if variant != "llama-dynamic":
        assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.hf == raw_config(theirs)


def tiny(variant: str, **changes: Any) -> ModelConfig:
    return read_config(raw_config(hf_config(variant)) | changes)


def test_rope_types_keep_their_parameters() -> None:
    def rope_of(variant: str) -> RopeConfig:
        rope = tiny(variant).attention(0).rope
        assert rope is not None
        return rope

    assert rope_of("llama-llama3").low_freq_factor == LLAMA3["rope_parameters"]["low_freq_factor"]
    assert rope_of("llama-yarn").original_max_position_embeddings == YARN["rope_parameters"]["original_max_position_embeddings"]
    longrope = rope_of("phi3-longrope")
    assert (longrope.short_factor, longrope.long_factor, longrope.factor) == (tuple(SHORT), tuple(LONG), 512 / 48)


def test_stretched_contexts_may_be_used() -> None:
    """Where config.json keeps the original context, the factor says how far a request may go."""
    assert tiny("llama-dynamic").max_position_embeddings == 3 * ORIGINAL
    assert tiny("llama-yarn", max_position_embeddings=ORIGINAL).max_position_embeddings == 4 * ORIGINAL


def test_older_names_of_longrope() -> None:
    longrope = {"short_factor": SHORT, "long_factor": LONG}
    expected = tiny("phi3", rope_parameters=None, rope_scaling={"type": "longrope", **longrope})
    for name in ("su", "yarn"):
        assert tiny("phi3", rope_parameters=None, rope_scaling={"type": name, **longrope}) == expected


def test_gemma3_with_images_is_its_text() -> None:
    text = raw_config(hf_config("gemma3"))
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
    ours = read_config(whole)
    assert ours.model_type == "gemma3_text"
    assert ours.hf["eos_token_id"] == [1, 106]
    assert ours.layers == read_config(text).layers


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, **parameters}}


WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "rope_type = 'spiral'", rope("spiral")),
    ("llama", "factor = None", rope("linear")),
    ("llama", "factor = '4'", rope("linear", factor="4")),
    ("llama", "mrope_section", rope("default", mrope_section=[1])),
    ("llama", "partial_rotary_factor = 0.5", rope("default", partial_rotary_factor=0.5)),
    ("llama", "high_freq_factor = 4", rope("llama3", factor=2, low_freq_factor=4, high_freq_factor=4)),
    ("llama", "rope_parameters = [1]", {"rope_parameters": [1]}),
    ("llama", "rope_theta = 1", rope("default", rope_theta=1)),
    ("llama", "hidden_act = 'snake'", {"hidden_act": "snake"}),
    ("llama", "hidden_act = 3", {"hidden_act": 3}),
    ("llama", "dtype = 'int3'", {"dtype": "int3"}),
    ("llama", "hidden_size = None", {"hidden_size": None}),
    ("llama", "hidden_size = 24.0", {"hidden_size": 24.0}),
    ("llama", "hidden_size = -24", {"hidden_size": -24}),
    ("llama", "hidden_size = 25", {"hidden_size": 25, "head_dim": None}),
    ("llama", "vocab_size = True", {"vocab_size": True}),
    ("llama", "num_hidden_layers = 1000000000", {"num_hidden_layers": 10**9}),
    ("llama", "num_key_value_heads = 2", {"num_key_value_heads": 2}),
    ("llama", "rms_norm_eps = nan", {"rms_norm_eps": float("nan")}),
    ("llama", "rms_norm_eps = 1000", {"rms_norm_eps": 10**400}),
    ("llama", "attention_bias = 'yes'", {"attention_bias": "yes"}),
    ("llama", "head_dim", {"head_dim": 7}),
    ("llama", "is_encoder_decoder = True", {"is_encoder_decoder": True}),
    ("mistral", "layer_types", {"layer_types": ["full_attention"] * 4}),
    ("mistral", "sliding_window = 0", {"sliding_window": 0}),
    ("mixtral", "num_experts_per_tok = 6", {"num_experts_per_tok": 6}),
    ("mixtral", "num_local_experts = 1048576", {"num_local_experts": 1 << 20}),
    ("qwen2", "sliding_window = None", {"layer_types": ["sliding_attention"] * 4}),
    ("qwen2", "layer_types", {"layer_types": ["full_attention"] * 3}),
    ("qwen2", "'chunked_attention'", {"layer_types": ["chunked_attention"] * 4}),
    ("qwen3-moe", "mlp_only_layers = ['1']", {"mlp_only_layers": ["1"]}),
    ("gemma2", "use_bidirectional_attention = True", {"use_bidirectional_attention": True}),
    ("gemma2", "hidden_activation = 'snake'", {"hidden_activation": "snake"}),
    ("gemma3", "rope_type", rope("default")),
    ("gemma3", "factor = None", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}),
    ("phi3-longrope", "long_factor = [1.5, 2.5, 4.0]", rope("longrope", short_factor=SHORT, long_factor=LONG[:-1])),
    ("phi3-longrope", "long_factor = [1, 1, 1, '1']", rope("longrope", short_factor=SHORT, long_factor=[1, 1, 1, "1"])),
    ("gpt2", "reorder_and_upcast_attn = True", {"reorder_and_upcast_attn": True}),
    ("gpt2", "add_cross_attention = True", {"add_cross_attention": True}),
    ("gpt2", "activation_function = 'snake'", {"activation_function": "snake"}),
    ("gpt2", "n_head = 5", {"n_head": 5}),
    ("smollm3", "no_rope_layers = [1, 0]", {"no_rope_layers": [1, 0]}),
    ("granite", "logits_scaling = 0", {"logits_scaling": 0}),
]


@pytest.mark.parametrize(("variant", "named", "changes"), WRONG, ids=[f"{variant}: {named}" for variant, named, _ in WRONG])
def test_a_wrong_field_is_named(variant: str, named: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(variant, **changes)
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


def test_all_that_is_unknown_is_named_at_once() -> None:
    old = {"rope_parameters": None, "rope_scaling": {"type": "spiral"}}
    for rotary in (rope("spiral"), old):
        with pytest.raises(ConfigError) as caught:
            tiny("llama", hidden_act="snake", dtype="int3", rms_norm_eps="small", **rotary)
        for named in ("rope_type = 'spiral'", "hidden_act = 'snake'", "rms_norm_eps = 'small'"):
            assert named in str(caught.value)
    with pytest.raises(ConfigError, match=r"hidden_act = 'snake'.*dtype = 'int3'"):
        tiny("llama", hidden_act="snake", dtype="int3")
    image = {"model_type": "gemma3", "text_config": raw_config(hf_config("gemma3")) | {"hidden_activation": "snake"}}
    with pytest.raises(ConfigError, match="hidden_activation = 'snake'"):
        read_config(image)


def test_unknown_model_types_get_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        family("lama")
    with pytest.raises(ConfigError, match="model_type"):
        read_config({"hidden_size": 3})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_configs_are_config_errors(data: st.DataObject) -> None:
    hf = raw_config(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    for name in data.draw(st.lists(st.sampled_from(sorted(hf.keys() - {"model_type"})), max_size=3)):
        part = hf
        while isinstance(part.get(name), dict) and part[name] and data.draw(st.booleans()):
            part, name = part[name], data.draw(st.sampled_from(sorted(part[name])))
        part[name] = data.draw(JSON)
    try:
        config = read_config(hf)
    except ConfigError:
        return
    assert len(config.layers) == config.num_hidden_layers > 0


CONFIGS = {name: hf_config(name) for name in VARIANTS}
