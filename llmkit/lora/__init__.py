"""Low-rank adapters (LoRA, arXiv:2106.09685): trained beside any linear, PEFT folders in and out, run per request, merged."""
