"""Speed and memory: `llmkit bench`."""
