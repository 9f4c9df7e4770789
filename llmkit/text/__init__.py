"""Text in, ids out, and back: tokenizers, chat templates, stop strings. No torch, and nothing heavy until it is used."""

from llmkit.text.chat import ChatTemplate, encode_chat, encode_prompt
from llmkit.text.stop import StopScanner
from llmkit.text.stream import StreamDecoder
from llmkit.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "StopScanner", "StreamDecoder", "Tokenizer", "encode_chat", "encode_prompt", "load_tokenizer"]
