"""Data sets: read, laid out as messages, tokenized, packed."""
