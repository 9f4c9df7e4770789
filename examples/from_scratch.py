"""A tokenizer and a model from scratch, on a text file, in some seconds: 40 steps, so do not expect sense."""

import contextlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import llmkit

STORIES = Path(__file__).parent.parent / "recipes" / "data" / "stories.txt"
LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
}

with TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stdout):  # what a run says goes to standard error
    model = llmkit.finetune(
        {
            "model": LLAMA,
            "tokenizer": {"vocab_size": 512},
            "data": [{"path": str(STORIES)}],
            "output": folder,
            "max_length": 128,
            "batch_size": 8,
            "max_steps": 40,
            "warmup_steps": 5,
            "learning_rate": 5e-3,
            "held_out": 0.1,
        }
    )
    print(llmkit.load(model).generate("Once upon a time", max_tokens=40, seed=1).text)
