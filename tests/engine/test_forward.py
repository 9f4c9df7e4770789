"""Teacher-forced passes: the logits of every position are those of the text alone, however it is cut into steps."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.engine.forward import forward_all
from llmkit.engine.sampling import log_softmax
from tests.engine.fake import FakeBackend, tiny_config

TEXTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [22, 0, 21, 1, 20], list(range(20))]


def logits(backend: FakeBackend, **options: object) -> dict[tuple[int, int], np.ndarray]:
    found = {}
    for owners, positions, results in forward_all(backend, TEXTS, **options):  # type: ignore[arg-type]
        assert len(owners) == len(positions) == len(results)
        for owner, position, row in zip(owners.tolist(), positions.tolist(), results, strict=True):
            assert (owner, position) not in found
            found[owner, position] = row
    return found


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("windows", [(None,), (None, 5)])
@pytest.mark.parametrize("step_tokens", [1, 3, 7, 500, [2, 1, 5]])
def test_every_cut_gives_the_same(windows: tuple[int | None, ...], step_tokens: int | list[int], stateful: bool) -> None:
    backend = FakeBackend(tiny_config(windows), stateful=stateful)
    adapters = [None, "a", None, "b"]
    found = logits(backend, step_tokens=step_tokens, adapters=adapters)
    assert set(found) == {(owner, position) for owner, text in enumerate(TEXTS) for position in range(len(text))}
    for owner, text in enumerate(TEXTS):
        alone = FakeBackend(tiny_config(windows), stateful=stateful)
        ((_, _, rows),) = forward_all(alone, [text], adapters=[adapters[owner]])
        assert [row.tolist() for row in rows] == [found[owner, position].tolist() for position in range(len(text))]


def test_what_follows_the_last_wanted_position_is_not_computed() -> None:
    backend = FakeBackend(tiny_config())
    every = logits(backend)
    backend.computed = 0
    found = logits(backend, wanted=[[1, 3], [], [4], [0]], step_tokens=2)
    assert {place: row.tolist() for place, row in found.items()} == {
        place: every[place].tolist() for place in [(0, 1), (0, 3), (2, 4), (3, 0)]
    }
    assert backend.computed == 4 + 0 + 5 + 1
    assert not list(forward_all(backend, [[5]], wanted=[[]]))


def test_log_softmax_sums_to_one_and_takes_any_scale() -> None:
    rows = np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32)
    found = log_softmax(rows)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1)
    np.testing.assert_allclose(found[1], -np.log(3))
