"""llmkit: LLM inference and fine-tuning with one readable transformer for every Hugging Face checkpoint."""

__version__ = "0.1.0"
