"""Several questions to one long text: what they begin with is computed once."""

import llmkit

llm = llmkit.load(llmkit.embedded_model())
text = "Once upon a time there was a dog named Max. Max had a red ball and a blue hat. One day he lost them in the park. " * 8

for question in ("Max was", "The ball was", "In the park he"):
    reply = llm.generate(text + question, max_tokens=12, temperature=0)
    usage, seconds = reply.usage, reply.timings.time_to_first_token
    print(f"{question}{reply.text!r}: {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were known, {1000 * seconds:.1f} ms")
