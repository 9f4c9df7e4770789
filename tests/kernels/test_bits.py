"""The native step gives the same bits as it always has: logits of every dense family, stored as hashes.

The weights are whole numbers drawn by numpy and divided by a power of two, the codes of quantized matrices are drawn as they are, so
the inputs are the same on every machine; the kernels promise the rest. After a change that is meant to alter bits, write them again:
`python -m tests.kernels.test_bits`, and say so in the commit.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from llmkit.config import ModelConfig
from llmkit.engine.backend import StepBatch
from llmkit.kernels import NativeBackend, native_problem
from llmkit.kernels.format import Weight, pack
from llmkit.quant.schemes import choose
from tests.families.tiny import VARIANTS, hf_config, our_config

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no native kernels: {native_problem()}")

STORED = Path(__file__).with_name("bits.json")
DENSE = [name for name in VARIANTS if "moe" not in name and "mixtral" not in name]
FORMATS = ("float32", "q4", "q8")
PREFILL, TOKENS = 33, 40  # a prompt in one step, then token by token: beyond the tiny models' windows and block boundaries


def random_weights(config: ModelConfig, scheme: str, seed: int) -> dict[str, Weight]:
    """Parameters by our names, exact numbers: multiples of 1/256 below 1/2, norms around 1."""
    numbers = np.random.Generator(np.random.PCG64(seed))
    out: dict[str, Weight] = {}
    for name, param in config.parameters.items():
        shape, choice = param.shape, None if scheme == "float32" else choose(scheme, param)
        if choice is None:
            array = numbers.integers(-127, 128, shape).astype(np.float32) / 256
            out[name] = array + np.float32(1) if "norm" in name and name.endswith("weight") else array
        else:
            low, high = (0, 16) if choice.scheme == "q4" else (-127, 128)
            codes = numbers.integers(low, high, shape)
            scales = numbers.integers(1, 128, (shape[0], -(-shape[1] // choice.group)))
            row_scale = numbers.integers(1, 9, shape[0]).astype(np.float32) / 2**16
            out[name] = pack(codes, scales, row_scale, choice.scheme, choice.group)
    return out


def logits_hash(variant: str, scheme: str) -> str:
    """Of the float32 logits `[TOKENS, vocab]` of a random prompt, in one step up to PREFILL and then one token a step."""
    config, seed = our_config(hf_config(variant)), crc32(f"{variant} {scheme}".encode())
    backend = NativeBackend(config, random_weights(config, scheme, seed), threads=1, kv_bits=16 if scheme == "q8" else 32)
    ids = np.random.Generator(np.random.PCG64(seed + 1)).integers(0, config.vocab_size, TOKENS).astype(np.int32)
    table = np.arange(-(-TOKENS // backend.block_size), dtype=np.int32)[None]
    tables, context, digest = [table] * len(backend.cache_windows), np.array([TOKENS], np.int32), blake2b(digest_size=12)
    for start, stop in [(0, PREFILL), *((at, at + 1) for at in range(PREFILL, TOKENS))]:
        positions = np.arange(start, stop, dtype=np.int32)
        rows = np.arange(stop - start, dtype=np.int32)
        logits = backend.step(StepBatch(ids[start:stop], positions, np.zeros_like(rows), tables, context, [None], rows))
        assert np.isfinite(logits).all()
        digest.update(np.ascontiguousarray(logits, "<f4").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("variant", DENSE)
def test_logits_keep_their_bits(variant: str, scheme: str) -> None:
    assert logits_hash(variant, scheme) == json.loads(STORED.read_text())[f"{variant} {scheme}"]


if __name__ == "__main__":
    hashes = {f"{variant} {scheme}": logits_hash(variant, scheme) for variant in DENSE for scheme in FORMATS}
    STORED.write_text(json.dumps(hashes, indent=1) + "\n")
