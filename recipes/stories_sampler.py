"""Samples many short stories from stories260K (MIT licence), the small teacher of the embedded model.

    python recipes/stories_sampler.py ../shared/data runs/stories-data/samples --megabytes 48

The teacher has 260,032 parameters, so one forward call costs almost nothing and Python's overhead is everything: hundreds of rows advance
in lock step, all at the same position, and rows that have ended are taken out of the batch. Lock step needs neither masks nor padding: an
opening (a given first sentence) is fed token by token in place of the sampled ones. Every batch is one shard, seeded by its number, so an
interrupted run continues where it stopped, and a shard does not depend on which process wrote it. Run one process per core (--worker 0
--workers 2, --worker 1 --workers 2); each writes about 10 kB of text a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from stories_text import opening, read_stories
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

MIN_P = 0.05  # tokens less likely than 5% of the likeliest one are never drawn: temperature 1 without the noise of so small a model
LONGEST = 512  # the teacher's context, in its tokens (about 2.1 bytes each)


class Teacher:
    """A Llama in thirty lines, for one token per row and one position for all rows (checked against transformers in the tests)."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.bos, self.eos = config["bos_token_id"], config["eos_token_id"]
        self.eps: float = config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["hidden_size"] // self.heads
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            w = {name.split(".", 3)[3].removesuffix(".weight"): t for name, t in weights.items() if name.startswith(f"model.layers.{i}.")}
            qkv = torch.cat([w["self_attn.q_proj"], w["self_attn.k_proj"], w["self_attn.v_proj"]])
            gate_up = torch.cat([w["mlp.gate_proj"], w["mlp.up_proj"]])
            parts = (w["input_layernorm"], qkv, w["self_attn.o_proj"], w["post_attention_layernorm"], gate_up, w["mlp.down_proj"])
            self.layers.append(parts)
        angles = torch.outer(torch.arange(LONGEST), config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2) / self.head_dim))
        self.cos, self.sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

    def empty_cache(self, rows: int) -> list[Tensor]:
        """Keys and values of each layer, `[2, rows, kv_heads, LONGEST, head_dim]`."""
        return [torch.empty(2, rows, self.kv_heads, LONGEST, self.head_dim) for _ in self.layers]

    def step(self, tokens: Tensor, position: int, cache: list[Tensor]) -> Tensor:
        """Logits `[rows, vocab]` after one more token per row (`[rows]`), whose keys and values enter the cache at `position`."""
        rows, dim, kv = len(tokens), self.head_dim, self.kv_heads
        x = self.embedding[tokens]
        cos, sin = self.cos[position], self.sin[position]
        for (attention_norm, qkv, out, mlp_norm, gate_up, down), (keys, values) in zip(self.layers, cache, strict=True):
            h = F.linear(F.rms_norm(x, (x.shape[-1],), attention_norm, self.eps), qkv).view(rows, -1, dim)
            qk, v = h[:, : self.heads + kv], h[:, self.heads + kv :]
            qk = qk * cos + torch.cat([-qk[..., dim // 2 :], qk[..., : dim // 2]], dim=-1) * sin
            keys[:, :, position], values[:, :, position] = qk[:, self.heads :], v
            q = qk[:, : self.heads].reshape(rows * kv, self.heads // kv, dim)  # query heads that share a key head are its two query rows
            # two plain products: for one position and heads of 8 the CPU's fused attention takes 1.3 times as long
            scores = torch.bmm(q, keys.flatten(0, 1)[:, : position + 1].mT) * dim**-0.5
            h = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)[:, : position + 1])
            x = x + F.linear(h.reshape(rows, -1), out)
            gate, up = F.linear(F.rms_norm(x, (x.shape[-1],), mlp_norm, self.eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, (x.shape[-1],), self.norm, self.eps), self.embedding)


def draw(logits: Tensor, min_p: float, generator: torch.Generator) -> Tensor:
    """One token per row (`[rows]`) at temperature 1 after min-p (Nguyen et al. 2024), by inverting the cumulative distribution."""
    odds = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    odds = torch.where(odds < min_p, 0.0, odds).cumsum(dim=-1)
    points = torch.rand(len(odds), 1, generator=generator) * odds[:, -1:]
    return torch.searchsorted(odds, points, right=True).squeeze(1).clamp_(max=odds.shape[1] - 1)


@torch.inference_mode()
def sample(teacher: Teacher, openings: Sequence[str], seed: int, min_p: float = MIN_P) -> list[str]:
    """One story per opening (which it contains; "" starts from nothing). Rows that do not end within the teacher's context are dropped."""
    generator = torch.Generator().manual_seed(seed)
    forced = [[teacher.bos, *teacher.tokenizer.encode(text, add_special_tokens=False).ids] for text in openings]
    width = max(map(len, forced))
    given = torch.tensor([ids + [-1] * (width - len(ids)) for ids in forced])
    written = torch.full((len(forced), LONGEST), teacher.eos)
    alive = torch.arange(len(forced))
    cache = teacher.empty_cache(len(forced))
    tokens = given[:, 0]
    for position in range(LONGEST - 1):
        tokens = draw(teacher.step(tokens, position, cache), min_p, generator)
        if position + 1 < width:
            tokens = torch.where(given[:, position + 1] >= 0, given[:, position + 1], tokens)
        written[alive, position + 1] = tokens
        running = (tokens != teacher.eos) & (tokens != teacher.bos)  # the teacher read stories back to back: BOS ends a story too
        if running.sum() < 0.85 * len(running):  # copying the cache costs about as much as one step
            keep = running.nonzero().squeeze(1)
            alive, tokens, given = alive[keep], tokens[keep], given[keep]
            cache = [c[:, keep] for c in cache]
        if not len(alive):
            break
    stories = []
    for row in written[:, 1:].tolist():
        end = next((i for i, token in enumerate(row) if token in (teacher.eos, teacher.bos)), None)
        if end is not None:
            stories.append(teacher.tokenizer.decode(row[:end]).strip())
    return stories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with models/stories260K-hf and text/tinystories_2MB.txt")
    parser.add_argument("output", type=Path, help="folder for the shards")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rows", type=int, default=256, help="stories per shard, sampled side by side")
    parser.add_argument("--worker", type=int, default=0, help="this process writes the shards worker, worker + workers, ...")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one process per core is faster than one batch over two cores
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(args.data / "models" / "stories260K-hf")
    training, _ = read_stories(args.data)
    began = time.monotonic()
    for shard in itertools.count(args.worker, args.workers):
        total = sum(path.stat().st_size for path in args.output.glob("*.jsonl")) / 1e6
        if total >= args.megabytes:
            break
        path = args.output / f"{shard:04}.jsonl"
        if not path.exists():
            rng = random.Random(shard)
            stories = sample(teacher, [opening(rng, training) for _ in range(args.rows)], seed=shard)
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories), encoding="utf-8")
            part.rename(path)
            print(f"shard {shard} after {time.monotonic() - began:.0f} s, {total:.1f} MB before it", flush=True)


if __name__ == "__main__":
    main()
