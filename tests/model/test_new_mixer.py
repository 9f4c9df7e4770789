"""A mixer that llmkit does not have, described here once, goes through everything: one config class, one torch module, nothing else.

It is the gated short convolution of LFM2 (arXiv:2511.23404, 2.1): `out(c * conv(b * x))` with b, c and x of one linear. A sequence keeps
its last two inputs, which is no key and no value, so a prefix can only be gone on from where the engine kept a copy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkit
from llmkit import families
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.save import save_model
from llmkit.checkpoint.source import ModelSource
from llmkit.cli.main import run
from llmkit.config import ModelConfig, Param, PartConfig, State, linear
from llmkit.evaluate.verify import verify
from llmkit.families.common import Fields
from llmkit.kernels import native_problem
from llmkit.lora.inject import LoraSettings, adapted, inject
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, write_adapter
from llmkit.model.attention import PackedSequences
from llmkit.model.layers import ForwardContext, Linear
from llmkit.model.transformer import Transformer
from llmkit.planning.model_info import read_facts
from llmkit.quant.schemes import Choice, choose
from tests.tiny import write_model


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(PartConfig):
    """A gated causal convolution of each channel over its last `kernel` inputs."""

    name = "conv"
    module = "tests.model.test_new_mixer:ShortConv"

    kernel: int = 3

    def params(self, config: ModelConfig) -> Iterator[Param]:
        hidden = config.hidden_size
        yield from linear("in_proj", (3 * hidden, hidden), False, "hidden", "gates")
        yield Param("taps", (hidden, self.kernel), "conv")
        yield from linear("out_proj", (hidden, hidden), False, "gated", "residual")

    def state(self, config: ModelConfig) -> tuple[State, ...]:
        return (State("conv", (self.kernel - 1, config.hidden_size)),)


class ShortConv(nn.Module):
    def __init__(self, part: ShortConvConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, hidden = layer, config.hidden_size
        self.in_proj = Linear(hidden, 3 * hidden, bias=False)
        self.taps = nn.Parameter(torch.empty(hidden, part.kernel))
        self.out_proj = Linear(hidden, hidden, bias=False)

    def convolve(self, inputs: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """inputs `[batch, tokens, hidden]`, the state `[batch, kernel - 1, hidden]`: the inputs before them."""
        seen = torch.cat((states[0].to(inputs.dtype), inputs), 1)
        out = F.conv1d(seen.transpose(1, 2), self.taps.unsqueeze(1).to(inputs.dtype), groups=seen.shape[-1]).transpose(1, 2)
        return out, (seen[:, inputs.shape[1] :],)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        b, c, x = context.matmul(x, self.in_proj).chunk(3, -1)
        gated = c * context.caches.recur(self.layer, b * x, self.convolve)
        return context.matmul(context.select(gated), self.out_proj)


def config_of(hf: Mapping[str, Any]) -> ModelConfig:
    """A convolution in every layer but the second, which attends."""
    fields = Fields(hf, {})
    attention = fields.attention(rope=fields.rope())
    return fields.model([attention if i == 1 else ShortConvConfig() for i in range(fields.num_hidden_layers)], fields.mlp())


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that a family is."""
    monkeypatch.setitem(families.MODEL_TYPES, "toy", "toy")
    monkeypatch.setitem(sys.modules, "llmkit.families.toy", SimpleNamespace(FAMILY=families.Family(config_of)))


@pytest.fixture
def folder(family: None, tmp_path: Path) -> Path:
    return write_model(tmp_path / "toy", model_type="toy", num_hidden_layers=4, architectures=["ToyForCausalLM"])


IDS = np.random.default_rng(1).integers(5, 30, 90).tolist()
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "repetition_penalty": 1.0}


def greedy(model: Transformer, ids: list[int], count: int) -> list[int]:
    """What follows, every token from the whole text again."""
    text = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(ids) :]


