"""Documents, labels, the held-out split and packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.kernels.training_ops import training_kernels
from llmkit.lora.fused import training_ops
from llmkit.model.layers import PLAIN
from llmkit.model.transformer import Transformer
from llmkit.text.chat import encode_prompt
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.data import packing as module
from llmkit.training.data.documents import read_documents
from llmkit.training.data.formats import Document, parse_row
from llmkit.training.data.packing import IGNORE, RowStream, make_batch, pack, rows_of, sequential_batches
from llmkit.training.data.sources import Corpus, load_corpora
from llmkit.training.data.tokenize import encode_document
from llmkit.training.data.vocabulary import train_tokenizer
from llmkit.training.objective import cross_entropy, token_losses
from llmkit.training.recipe import Source, TokenizerRecipe

from .conftest import stories

SOURCE = Source("")


def corpus_of(lengths: list[int], divisible: bool = True) -> Corpus:
    """Documents with the tokens 1, 2, 3, ... all of them different."""
    total = sum(lengths)
    return Corpus(
        np.arange(1, total + 1, dtype=np.int32),
        np.ones(total, bool),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.zeros(len(lengths), np.int64),
        np.full(len(lengths), divisible),
        np.array(lengths, np.int64),
        [f"d{n}" for n in range(len(lengths))],
    )


def write_rows(path: Path, rows: list[dict[str, object]]) -> Source:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return Source(path=str(path))


# -- the tokenizer ---------------------------------------------------------------------------------------------------


def test_tokenizer_keeps_every_text(tokenizer: Tokenizer) -> None:
    for text in ["The cat", " 2 dogs\n\n\tÄ 日本 🦊\x00 <|user|>", "".join(map(chr, range(1, 300)))]:
        assert tokenizer.decode(tokenizer.encode(text, bos=False), skip_special=False) == text


def test_tokenizer_is_deterministic_and_splits_digits(tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path) -> None:
    recipe = TokenizerRecipe(vocab_size=300, special_tokens=("<|end|>", "<|user|>", "<|assistant|>"), bos="<|end|>", eos="<|end|>")
    train_tokenizer(recipe, stories(120), tmp_path, 64)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    ids = tokenizer.encode("12 trees", bos=False)
    assert tokenizer.decode(ids[:1]) == "1"
    assert tokenizer.decode(ids[1:2]) == "2"
    assert tokenizer.encode("cat")[0] == tokenizer.bos_id == 0


# -- documents and labels --------------------------------------------------------------------------------------------


def test_text_learns_everything_and_the_end(tokenizer: Tokenizer) -> None:
    ((ids, learned),) = encode_document(Document("here", text="The cat."), tokenizer, SOURCE)
    assert ids == [0, *tokenizer.encode("The cat.", bos=False), 0]
    assert all(learned)


def test_chat_learns_the_assistant_and_its_end(tokenizer: Tokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "The cat."}]}
    ((ids, learned),) = encode_document(parse_row(json.dumps(row), "here"), tokenizer, SOURCE)
    prompt = encode_prompt(tokenizer, row["messages"][:1])
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [*tokenizer.encode("The cat.", bos=False), 0]
    assert learned == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert encode_document(parse_row(json.dumps(row), "here"), tokenizer, Source("", learn="all")) == [(ids, [True] * len(ids))]


def test_prompt_and_completion_with_and_without_template(tokenizer: Tokenizer) -> None:
    document = Document("here", prompt="The cat ", completion="saw.")
    as_chat = Document("here", messages=({"role": "user", "content": "The cat "}, {"role": "assistant", "content": "saw."}))
    assert encode_document(document, tokenizer, SOURCE) == encode_document(as_chat, tokenizer, SOURCE)
    ((ids, learned),) = encode_document(document, tokenizer, Source("", chat=False))
    prompt, completion = tokenizer.encode("The cat "), tokenizer.encode("saw.", bos=False)
    assert ids == prompt + completion + [0]
    assert learned == [False] * len(prompt) + [True] * (len(completion) + 1)


def test_chat_without_template_is_refused(tmp_path: Path) -> None:
    train_tokenizer(TokenizerRecipe(vocab_size=280), stories(20), tmp_path, 64)
    with pytest.raises(UsageError, match="no chat template"):
        encode_document(parse_row('{"messages": [{"role": "user", "content": "a"}]}', "here"), load_tokenizer(tmp_path), SOURCE)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (r'{"text": "\ud800"}', "not JSON"),
        ("[1]", "JSON list"),
        ('{"texts": "a"}', "has the keys texts"),
        ('{"messages": []}', "messages is empty"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(UsageError, match=said) as caught:
        list(read_documents(Source(path=str(path))))
    assert "rows.jsonl:2" in str(caught.value)


def test_sources_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    for name, said in (("none.txt", "does not exist"), ("latin.txt", "not UTF-8"), ("empty", "has no .txt")):
        with pytest.raises(UsageError, match=said):
            list(read_documents(Source(path=str(tmp_path / name))))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "fine"}'), ("a.txt", "fine")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [document.text for document in read_documents(Source(path=str(tmp_path / name)))] == ["fine"]


# -- the held-out split ----------------------------------------------------------------------------------------------


def test_held_out_split_is_stable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"Story number {n}." for n in range(1000)]
    held = {text for text in texts if Document("", text=text).is_held_out(0.1)}
    assert 70 <= len(held) <= 130
    assert held <= {text for text in texts if Document("", text=text).is_held_out(0.2)}  # a larger share only adds
    assert Document("", text="Story number 13.").is_held_out(0.5) == Document("other place", text="  STORY number\n13. ").is_held_out(0.5)
    # The same story lies on one side in every form, wherever it stands in the file.
    forms = [{"text": text} for text in texts] + [
        {"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": t}]} for t in texts
    ]
    train, out, _ = load_corpora([write_rows(tmp_path / "a.jsonl", forms[::-1])], tokenizer, 0.1)
    assert len(out) == 2 * len(held)
    assert len(train) == 2 * (1000 - len(held))


def test_a_source_may_be_evaluation_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"text": t} for t in stories(20)])
    two = Source(path=one.path, held_out=1.0)
    train, out, _ = load_corpora([Source(path=one.path, held_out=0.0), two], tokenizer, 0.5)
    assert set(train.sources.tolist()) == {0}
    assert set(out.sources.tolist()) == {1}
    with pytest.raises(UsageError, match="no document to learn from"):
        load_corpora([two], tokenizer, 0.5)


# -- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=80))
def test_pack_puts_every_piece_in_one_row_and_wastes_little(lengths: list[int]) -> None:
    rows = pack(np.array(lengths), 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 32
    assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / 32) + len([n for n in lengths if n > 10]) + 1
    assert sum(f <= 16 for f in filled) <= 1  # two rows that are half empty would have been one


def test_every_target_is_learned_once_per_epoch() -> None:
    corpus = corpus_of([5, 70, 2, 33, 9])
    stream = RowStream(corpus, [1.0], 16, seed=3, epochs=1)
    pairs = []
    while (batch := stream.next_batch(2)) is not None:
        learned = batch.labels != IGNORE
        pairs += list(zip(batch.tokens[learned].tolist(), batch.labels[learned].tolist(), strict=True))
        assert batch.tokens.numel() <= 2 * 16
        assert int(batch.positions.max()) < 16
    ends = {5, 75, 77, 110, 119}
    assert sorted(pairs) == [(t, t + 1) for t in range(1, 119) if t not in ends]
    assert corpus.target_count == len(pairs)


def test_no_slot_is_unused() -> None:
    """Rows of one length stay rows; others follow each other in one."""
    (full,) = sequential_batches(corpus_of([17, 17]), 16, 4)
    assert full.tokens.shape == (2, 16)
    (rest,) = sequential_batches(corpus_of([17, 13, 4, 9]), 16, 4)
    assert rest.tokens.shape == (1, 16 + 12 + 3 + 8)
    assert sorted(rest.packed.ids.unique().tolist()) == [0, 1, 2, 3]
    assert (rest.labels != IGNORE).all()


def test_chats_are_cut_not_continued() -> None:
    batches = list(sequential_batches(corpus_of([40, 5], divisible=False), 16, 4))
    learned = sum(b.num_supervised for b in batches)
    assert learned == 16 + 4


def test_weights_say_how_often() -> None:
    corpus = corpus_of([3] * 400)
    corpus.sources[200:] = 1
    stream = RowStream(corpus, [2.0, 0.5], 8, seed=0, epochs=1)
    seen = np.zeros(400, int)
    while (batch := stream.next_batch(16)) is not None:
        firsts = batch.tokens[batch.positions == 0]
        for token in firsts[firsts % 3 == 1].tolist():
            seen[(token - 1) // 3] += 1
    assert (seen[:200] == 2).all()
    assert 70 <= seen[200:].sum() <= 130
    assert seen[200:].max() == 1
    with pytest.raises(UsageError, match="weight 0"):
        RowStream(corpus, [0.0, 0.0], 8, seed=0)


def test_stream_continues_from_its_place() -> None:
    corpus = corpus_of([7, 9, 30, 4, 12, 2] * 5)
    one, two = (RowStream(corpus, [1.0], 16, seed=1) for _ in range(2))
    for _ in range(23):
        one.next_batch(3)
    two.seek(one.epoch, one.row)
    assert one.epoch >= 1
    for _ in range(9):
        a, b = one.next_batch(3), two.next_batch(3)
        assert a is not None
        assert b is not None
        assert torch.equal(a.tokens, b.tokens)
        assert a.documents == b.documents


def test_packed_documents_equal_separate_ones(tokenizer: Tokenizer, make_model: Callable[..., Transformer], tmp_path: Path) -> None:
    """Loss and gradients of packed rows are those of every document on its own: nothing leaks."""
    train, *_ = load_corpora([write_rows(tmp_path / "a.jsonl", [{"text": t} for t in stories(12)])], tokenizer, 0.0)
    packed, separate = make_model(), make_model()
    batches = list(sequential_batches(train, 64, 3))
    assert max(int(b.packed.ids.max()) for b in batches) >= 2
    total = sum(cross_entropy(packed, batch) for batch in batches)
    alone = sum(
        cross_entropy(separate, batch) for n in range(len(train)) for batch in sequential_batches(train.select(np.array([n])), 64, 1)
    )
    total.backward()
    alone.backward()
    assert torch.allclose(total, alone, rtol=1e-5)
    for a, b in zip(packed.parameters(), separate.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()))


# -- beginnings in common --------------------------------------------------------------------------------------------


def chats_of(texts: list[tuple[list[int], int]]) -> Corpus:
    """Documents of these tokens, of which so many at the beginning are not learned."""
    corpus = corpus_of([len(tokens) for tokens, _ in texts], divisible=False)
    corpus.tokens[:] = np.concatenate([tokens for tokens, _ in texts])
    corpus.learned[:] = np.concatenate([np.arange(len(tokens)) >= prompt for tokens, prompt in texts])
    return corpus


@st.composite
def _texts(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    heads = draw(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=12), min_size=1, max_size=3))
    texts = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = [t for i in draw(st.lists(st.integers(0, len(heads) - 1), max_size=3)) for t in heads[i]]
        tokens += draw(st.lists(st.integers(3, 5), min_size=2, max_size=5))
        texts.append((tokens, draw(st.integers(0, len(tokens)))))
    return texts


@settings(max_examples=200, deadline=None)
@given(_texts(), st.integers(8, 40), st.integers(1, 5))
def test_a_batch_holds_its_documents(texts: list[tuple[list[int], int]], length: int, shortest: int) -> None:
    """Along its parents, every piece has its tokens, labels and positions; what is shared is not learned."""
    corpus = chats_of(texts)
    rows = rows_of(corpus, range(len(corpus)), length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHORTEST", shortest)
        batch = make_batch(corpus, rows)
    ids, parents = batch.packed.ids, batch.packed.parents
    slots = {id_: (ids.flatten() == id_).nonzero().flatten() for id_ in ids.unique().tolist()}
    pieces = np.concatenate(rows)
    for piece, (document, start, count) in enumerate(pieces.tolist()):
        chain, id_ = slots[piece], piece
        while id_ in parents:
            id_ = parents[id_]
            assert (batch.labels.flatten()[slots[id_]] == IGNORE).all()
            assert len(slots[id_]) >= shortest
            assert int(slots[id_][-1]) < int(chain[0])
            chain = torch.cat((slots[id_], chain))
        at = int(corpus.offsets[document]) + start
        assert batch.tokens.flatten()[chain].tolist() == corpus.tokens[at : at + count].tolist()
        assert batch.positions.flatten()[chain].tolist() == list(range(count))
        labels = np.where(corpus.learned[at + 1 : at + 1 + count], corpus.tokens[at + 1 : at + 1 + count], IGNORE)
        assert batch.labels.flatten()[chain].tolist() == labels.tolist()
    assert batch.tokens.numel() == sum(map(len, slots.values())) <= int(pieces[:, 2].sum())
    assert set(slots) == set(range(len(pieces))) | set(parents.values())


SYSTEM = list(range(3, 15))
CHATS = [
    ([*SYSTEM, 20, 21, 22, 23, 24, 30, 31], 17),
    ([40, 41, 42], 1),
    ([*SYSTEM, 20, 21, 22, 23, 24, 32, 33, 34], 18),
    ([*SYSTEM, 50, 51, 52, 53], 14),
    ([*SYSTEM, 50, 51, 52, 53], 14),
]


@pytest.mark.parametrize("fast", [False, True])
def test_a_common_beginning_is_computed_once(fast: bool, make_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients are those of the chats apart, in fewer slots."""
    if fast and training_kernels() is None:
        pytest.skip("the native kernels do not run here")
    corpus = chats_of(CHATS)
    found = []
    for shortest in (4, 1000):
        monkeypatch.setattr(module, "SHORTEST", shortest)
        (batch,) = sequential_batches(corpus, 64, 4)
        model = make_model()
        losses, places = token_losses(model, batch, training_ops(torch.device("cpu"), adapters=False) if fast else PLAIN)
        losses.sum().backward()
        order = batch.packed.ids.flatten()[places].argsort(stable=True)
        found.append((batch.tokens.numel(), losses.detach()[order], [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0] - 3 * len(SYSTEM) - 4  # the slot before the first target is a chat's own
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)
