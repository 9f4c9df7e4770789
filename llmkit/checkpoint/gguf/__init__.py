"""GGUF files (llama.cpp)."""
