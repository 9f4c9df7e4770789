"""Ask for a story and watch it being told: `python examples/chat.py "Tell me a story about a frog and a hat."`"""

import sys

import llmkit

request = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story about a dog and a ball."
llm = llmkit.load(llmkit.embedded_model())
print(llm)

with llm.chat(request, stream=True, seed=1) as stream:
    for chunk in stream:
        print(chunk, end="", flush=True)
reply = stream.completion
print(f"\n[{reply.finish_reason}, {reply.usage.completion_tokens} tokens, {reply.timings}]")

# The next turn carries the conversation on; what both turns share is not computed again.
messages = [{"role": "user", "content": request}, {"role": "assistant", "content": reply.text}, {"role": "user", "content": "Another one!"}]
second = llm.chat(messages, seed=2)
print(f"\n{second.text}\n[{second.usage.cached_tokens} of {second.usage.prompt_tokens} prompt tokens were still in the cache]")
