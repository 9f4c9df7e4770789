"""What must never end the interpreter: wrong numbers, arrays, threads and signals at the door of the C++."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmkit
from llmkit.checkpoint.load import load_model
from llmkit.errors import LLMKitError
from llmkit.kernels import NativeBackend, native_problem
from llmkit.kernels.format import QuantizedMatrix, Weight
from llmkit.kernels.plan import Description
from llmkit.model.transformer import Transformer
from tests.families.tiny import tiny_folder
from tests.kernels.test_native import Row, kernels, logits, quantized_weights, random_ids, step, weights_of

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no native kernels: {native_problem()}")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks")

REFUSED = (ValueError, TypeError, IndexError, OverflowError, BufferError)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return load_model(tiny_folder(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    sizes = {"hidden_size": 240, "intermediate_size": 2048, "num_hidden_layers": 24}
    return load_model(tiny_folder(tmp_path_factory.mktemp("slow"), "llama", **sizes))


# -- the plan ----------------------------------------------------------------------------------------------------------

HUGE = 2**31
NOTHING = np.zeros(0, np.float32)
Q = "self_attn.q_proj"


def linear(change: dict[int, Any]) -> Callable[[tuple], tuple]:
    return lambda old: tuple(change.get(i, value) for i, value in enumerate(old))


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("model", "num_heads", 0),
        ("model", "num_kv_heads", 3),
        ("model", "head_dim", 2**62),
        ("model", "vocab_size", 2**63),
        ("model", "hidden_size", 2.5),
        ("model", "hidden_size", None),
        ("model", "norm_eps", "small"),
        ("model", "activation", 9),
        ("model", "activation", 2**32),
        ("model", "cache", 2),
        ("model", "windows", (-5,)),
        ("model", "windows", None),
        ("model", "windows", [0]),
        ("model", "final_norm", None),
        ("model", "final_norm", (np.zeros(3, np.float32), None)),
        ("model", "final_norm", 7),
        ("model", "embedding", None),
        ("model", "embedding", (0, HUGE, HUGE, NOTHING, None, None, None, 32, None)),  # 2^64 bytes are not 0 bytes
        ("model", "positions_table", np.zeros(7, np.float32)),
        ("layer", "rope", 2**32),
        ("layer", "group", 1),
        ("layer", "group", 2**32),
        ("layer", "window", 5),
        ("layer", "attention_scale", None),
        ("linears", "self_attn.k_proj", None),
        ("linears", "self_attn.q_proj", ()),
        ("linears", "self_attn.q_proj", linear({0: 9})),
        ("linears", "self_attn.q_proj", linear({0: -1})),
        ("linears", "self_attn.q_proj", linear({1: 0})),
        ("linears", "self_attn.q_proj", linear({2: HUGE + 1})),
        ("linears", "self_attn.q_proj", linear({3: None})),
        ("linears", "self_attn.q_proj", linear({3: NOTHING})),
        ("linears", "self_attn.q_proj", linear({7: 2**32 + 32})),
        ("linears", "self_attn.q_proj", lambda old: linear({3: np.asfortranarray(old[3])})(old)),
        ("linears", "self_attn.q_proj", lambda old: linear({3: np.repeat(old[3], 2, 1)[:, ::2]})(old)),
        ("linears", "self_attn.q_proj", lambda old: linear({3: old[3].astype(np.float64)})(old)),
        ("linears", "self_attn.o_proj", linear({6: np.zeros(3, np.float32)})),
        ("linears", "self_attn.w_proj", None),
        ("linears", 5, None),
        ("norms", "before_feed_forward", (np.zeros(3, np.float32), None)),
        ("norms", "input_layernorm", None),
        ("layer", "linears", None),
        ("layer", "norms", []),
    ],
)
def test_a_plan_of_wrong_parts_is_refused(llama: Transformer, where: str, name: str, value: Any) -> None:
    from llmkit.kernels.cpu import _native

    description = Description(llama.config, weights_of(llama))
    model, layers = description.model(0), [description.layer(i) for i in range(llama.config.num_hidden_layers)]
    _native.Plan(None, 1, model, layers)
    part = {"model": model, "layer": layers[-1], "linears": layers[-1]["linears"], "norms": layers[-1]["norms"]}[where]
    part[name] = value(part[name]) if callable(value) else value
    with pytest.raises(REFUSED):
        _native.Plan(None, 1, model, layers)


def test_a_plan_of_no_parts_is_refused(llama: Transformer) -> None:
    from llmkit.kernels.cpu import _native

    parts: list[Any] = [
        (None, 1, {}, []),
        (None, 1, {}, [None]),
        ("mmx", 1, {}, []),
        (None, 2**40, {}, []),
        (None, -1, {}, []),
        (1, 2, 3, 4),
        (),
    ]
    for part in parts:
        with pytest.raises(REFUSED):
            _native.Plan(*part)


@pytest.mark.parametrize("part", ["codes", "scales", "row_scale"])
def test_short_quantized_arrays_are_refused(llama: Transformer, part: str) -> None:
    weights = weights_of(llama) | quantized_weights(llama)
    head = weights["lm_head.weight"]
    assert isinstance(head, QuantizedMatrix)
    object.__setattr__(head, part, getattr(head, part)[:-1])  # past the checks of Python
    with pytest.raises(LLMKitError, match="head has"):
        NativeBackend(llama.config, weights)


def test_weights_at_odd_addresses_are_copied(llama: Transformer) -> None:
    def odd(array: np.ndarray) -> np.ndarray:
        raw = np.zeros(array.nbytes + 1, np.uint8)
        raw[1:] = np.frombuffer(array.tobytes(), np.uint8)
        return raw[1:].view(array.dtype).reshape(array.shape)

    weights, ids = weights_of(llama) | quantized_weights(llama), random_ids(llama, 9)
    moved: dict[str, Weight] = {
        name: odd(weight) if isinstance(weight, np.ndarray) else replace(weight, row_scale=odd(weight.row_scale))
        for name, weight in weights.items()
    }
    np.testing.assert_array_equal(logits(NativeBackend(llama.config, moved), ids), logits(NativeBackend(llama.config, weights), ids))


@pytest.mark.parametrize("name", kernels() if native_problem() is None else [])
def test_every_matrix_has_its_own_codebook(llama: Transformer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, ids = weights_of(llama), random_ids(llama, 9)
    expected = []
    for index, (key, matrix) in enumerate(quantized_weights(llama).items()):
        assert isinstance(matrix, QuantizedMatrix)
        weights[key] = replace(matrix, codebook=np.arange(16, dtype=np.uint8) * 8 - (index % 3 if index else 0) + 2)
        expected.append(weights[key])
    monkeypatch.setenv("LLMKIT_KERNELS", name)
    dense = {key: weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight for key, weight in weights.items()}
    found, near = logits(NativeBackend(llama.config, weights), ids), logits(NativeBackend(llama.config, dense), ids)
    assert np.abs(found - near).max() < 0.1 * np.abs(near).max()  # activations of 8 bits


# -- the step ----------------------------------------------------------------------------------------------------------


def arguments(ids: list[int]) -> dict[str, Any]:
    count = len(ids)
    return {
        "tokens": np.array(ids, np.int32),
        "positions": np.arange(count, dtype=np.int32),
        "sequences": np.zeros(count, np.int32),
        "table": np.arange(4, dtype=np.int32),
        "table_rows": 1,
        "frequencies": None,  # the model's
        "frequency_sets": 1,
        "set_of": np.zeros(1, np.int32),
        "adapters": None,
        "rows": np.arange(count, dtype=np.int32),
        "hidden": False,
        "out": None,  # of the right size
    }


ARRAYS = st.one_of(
    st.none(),
    st.sampled_from([b"", b"abc", "text", 7, 2.5, [1, 2], (), np.zeros((0, 3), np.int32), np.zeros(5, np.float64), np.zeros(3, np.int64)]),
    st.lists(st.sampled_from([0, 1, 2, 3, -1, 63, 2**31 - 1, -(2**31), 2**28]), max_size=8).map(lambda x: np.array(x, np.int32)),
    st.lists(st.sampled_from([0, 1, 2, 3]), min_size=3, max_size=3).map(lambda x: np.repeat(np.array(x, np.int32), 2)[::2]),
    st.lists(st.floats(width=32), max_size=9).map(lambda x: np.array(x, np.float32)),
)
NUMBERS = st.sampled_from([0, 1, 2, -1, 2**31, 2**62, 2**70, None, 1.5, "1"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(["tokens", "positions", "sequences", "table", "frequencies", "set_of", "adapters", "rows", "out"]),
        ARRAYS,
        max_size=2,
    ),
    counts=st.dictionaries(st.sampled_from(["table_rows", "frequency_sets"]), NUMBERS, max_size=1),
    hidden=st.booleans(),
)
def test_steps_of_any_arguments(llama: Transformer, changes: dict[str, Any], counts: dict[str, Any], hidden: bool) -> None:
    """Refused, or computed; and then the plan still gives the bits it gave before."""
    weights = weights_of(llama)
    backend = NativeBackend(llama.config, weights, threads=2)
    plan, frequencies = backend.plan, backend._rotary(np.array([3], np.int32))[0][0]

    def call(given: dict[str, Any]) -> np.ndarray:
        width = llama.config.hidden_size if given["hidden"] else llama.config.vocab_size
        out = np.zeros((3, width), np.float32) if given["out"] is None else given["out"]
        rope = (frequencies if given["frequencies"] is None else given["frequencies"], given["frequency_sets"], given["set_of"])
        tables = [(given["table"], given["table_rows"])]
        plan.step(
            given["tokens"], given["positions"], given["sequences"], tables, [rope], given["adapters"], given["rows"], given["hidden"], out
        )  # fmt: skip
        return out

    good = arguments([1, 2, 3])
    before = call(good)
    try:
        call({**good, "hidden": hidden, **changes, **counts})
    except (*REFUSED, MemoryError):
        pass
    np.testing.assert_array_equal(call(good), before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("kv_bits", [32, 16, 8])
@pytest.mark.parametrize("name", kernels() if native_problem() is None else [])
def test_what_is_no_number_stays_in_its_row(
    llama: Transformer, bad: float, kv_bits: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_KERNELS", name)
    for weights in (weights_of(llama), weights_of(llama) | quantized_weights(llama)):
        embedding = weights["model.embed_tokens.weight"]
        array = (embedding if isinstance(embedding, np.ndarray) else embedding.dequantize()).copy()
        array[5] = bad
        backend = NativeBackend(llama.config, {**weights, "model.embed_tokens.weight": array}, threads=2, kv_bits=kv_bits)
        ids = np.arange(6, 26)
        good = logits(backend, ids)
        assert np.isfinite(good).all()
        found, spoilt = step(backend, [Row(ids, 10), Row(np.full(20, 5), 20)], [20, 20])
        np.testing.assert_array_equal(found, good)
        if not np.isfinite(bad):
            assert np.isnan(spoilt).any(1).all()


def test_adapters_of_wrong_parts_are_refused(llama: Transformer) -> None:
    backend = NativeBackend(llama.config, weights_of(llama))
    a, b = np.zeros((2, llama.config.hidden_size), np.float32), np.zeros((llama.config.hidden_size, 2), np.float32)
    parts: list[Any] = [
        None, [None], [(0,)], [(10**6, Q, 2, a, b)], [(-1, Q, 2, a, b)], [(0, Q, 0, a, b)], [(0, Q, 2**40, a, b)], [(0, Q, 3, a, b)],
        [(0, Q, 2, a, None)], [(0, Q, 2, a[:, ::2], b)], [(0, Q, 2, a.T, b)], [(0, Q, 2, b"123", b)], [("0", Q, 2, a, b)],
        [(0, "self_attn.w_proj", 2, a, b)], [(0, b"q", 2, a, b)], [(0, "\ud800", 2, a, b)], [(0, None, 2, a, b)],
    ]  # fmt: skip
    for part in parts:
        with pytest.raises(REFUSED):
            backend.plan.add_adapter(part)
    assert len(logits(backend, random_ids(llama, 3))) == 3


# -- threads, forks, signals -------------------------------------------------------------------------------------------


def test_one_plan_in_many_threads(llama: Transformer) -> None:
    """Steps wait for each other, and adapters may come meanwhile."""
    backend, ids = NativeBackend(llama.config, weights_of(llama), threads=2), random_ids(llama, 40)
    expected = logits(backend, ids)
    found: list[np.ndarray] = []

    def work(first_block: int) -> None:
        for _ in range(20):
            found.append(logits(backend, ids, [30, 1, 9], first_block))

    workers = [threading.Thread(target=work, args=(10 * (i + 1),)) for i in range(3)]
    for worker in workers:
        worker.start()
    size = llama.config.hidden_size
    for index in range(100):
        backend.add_adapter(
            str(index), {"model.layers.0.self_attn.o_proj": (np.ones((1, size), np.float32), np.ones((size, 1), np.float32))}
        )
    for worker in workers:
        worker.join(120)
    assert len(found) == 60
    for each in found:
        np.testing.assert_array_equal(each, expected)


def _after_fork(backend: NativeBackend, model: Transformer, ids: np.ndarray, queue: multiprocessing.Queue) -> None:
    try:
        logits(backend, ids)
    except LLMKitError as error:
        queue.put(str(error))
    del backend
    queue.put(logits(NativeBackend(model.config, weights_of(model), threads=2), ids))


@needs_fork
def test_a_fork_in_the_middle_of_a_step(slow_model: Transformer) -> None:
    weights = weights_of(slow_model)
    backend, ids = NativeBackend(slow_model.config, weights, threads=2), random_ids(slow_model, 5)
    expected = logits(NativeBackend(slow_model.config, weights, threads=2), ids)
    long = random_ids(slow_model, 3000)
    computed: list[np.ndarray] = []
    worker = threading.Thread(target=lambda: computed.append(logits(backend, long)))
    worker.start()
    time.sleep(0.2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_after_fork, args=(backend, slow_model, ids, queue))
    child.start()
    assert worker.is_alive()
    assert "forked while this model computed. Load it again" in queue.get(timeout=60)
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join(60)
    assert child.exitcode == 0
    worker.join(120)
    np.testing.assert_array_equal(computed[0][:5], logits(backend, long[:5]))


def _asks(llm: llmkit.LLM, queue: multiprocessing.Queue) -> None:
    try:
        llm.generate([5, 6], max_tokens=2)
    except LLMKitError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


@needs_fork
def test_a_fork_while_another_thread_holds_the_engine(tiny_model_dir: Path) -> None:
    """The child would wait for a thread that stayed behind."""
    llm = llmkit.load(tiny_model_dir, device="cpu", threads=1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with llm._engine.lock:
            held.set()
            done.wait(60)

    worker = threading.Thread(target=hold)
    worker.start()
    held.wait(60)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_asks, args=(llm, queue))
    child.start()
    assert "forked while this model computed. Load it again" in queue.get(timeout=60)
    child.join(60)
    done.set()
    worker.join(60)
    assert len(llm.generate([5, 6], max_tokens=2, temperature=0, ignore_eos=True).token_ids) == 2


def _drops(backends: list[NativeBackend], queue: multiprocessing.Queue) -> None:
    backends.clear()
    queue.put("gone")


@needs_fork
def test_a_plan_is_dropped_after_a_fork(llama: Transformer) -> None:
    backends = [NativeBackend(llama.config, weights_of(llama), threads=3)]
    logits(backends[0], random_ids(llama, 3))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_drops, args=(backends, queue))
    child.start()
    assert queue.get(timeout=60) == "gone"
    child.join(60)
    assert child.exitcode == 0


def test_ctrl_c_from_the_keyboard(slow_model: Transformer) -> None:
    backend, ids = NativeBackend(slow_model.config, weights_of(slow_model), threads=2), random_ids(slow_model, 5)
    expected = logits(backend, ids)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        logits(backend, random_ids(slow_model, 4000))
    timer.join()
    np.testing.assert_array_equal(logits(backend, ids), expected)


SCRIPT = """
import sys, threading, time
from pathlib import Path
import numpy as np
from llmkit.errors import LLMKitError
from llmkit.checkpoint.load import load_model
from llmkit.kernels import NativeBackend
from tests.kernels.test_native import logits, random_ids, weights_of
model = load_model(Path(sys.argv[1]))
"""


def script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT + text, str(folder)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_threads_the_system_does_not_start(tmp_path: Path) -> None:
    done = script(
        """
import resource
backend = NativeBackend(model.config, weights_of(model), threads=1000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), -1))
try:
    logits(backend, random_ids(model, 3))
except LLMKitError as error:
    print(error)
print(len(logits(NativeBackend(model.config, weights_of(model), threads=2), random_ids(model, 3))))
""",
        tiny_folder(tmp_path, "llama"),
    )
    assert done.returncode == 0, done.stderr
    assert "does not start 1000 threads" in done.stdout
    assert done.stdout.endswith("Take fewer with --threads.\n3\n")


def test_the_interpreter_ends_in_the_middle_of_a_step(tmp_path: Path) -> None:
    done = script(
        """
backend = NativeBackend(model.config, weights_of(model), threads=2)
threading.Thread(target=lambda: logits(backend, random_ids(model, 4000)), daemon=True).start()
time.sleep(0.3)
print("end")
""",
        tiny_folder(tmp_path, "llama", hidden_size=240, intermediate_size=2048, num_hidden_layers=24),
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
