"""Teach the story teller about a robot with a LoRA adapter, in a minute on a CPU, and see the difference: `python examples/finetune.py`"""

import contextlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import llmkit

CHATS = Path(__file__).parent.parent / "recipes" / "data" / "chats.jsonl"  # 96 short chats; Bolt is in every story
REQUESTS = [
    f"Tell me a story about {who} and {what}." for who in ("a cat", "a girl", "a dragon") for what in ("a hat", "a truck", "an apple")
]


def show(llm: llmkit.LLM, adapter: str | None) -> None:
    """One story, and what is in all of them."""
    stories = [llm.chat(request, adapter=adapter, seed=seed).text for seed, request in enumerate(REQUESTS)]
    print(f"\n{REQUESTS[-1]}\n{stories[-1]}\n")
    print(f"Bolt is in {sum('Bolt' in story for story in stories)} of {len(stories)} stories.")


with TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stdout):  # what a run says goes to standard error
    adapter = llmkit.finetune(
        {
            "model": llmkit.embedded_model(),
            "data": [{"path": str(CHATS)}],
            "output": folder,
            "lora": {"r": 16, "alpha": 32},
            "epochs": 4,
            "max_minutes": 1,  # whichever comes first; the schedule follows
            "batch_size": 2,
            "learning_rate": 5e-3,  # for 2 million parameters; 2e-4 suits most models
            "warmup_steps": 5,
            "held_out": 0.05,
        }
    )
    llm = llmkit.load(llmkit.embedded_model(), adapter={"robot": adapter})  # beside the model, which stays as it was
    show(llm, None)
    show(llm, "robot")