def test_what_is_derived_from_its_description(folder: Path) -> None:
    config = load_config(folder)
    model = load_model(folder)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        name: param.shape for name, param in config.parameters.items()
    }
    assert config.cache_windows == (None,)
    assert [[state.kind for state in states] for states in config.states] == [["conv"], ["kv"], ["conv"], ["conv"]]
    assert native_problem(config) == "layers with ShortConvConfig are not part of the native step"
    params = {name.removeprefix("model.layers.0.conv."): param for name, param in config.parameters.items() if ".0.conv." in name}
    assert {name: choose("q4", param) for name, param in params.items()} == {
        "in_proj.weight": Choice("q4", 32),
        "taps": None,
        "out_proj.weight": Choice("q4", 16),  # it goes into the residual stream
    }


def test_load_and_save(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_model(model, tmp_path / "saved", source=folder)
    again = load_model(tmp_path / "saved")
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    quantized = quantize_folder(folder, tmp_path / "q4").folder
    assert llmkit.load(quantized, device="cpu").generate(IDS, **GREEDY).token_ids


def test_generate_with_a_prefix_cache(folder: Path) -> None:
    """A convolution's state after a prefix is kept, found and gone on from; every reply is that of the whole text computed anew."""
    model, llm = load_model(folder).eval(), llmkit.load(folder, device="cpu")
    expected = greedy(model, IDS, 12)
    first, second = llm.generate(IDS, **GREEDY), llm.generate(IDS, **GREEDY)
    assert list(first.token_ids) == list(second.token_ids) == expected
    assert (first.usage.cached_tokens, second.usage.cached_tokens > 0) == (0, True)
    other = IDS[: second.usage.cached_tokens] + IDS[:7]
    together = llm.generate([other, IDS[:20], IDS], **GREEDY)
    assert together[0].usage.cached_tokens > 0
    assert [list(reply.token_ids) for reply in together] == [greedy(model, ids, 12) for ids in (other, IDS[:20], IDS)]


def test_packed_texts_do_not_see_each_other(folder: Path) -> None:
    model = load_model(folder).eval()
    texts = [IDS[:30], IDS[30:50]]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    ids = torch.cat([torch.full((len(text),), i) for i, text in enumerate(texts)])[None]
    with torch.inference_mode():
        packed = model(torch.tensor([texts[0] + texts[1]]), positions, packed=PackedSequences(ids))[0]
        alone = torch.cat([model(torch.tensor([text]))[0] for text in texts])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_lora(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    inject(model, LoraSettings(r=2))
    trained = dict(adapted(model))
    assert {path.rpartition(".")[2] for path in trained if ".conv." in path} == {"in_proj", "out_proj"}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    batch, losses = torch.tensor([IDS[:40]]), []
    for _ in range(4):
        loss = F.cross_entropy(model(batch)[0, :-1], batch[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    terms = {path: one.factors for path, one in trained.items()}
    write_adapter(tmp_path / "adapter", AdapterWeights(terms), load_config(folder), AdapterSettings(r=2, lora_alpha=32))
    llm = llmkit.load(folder, adapter=tmp_path / "adapter", device="cpu")
    with torch.inference_mode():
        expected = model(torch.tensor([IDS]))[0].numpy()
    np.testing.assert_allclose(llm.logits(IDS, adapter="adapter"), expected, atol=1e-3)
    assert np.abs(llm.logits(IDS, adapter=None) - expected).max() > 1e-2


def test_plan_and_verify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = read_facts(ModelSource.open(folder))
    assert facts.parameters == sum(parameter.numel() for parameter in load_model(folder).parameters())
    assert run(["plan", str(folder), "--device", "cpu", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["KV_cache_bytes"] == 4096 * 2 * 2 * 8 * 4  # one layer attends: positions, keys and values, heads, dimensions
    assert planned["states_bytes"] >= 3 * 2 * 32 * 4
    (tmp_path / "data.txt").write_text("Once upon a time there was a dog. " * 50)
    recipe = {"model": str(folder), "data": [{"path": str(tmp_path / "data.txt")}], "lora": {"r": 2}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"output": str(tmp_path / "run"), "max_steps": 2}))
    assert run(["plan", str(tmp_path / "recipe.yaml"), "--device", "cpu", "--json"]) == 0
    checks = verify(folder, length=40, device="cpu")
    assert [check.ok for check in checks] == [None, None, True, True, True], checks  # transformers has no such model
