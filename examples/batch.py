"""Several prompts in one batch, and several samples of one: each is what it would be alone."""

import llmkit

llm = llmkit.load(llmkit.embedded_model())
prompts = ["Once upon a time, there was a little rabbit", "One day, Lily went to the park", "Tom had a red kite"]

for prompt, reply in zip(prompts, llm.generate(prompts, temperature=0, max_tokens=40), strict=True):
    print(f"{prompt} |{reply.text}\n")

for reply in llm.generate(prompts[0], n=3, temperature=0.8, seed=7, max_tokens=30, stop=["."]):
    print("-", reply.text.strip())
