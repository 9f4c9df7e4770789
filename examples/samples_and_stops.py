"""What ends a reply: a stop string, a token budget, or you; and how to steer single tokens with a bias."""

import llmkit

llm = llmkit.load(llmkit.embedded_model())

reply = llm.generate("Once upon a time", stop=["."], seed=2)
print(f"{reply.text!r} ended by {reply.finish_reason}")

with llm.stream("Once upon a time", seed=2) as stream:  # leaving the block ends the request and frees its memory
    for chunk in stream:
        print(chunk, end="", flush=True)
        if "." in chunk.text:
            break
print(f" [{stream.completion.finish_reason}]")

the = llm.tokenizer.encode(" Lily", bos=False)[0]
for bias in (0, -100):
    reply = llm.generate("One day, a girl named", temperature=0, max_tokens=8, logit_bias={the: bias})
    print(f"bias {bias}: {reply.text!r}")
