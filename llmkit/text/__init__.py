"""Text in, ids out, and back: tokenizers, chat templates, stop strings. No torch, and nothing heavy until it is used."""

from llmkit.text.chat import ChatTemplate, encode_prompt
from llmkit.text.stop import StopScanner
from llmkit.text.stream import StreamDecoder
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.text.turns import encode_chat, encode_turns

__all__ = ["ChatTemplate", "StopScanner", "StreamDecoder", "Tokenizer", "encode_chat", "encode_prompt", "encode_turns", "load_tokenizer"]
