"""transformers in a benchmark of decoding: a forward pass for the prompt, `generate` for decoding."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class TransformersDecoding:
    """See `llmkit.bench.worker.DecodingModel`."""

    def __init__(self, folder: str, dtype: str | None, device: str | None, threads: int | None) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device or "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").to(self.device).eval()
        # Nothing of the checkpoint's sampling, and no end of text.
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self.vocab_size = self.model.config.vocab_size

    def prefill(self, ids: list[int], room: int, variant: str) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            logits = self.model(torch.tensor([ids], device=self.device), use_cache=True, logits_to_keep=1).logits
            int(logits.argmax())
            return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], count: int, room: int, variant: str) -> float:
        times: list[float] = []

        def clock(tokens: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        ids = torch.tensor(prompts, device=self.device)
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count + 1, stopping_criteria=[clock], do_sample=False
            )
        assert len(times) == count + 1
        return times[-1] - times[0]

    def report(self) -> dict[str, Any]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        flags = f"{dtype} on {self.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        return {"variants": [""], "version": transformers.__version__, "dtype": dtype, "flags": flags}
