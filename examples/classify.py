"""Choose among given answers without generating: the one that the model finds most likely, token for token."""

import llmkit

llm = llmkit.load(llmkit.embedded_model())


def most_likely(beginning: str, endings: list[str]) -> str:
    """The ending with the highest mean log-probability after a beginning."""
    start = len(llm.tokenizer.encode(beginning)) - 1  # log-probabilities begin with the second token

    def mean(ending: str) -> float:
        logprobs = llm.score(beginning + ending).token_logprobs[start:]
        return sum(logprobs) / len(logprobs)

    return max(endings, key=mean)


for beginning, endings in (
    ("The little girl was sad because she", [" lost her toy.", " ate the moon.", " was very happy."]),
    ("The dog saw the ball and", [" ran to get it.", " wrote a letter.", " was a red car."]),
    ("At night, Tom went to", [" bed.", " ball.", " eat a tree."]),
):
    print(f"{beginning} ->{most_likely(beginning, endings)}")
