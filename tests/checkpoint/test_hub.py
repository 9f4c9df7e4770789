"""Folder, hub id, revision, cache, no network: against a small hub of our own on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint import hub
from llmkit.checkpoint.hub import ADAPTER, needed_files, resolve
from llmkit.errors import CheckpointError, LLMKitError, UsageError

from . import raw

SHAS = {"main": "a" * 40, "v1": "b" * 40}
INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class FakeHub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as a download takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.status: dict[str, tuple[int, str]] = {}  # repository -> HTTP status, X-Error-Code
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("authorization"))
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?(?:/)?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        repository = (api or file or re.match("()", ""))[1]
        if repository in self.server.status and not (api and self.server.status[repository][1] == "GatedRepo"):
            return self.answer(self.server.status[repository][0], b"{}", {"X-Error-Code": self.server.status[repository][1]})
        files = self.server.repositories.get(repository)
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = (api[3] if api else file[2]) if api or file else None
        sha = SHAS.get(revision or "main", revision)
        if sha not in SHAS.values():
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api and api[2] == "tree":
            found: Any = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files.items()]
            return self.answer(200, json.dumps(found).encode(), {})
        if api:
            found = {"id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(found).encode(), {})
        assert file is not None
        if self.command == "GET":
            self.server.fetched.append(file[3])
        data = files[file[3]]
        return self.answer(200, data, {"X-Repo-Commit": str(sha), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, huggingface_hub pointed at it with an empty cache, and a folder to stand in."""
    from huggingface_hub import constants

    found = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


SIDE = {"config.json": b"{}", "tokenizer.json": b"{ }", "tokenizer_config.json": b"{  }", "chat_template.jinja": b"hi"}
CLUTTER = {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "onnx/model.safetensors": b"x", "README.md": b"x", "model.py": b"x"}


def test_only_needed_files_are_fetched(server: FakeHub) -> None:
    server.repositories["org/m"] = SIDE | CLUTTER | {"model.safetensors": b"weights"}
    folder = resolve("org/m")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == SIDE | {"model.safetensors": b"weights"}
    assert sorted(server.fetched) == sorted([*SIDE, "model.safetensors"])
    assert "Bearer hf_secret" in server.tokens
    server.fetched.clear()
    assert resolve("org/m") == folder
    assert server.fetched == []  # it is in the cache


