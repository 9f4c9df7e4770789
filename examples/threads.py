"""Many threads share one model, as in a server: their requests run as one batch, and each gets what it would get alone."""

from concurrent.futures import ThreadPoolExecutor

import llmkit

llm = llmkit.load(llmkit.embedded_model())
requests = [f"Tell me a story about a {who} and a {what}." for who in ("cat", "dog", "bird") for what in ("hat", "boat")]


def tell(seed: int) -> str:
    return llm.chat(requests[seed], seed=seed, max_tokens=60).text


with ThreadPoolExecutor(len(requests)) as pool:
    together = list(pool.map(tell, range(len(requests))))
alone = [tell(seed) for seed in range(len(requests))]

for request, story in zip(requests, together, strict=True):
    print(f"{request} {story[:70]} ...")
print(f"The same as alone, to the letter: {together == alone}")
