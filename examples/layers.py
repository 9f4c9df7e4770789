"""What a model is made of, from its config.json alone: parameters by role, and what a sequence keeps in a layer. No torch."""

from collections import Counter

from llmkit.families import read_config

QWEN3_8B = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6},
}
config = read_config(QWEN3_8B)

for param in config.layers[0].params(config):
    print(f"{param.name:32} {param.shape!s:14} {param.role:7} {param.input} -> {param.output}")

sizes: Counter[str] = Counter()
for param in config.parameters.values():
    sizes[param.role] += param.size
print(", ".join(f"{role} {size / 1e9:.3f}" for role, size in sizes.most_common()), "billion parameters")

numbers = sum(state.numbers for layer in config.layers for state in layer.state(config))
print(f"{numbers:,} numbers in the KV cache for each token: {2 * numbers * 32768 / 2**30:.1f} GiB in 16 bits for a context of 32,768")
