"""Training: text or JSONL in, a Hugging Face model folder out. One loop; a recipe says what runs through it."""
