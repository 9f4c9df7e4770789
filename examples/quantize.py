"""Store the story teller in 4 bits, and measure what that costs: size, perplexity, distance from the original."""

from pathlib import Path
from tempfile import TemporaryDirectory

import llmkit
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.evaluate.perplexity import evaluate

STORIES = Path(__file__).parent.parent / "recipes" / "data" / "stories.txt"
texts = STORIES.read_text(encoding="utf-8").split("<|endoftext|>")

with TemporaryDirectory() as folder:
    report = quantize_folder(llmkit.embedded_model(), Path(folder) / "q4", "q4")
    print(f"{report.weights:,} weights: {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after")

    original, quantized = llmkit.load(llmkit.embedded_model()), llmkit.load(report.folder)
    figures = evaluate(quantized, texts, original, max_tokens=2000)
    print(f"{figures.bits_per_weight:.2f} bits per weight, {figures.bits_per_byte:.4f} bits per byte of text")
    print(f"before {figures.reference_bits_per_byte:.4f}; KL divergence {figures.mean_kl:.4f} nats per token")
    print(f"the most likely token is the same for {figures.top1_agreement:.1%}")
