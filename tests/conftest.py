"""Fixtures for all tests. Nothing here reaches for a network or a model hub."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Read by torch when it is imported: processes of tests that run side by side share the cores, and threads of several that wait for each
# other by spinning would take turns on them.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // WORKERS, 1)))

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "200"  # tables are not wrapped
if not torch.cuda.is_available():  # read when Triton is first imported, by whatever test that is
    os.environ["TRITON_INTERPRET"] = "1"
# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real models, tokenizers and texts; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LLMKIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.md").is_file():
        pytest.skip(f"no real data at {folder}; set LLMKIT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model folder with a tokenizer and a chat template (see tests/tiny.py)."""
    from tests.tiny import write_model

    return write_model(tmp_path_factory.mktemp("model") / "tiny")
