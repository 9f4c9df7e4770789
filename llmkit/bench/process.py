"""A worker in a process of its own, as the process that measures sees it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from llmkit import errors
from llmkit.errors import LLMKitError


class Worker:
    """A running `module`, by default `bench_worker`; `ready` is what it said when it was."""

    def __init__(self, name: str, settings: dict[str, Any], module: str = "llmkit.bench.worker") -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        started = {"started": time.time()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings | started)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.ready = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer. Raises what the worker raises."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
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
            said = self._errors.read().strip().splitlines()
            self.close()
            cause = said[-1] if said else f"exit code {self._process.returncode}"
            raise LLMKitError(f"the {self._name} side of the benchmark stopped: {cause}. Try the model with `llmkit verify` first.")
        return answer
