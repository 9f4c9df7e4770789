"""The rag commands, as a person types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from llmkit.cli.main import run
from llmkit.rag import ingest
from llmkit.rag.index import Index
from tests.rag.conftest import BOAT, GUIDE
from tests.rag.test_read import write_pdf


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_text(GUIDE)
    (tmp_path / "docs" / "boat.txt").write_text(BOAT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_add_search_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rag", "add", "docs", "--index", "my.index"]) == 0
    assert "2 added, 0 replaced, 0 unchanged" in capsys.readouterr().out
    assert run(["rag", "search", "bearing grease", "--index", "my.index", "-k", "1"]) == 0
    out = capsys.readouterr().out
    assert "docs/guide.md:" in out
    assert "Grease the bearing every 200 hours" in out
    assert run(["rag", "ask", "Who commands the ferry Aurora?", "--index", "my.index"]) == 0
    out = capsys.readouterr().out
    assert "Captain Jonas Berg has commanded the ferry since 2011. [1]" in out
    assert '[1] docs/boat.txt:1 "Captain Jonas Berg' in out
    assert run(["rag", "ask", "Which mountain did the queen of Bolivia climb?", "--index", "my.index"]) == 0
    assert capsys.readouterr().out.startswith("The documents do not say.")


def test_a_quote_out_of_a_pdf_has_its_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.pdf").write_bytes(write_pdf(["The yard built nine boats.", "The dredger Halibut was launched in May."]))
    assert run(["rag", "add", "report.pdf", "--index", "my.index"]) == 0
    capsys.readouterr()
    for command in ("search", "ask"):
        assert run(["rag", command, "When was the dredger Halibut launched?", "--index", "my.index"]) == 0
        assert "report.pdf, page 2" in capsys.readouterr().out


def test_an_interrupted_add_says_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["rag", "add", "docs/boat.txt", "--index", "my.index"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(ingest, "chunk", Mock(side_effect=KeyboardInterrupt))
        assert run(["rag", "add", "docs", "--index", "my.index"]) == 130
    assert "stopped; 1 chunks are in my.index, and the same command goes on" in capsys.readouterr().err
    assert run(["rag", "add", "docs", "--index", "my.index"]) == 0
    assert "1 added, 0 replaced, 1 unchanged" in capsys.readouterr().out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "docs" / "bad.pdf").write_bytes(b"x")
    assert run(["rag", "add", "docs", "--index", "my.index", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert len(report["added"]) == 2
    assert report["skipped"][0]["file"].endswith("bad.pdf")
    assert "skipped" in captured.err
    assert run(["rag", "search", "ferry", "--index", "my.index", "--json"]) == 0
    assert "Aurora" in json.loads(capsys.readouterr().out)["hits"][0]["text"]
    assert run(["rag", "ask", "Who commands the ferry?", "--index", "my.index", "--json", "--extractive"]) == 0
    assert json.loads(capsys.readouterr().out)["abstained"] is False


def test_a_document_cannot_write_to_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "docs" / "e\x1b[2Jsc.txt").write_text("The Tuna valve \x1b]0;pwned\x07opens at 7 bar of \x9b31mpressure.\n")
    (folder / "docs" / "b\x1b[2J.txt").write_bytes(b"\0")
    assert run(["rag", "add", "docs", "--index", "my.index"]) == 0
    for arguments in (["search", "Tuna valve"], ["ask", "At what pressure does the Tuna valve open?"], ["ask", "Who fed Tuna?"]):
        assert run(["rag", *arguments, "--index", "my.index"]) == 0
    told = capsys.readouterr()
    assert "7 bar of 31mpressure" in told.out
    assert not any(character in told.out + told.err for character in "\x1b\x07\x9b")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_is_json_whatever_the_names_and_the_terminal(folder: Path, encoding: str) -> None:
    (folder / "docs" / os.fsdecode(b"caf\xe9.txt")).write_text("A file whose name is not UTF-8.")
    (folder / "docs" / "b.txt").write_text("Zürich has a museum.")
    base = [sys.executable, "-m", "llmkit", "rag"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])}
    for arguments, wanted in ((["add", "docs"], "not UTF-8"), (["search", "museum"], "Zürich")):
        done = subprocess.run([*base, *arguments, "--index", "my.index", "--json"], capture_output=True, check=True, env=environment)
        assert wanted in json.dumps(json.loads(done.stdout), ensure_ascii=False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "x", "--index", "none"], 1, "there is no index at none"),
        (["search", " ", "--index", "none"], 2, "empty"),
        (["search", "x", "--index", "here", "--kind", "PDF"], 2, "no file is of the kind 'PDF'. Kinds are text, markdown,"),
        (["ask", "x", "--index", "none", "--strict"], 2, "no effect"),
        (["ask", "x", "--index", "none", "--temperature", "1"], 2, "no effect"),
        (["add", "missing", "--index", "made"], 2, "does not exist"),
        (["add", "docs", "--index", "docs/guide.md"], 1, "is a file"),
        (["add", "docs"], 2, "--index"),
    ],
)
def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    Index.create(folder / "here")
    assert run(["rag", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_changed_chunk_size_needs_a_new_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rag", "add", "docs", "--index", "my.index", "--chunk-tokens", "64"]) == 0
    assert run(["rag", "add", "docs", "--index", "my.index", "--chunk-tokens", "99"]) == 2
    assert "new index" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence_with_the_remedy(folder: Path) -> None:
    program = (
        "import sys; sys.modules['lancedb'] = None; from llmkit.cli.main import run; sys.exit(run(['rag', 'add', 'docs', '--index', 'i']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'llmkit[rag]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_light() -> None:
    program = "import sys, json; from llmkit.cli.main import run; run(['rag', '--help']); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not names & {"numpy", "lancedb", "pyarrow", "torch", "transformers", "rich"}
