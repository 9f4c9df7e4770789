"""Low-rank adapters (LoRA, arXiv:2106.09685): PEFT folders in and out, run beside a model, merged into it."""
