"""Draft tokens from the text so far, and check all of them in one step: the same reply, in fewer steps."""

import llmkit

text = "The bear said hello to the bird. The bird said hello to the bear. " * 4
fast, plain = (llmkit.load(llmkit.embedded_model(), speculate=mode) for mode in ("ngram", "off"))
reply, expected = (llm.generate(text, temperature=0, max_tokens=60) for llm in (fast, plain))

print(reply.text)
print(
    f"{reply.usage.accepted_tokens} of {reply.usage.drafted_tokens} draft tokens were right; the same text: {reply.text == expected.text}"
)
