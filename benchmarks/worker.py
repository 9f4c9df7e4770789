"""A rival in decoding in a process of its own; see `llmkit.bench.worker`."""

from __future__ import annotations

from pathlib import Path

from llmkit.bench.process import Answer, Settings, main
from llmkit.bench.worker import DecodingModel
from llmkit.bench.worker import serve as serve_model


def load_rival(settings: Settings) -> DecodingModel:
    """Load llama.cpp or transformers."""
    if settings["side"] == "llama.cpp":
        from benchmarks.llama_cpp import LlamaCppDecoding

        return LlamaCppDecoding(settings["file"], settings["load"]["threads"])
    from benchmarks.transformers_decoding import TransformersDecoding

    return TransformersDecoding(settings["folder"], **settings["load"])


def serve(settings: Settings, answer: Answer) -> None:
    """Time a rival until standard input ends, or write the file that llama.cpp reads."""
    if settings["side"] != "export":
        serve_model(settings, answer, load_rival)
        return
    from benchmarks.llama_cpp import export

    answer({"file": str(export(Path(settings["folder"]), Path(settings["into"]), settings["type"]))})


if __name__ == "__main__":
    main(serve)