def test_an_adapter_is_a_kind_of_its_own(server: FakeHub) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "tokenizer.json": b"{ }"}
    server.repositories["org/a"] = adapter | CLUTTER | {"model.safetensors": b"x", "adapter_model.bin": b"x"}
    assert {path.name: path.read_bytes() for path in resolve("org/a", kind=ADAPTER).iterdir()} == adapter
    assert sorted(server.fetched) == sorted(adapter)
    server.repositories["org/m"] = SIDE | {"model.safetensors": b"weights"}
    with pytest.raises(CheckpointError, match=r"org/m on the hub has no adapter_config\.json, so it is no adapter llmkit can load"):
        resolve("org/m", kind=ADAPTER)
    server.repositories["org/b"] = {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors. Pickle files \(adapter_model\.bin\) can run code"):
        resolve("org/b", kind=ADAPTER)


def test_shards_are_those_of_the_index(server: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
    shards = {SHARDS[0]: b"1", SHARDS[1]: b"2", INDEX: index}
    server.repositories["m"] = SIDE | CLUTTER | shards | {"model.fp16.safetensors": b"x"}
    assert {path.name for path in resolve("m").iterdir()} == {*SIDE, *shards}
    del server.repositories["m"][SHARDS[1]]
    server.repositories["n"] = server.repositories["m"]
    with pytest.raises(CheckpointError, match=f"n on the hub lacks the shards {SHARDS[1]}"):
        resolve("n")


def test_revisions(server: FakeHub) -> None:
    server.repositories["org/m"] = SIDE | {"model.safetensors": b"weights"}
    assert resolve("org/m").name == SHAS["main"]
    assert resolve("org/m@v1").name == resolve("org/m", "v1").name == SHAS["v1"]
    with pytest.raises(CheckpointError, match="org/m has no revision 'v9' on the hub"):
        resolve("org/m@v9")
    with pytest.raises(UsageError, match="already names a revision"):
        resolve("org/m@v1", "main")
    with pytest.raises(UsageError, match="cannot be a branch"):
        resolve("org/m", "../../x")


def test_offline_serves_the_cache(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.repositories["org/m"] = SIDE | CLUTTER | {"model.safetensors": b"weights"}
    online, old = resolve("org/m"), resolve("org/m@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (resolve("org/m"), resolve("org/m@v1")) == (online, old)
    with pytest.raises(CheckpointError, match=r"org/n is no folder here and not in the hub cache, and HF_HUB_OFFLINE is set"):
        resolve("org/n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.shutdown()
    server.server_close()
    assert resolve("org/m") == online
    with pytest.raises(CheckpointError, match=r"not in the hub cache, and http://127.0.0.1:\d+ cannot be reached \(Connection refused\)"):
        resolve("org/n")


def test_refusals_of_the_hub(server: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"org/typo is neither a folder here nor a hub model.*HTTP 404.*set HF_TOKEN"):
        resolve("org/typo")
    for status in (401, 403):
        server.status["org/private"] = (status, "")
        with pytest.raises(CheckpointError, match=f"org/private .*HTTP {status}.*HF_TOKEN"):
            resolve("org/private")
    server.repositories["org/gated"] = SIDE | {"model.safetensors": b"weights"}
    server.status["org/gated"] = (403, "GatedRepo")
    with pytest.raises(CheckpointError, match=r"org/gated is gated. Accept its terms.*HF_TOKEN"):
        resolve("org/gated")
    server.status["org/broken"] = (500, "")
    with pytest.raises(CheckpointError, match="org/broken could not be downloaded"):
        resolve("org/broken")


def test_repositories_that_are_no_models(server: FakeHub) -> None:
    server.repositories["org/pickle"] = SIDE | {"pytorch_model.bin": b"x"}
    with pytest.raises(CheckpointError, match=r"no model.safetensors. It has pickle files \(pytorch_model.bin\).*save_pretrained"):
        resolve("org/pickle")
    server.repositories["org/gguf"] = {"config.json": b"{}", "m-Q4_0.gguf": b"x"}
    with pytest.raises(CheckpointError, match="GGUF files are not read yet"):
        resolve("org/gguf")
    server.repositories["org/gguf"] = {"m.gguf": b"x"}
    with pytest.raises(CheckpointError, match=r"org/gguf on the hub has no config.json"):
        resolve("org/gguf")
    assert server.fetched == []


def test_a_folder_comes_first(server: FakeHub) -> None:
    server.repositories["org/m"] = SIDE | {"model.safetensors": b"weights"}
    for name in ("org/m", "org/m@v1"):
        Path(name).mkdir(parents=True)
        assert resolve(name) == Path(name)
    assert server.tokens == set()
    with pytest.raises(UsageError, match="a folder has no revision 'v1'"):
        resolve("org/m", "v1")
    Path("org/m/model.safetensors").touch()
    Path("m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m.gguf cannot be loaded. GGUF files are not read yet"):
        resolve("m.gguf")
    with pytest.raises(CheckpointError, match="is a file, not a model folder"):
        resolve("org/m/model.safetensors")


@pytest.mark.parametrize(
    "path",
    [
        "/no/such",
        "./m",
        "../m",
        "~/no-such-model",
        "~nobody",
        "./" + "m" * 300,
        "models/org/m",
        "m/",
        "x.gguf",
        "a\\b",
        "org//m",
        Path("org/m"),
    ],
)
def test_paths_do_not_go_to_the_hub(server: FakeHub, path: str | Path) -> None:
    with pytest.raises(CheckpointError, match=r"The folder .* does not exist"):
        resolve(path)
    assert server.tokens == set()


@pytest.mark.parametrize("name", ["org m", "-m", "org/m:x", "ümlaut", "a..b", "a--b", "https://x", "\ud800", "a\0b", "", "\n"])
def test_names_that_are_no_hub_ids(server: FakeHub, name: str) -> None:
    with pytest.raises(LLMKitError, match=r"is neither a folder nor a hub id|has no name"):
        resolve(name)
    assert server.tokens == set()


def test_needed_files() -> None:
    names = ["model.safetensors", INDEX, "a/config.json", "1_Pooling/config.json", "additional_chat_templates/t.jinja"]
    assert needed_files(names) == [
        "1_Pooling/config.json",
        "additional_chat_templates/t.jinja",
        "model.safetensors",
    ]


def test_a_name_look_up_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*_: Any) -> None:
        over.wait()
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert hub._unreachable("https://hub.invalid") == "no answer within 1.5 seconds"
    assert time.monotonic() - start < 3
    over.set()


def test_a_proxy_is_asked_instead_of_the_hub(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.url)
    assert hub._unreachable("https://hub.invalid") is None
    monkeypatch.setenv("no_proxy", "hub.invalid")
    assert hub._unreachable("https://hub.invalid") is not None


@pytest.mark.parametrize("endpoint", ["https://hub.invalid", "http://127.0.0.1:9"])
def test_no_network_is_an_error_within_three_seconds(tmp_path: Path, endpoint: str) -> None:
    """As a person meets it: a process of its own, HF_HUB_OFFLINE not set, nothing on standard error."""
    code = (
        "import sys, time, huggingface_hub; from llmkit.checkpoint.hub import resolve\n"
        "start = time.monotonic()\n"
        "try: resolve('org/m')\n"
        "except Exception as error: print(type(error).__name__, time.monotonic() - start, error)"
    )
    names = ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(hub.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    kind, seconds, message = run.stdout.split(" ", 2)
    assert (kind, run.stderr) == ("CheckpointError", "")
    assert float(seconds) < 3
    assert f"{endpoint} cannot be reached" in message


def test_downloads_are_quiet_without_a_terminal(server: FakeHub, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    server.repositories["org/m"] = {"config.json": json.dumps(raw.LLAMA).encode(), "model.safetensors": bytes(10**6)}
    resolve("org/m")
    assert capfd.readouterr() == ("", "")
