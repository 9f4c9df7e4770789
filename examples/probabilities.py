"""What the model expects next, and how likely it finds a text: logits, log-probabilities, perplexity."""

import numpy as np

import llmkit

llm = llmkit.load(llmkit.embedded_model())
text = "Once upon a time, there was a little girl named"

logits = llm.logits(text)[-1]  # float32 [vocab], after the last token
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
print(f"{text} ...")
for token in np.argsort(-probabilities)[:5].tolist():
    print(f"  {probabilities[token]:6.1%} {llm.tokenizer.decode([token])!r}")

for sentence in ("The dog ran to the park.", "The park ran to the dog.", "Dog the park the to ran."):
    score = llm.score(sentence)
    print(f"{sentence:28} perplexity {score.perplexity:8.1f}, {score.bits_per_byte:.2f} bits per byte")
