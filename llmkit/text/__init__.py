"""Text in, ids out, and back: tokenizers, chat templates, stop strings. No torch, and nothing heavy until it is used."""
