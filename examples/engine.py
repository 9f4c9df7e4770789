"""The engine below the API: ids in, ids out. Requests join a running batch and leave it when they end."""

import llmkit
from llmkit.engine import Engine, SamplingParams

llm = llmkit.load(llmkit.embedded_model())
engine = Engine(llm.new_backend(), max_cache_tokens=2048)
encode, decode = llm.tokenizer.encode, llm.tokenizer.decode

first = engine.add(encode("Once upon a time"), SamplingParams(temperature=0, max_tokens=30), eos_ids=llm.eos_ids)
for _ in range(5):  # a step: one more token for every sequence that is running
    engine.step()
second = engine.add(encode("The little dog"), SamplingParams(temperature=0.8, seed=3, max_tokens=20), eos_ids=llm.eos_ids)

steps = 5
while engine.busy:
    engine.step()
    steps += 1
for sequence in (first, second):
    print(decode(sequence.ids[: sequence.length].tolist()), f"[{sequence.finish_reason}]")
print(f"{steps} steps for {first.length - first.prompt_length + second.length - second.prompt_length} tokens")
