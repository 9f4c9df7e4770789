"""Both ends of the pipe between the process that measures and the workers that it measures.

A worker answers each request, a JSON line on its standard input, with a JSON line on its standard output. While it waits it computes
nothing, so that programs under measurement can take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from llmkit import errors
from llmkit.bench import CHECKOUT
from llmkit.errors import DoesNotFit, LLMKitError, out_of_memory

Settings = dict[str, Any]  # JSON: what a worker is started with
Answer = Callable[[dict[str, Any]], None]


class Worker:
    """A running `module`; `ready` is its first answer.

    Raises what the worker raises: an LLMKitError of its own kind, or one with the last line that it wrote to standard error.
    """

    def __init__(self, name: str, settings: Settings, module: str = "llmkit.bench.worker") -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        started = {"started": time.time()}
        environment = dict(os.environ)
        if not module.startswith("llmkit."):  # benchmarks/ lies next to llmkit/, where an installed Python does not look
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings | started)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.ready = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return its answer. Raises what the worker raises."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process, in whatever it is."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if "error" in answer:
            self.close()
            raise getattr(errors, answer["kind"])(answer["error"])
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            self.close()
            cause = lines[-1] if lines else f"exit code {self._process.returncode}"
            raise LLMKitError(f"the {self._name} side of the benchmark stopped: {cause}. Try the model with `llmkit verify` first.")
        return answer


def main(serve: Callable[[Settings, Answer], None]) -> None:
    """Run a worker: serve what the first argument asks for, and pass on an LLMKitError, or memory that ran out, as an answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        serve(json.loads(sys.argv[1]), answer)
    except LLMKitError as error:
        answer({"error": str(error), "kind": type(error).__name__})
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        answer({"error": "a side of the benchmark needs more memory than there is. Take a smaller model.", "kind": DoesNotFit.__name__})
