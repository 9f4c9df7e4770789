"""Quality: perplexity, KL, and `verify` against transformers."""
