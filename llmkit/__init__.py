"""llmkit: LLM inference and fine-tuning with one readable transformer for every Hugging Face checkpoint.

>>> import llmkit
>>> llm = llmkit.load("HuggingFaceTB/SmolLM2-135M-Instruct")
>>> print(llm.generate("Once upon a time", temperature=0, max_tokens=20).text)

The public names are imported when they are first used (PEP 562), so `import llmkit` is fast and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.config import ModelConfig
    from llmkit.engine.sampling import SamplingParams
    from llmkit.errors import LLMKitError
    from llmkit.finetuning import finetune
    from llmkit.llm.api import LLM, embedded_model, load
    from llmkit.llm.outputs import Chunk, Completion, Score, Stream, Timings, TokenLogprob, Usage

__version__ = "0.1.0"

_HOME_OF = {
    "ModelConfig": "llmkit.config",
    "SamplingParams": "llmkit.engine.sampling",
    "LLMKitError": "llmkit.errors",
    "finetune": "llmkit.finetuning",
    **dict.fromkeys(("LLM", "embedded_model", "load"), "llmkit.llm.api"),
    **dict.fromkeys(("Chunk", "Completion", "Score", "Stream", "Timings", "TokenLogprob", "Usage"), "llmkit.llm.outputs"),
}

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "LLMKitError",
    "ModelConfig",
    "SamplingParams",
    "Score",
    "Stream",
    "Timings",
    "TokenLogprob",
    "Usage",
    "__version__",
    "embedded_model",
    "finetune",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llmkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
