"""The index grows by content, survives what interrupts it, and refuses what does not belong."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llmkit.errors import UsageError
from llmkit.rag import ingest
from llmkit.rag.index import BrokenIndex, Index, IndexMissing, Settings
from llmkit.rag.ingest import EMBEDDED, add, nothing_to_do
from llmkit.rag.retrieve import search
from tests.rag.conftest import BOAT


def test_unchanged_files_are_left_alone_and_changed_ones_replaced(index: Index, docs: Path) -> None:
    version = index.table.version
    report = add(index, [docs])
    assert (report.unchanged, report.added, report.replaced) == (2, [], [])
    assert index.table.version == version

    boat = docs / "boat.txt"
    boat.write_text(BOAT.replace("Aurora", "Borealis"))
    os.utime(boat, (0, 0))  # the content counts, not the time
    report = add(index, [docs])
    assert (report.replaced, report.unchanged) == ([str(boat)], 1)
    assert "Borealis" in search(index, "name of the ferry")[0].text
    assert not any("Aurora" in hit.text for hit in search(index, "Aurora ferry"))


def test_nothing_to_do_is_seen_without_the_store_and_never_wrongly(index: Index, docs: Path) -> None:
    place = index.location
    found = nothing_to_do(place, [docs])
    assert found is not None
    assert (found[0].unchanged, found[1]) == (2, len(index))
    boat, guide = docs / "boat.txt", docs / "guide.md"
    for change in (lambda: boat.write_text("Other."), lambda: (docs / "new.txt").write_text("New.")):
        change()
        assert nothing_to_do(place, [docs]) is None
        add(index, [docs])
        assert nothing_to_do(place, [docs]) is not None
    guide.unlink()
    assert nothing_to_do(place, [docs]) is not None
    assert nothing_to_do(place, [docs], sync=True) is None
    index.remove([str(boat)])  # as a process that died before the end leaves it
    assert nothing_to_do(place, [docs]) is None
    (Path(place) / "files.json").write_text("[]")
    assert nothing_to_do(place, [docs]) is None


def test_sync_takes_out_files_that_are_gone_under_the_paths_named(index: Index, docs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("A lighthouse stands on the cape.")
    add(index, [other])
    other.unlink()
    (docs / "boat.txt").unlink()
    assert add(index, [docs]).removed == []
    assert add(index, [docs], sync=True).removed == [str(docs / "boat.txt")]
    assert set(index.files()) == {str(docs / "guide.md"), str(other)}
    assert add(index, [other], sync=True).removed == [str(other)]


def test_folders_are_read_recursively_with_globs(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a.md", "b/c.txt", "b/.hidden.md", ".git/d.md", "b/e.bin", "b/f.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("Some text.")
    index = Index.create(tmp_path / "index")
    report = add(index, [root])
    assert [Path(file).name for file in report.added] == ["a.md", "c.txt", "f.py"]
    assert report.unknown == 1
    index = Index.create(tmp_path / "second")
    assert [Path(file).name for file in add(index, [root], globs=["b/*.txt", "*.md"]).added] == ["a.md", "c.txt"]


def test_an_unreadable_file_is_reported_and_skipped(index: Index, docs: Path) -> None:
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (docs / "noise.txt").write_bytes(bytes(range(256)))
    (docs / "new.txt").write_text("A new file.")
    report = add(index, [docs])
    assert [Path(file).name for file in report.added] == ["new.txt"]
    assert [Path(file).name for file, _ in report.skipped] == ["broken.pdf", "noise.txt"]
    with pytest.raises(UsageError, match="does not exist"):
        add(index, [docs / "missing.txt"])


def test_a_file_that_cannot_be_read_any_more_says_nothing_any_more(index: Index, docs: Path) -> None:
    (docs / "boat.txt").write_bytes(b"\0\0")
    report = add(index, [docs])
    assert report.removed == [str(docs / "boat.txt")]
    assert len(report.skipped) == 1
    assert set(index.files()) == {str(docs / "guide.md")}


def test_an_index_among_the_documents_is_none_of_them(docs: Path) -> None:
    index = Index.create(docs / "my.index")
    assert len(add(index, [docs]).added) == 2
    assert add(index, [docs]).unchanged == 2
    assert len(add(Index.create(docs / "other.index"), [docs]).added) == 2


def test_sync_tells_what_never_was_from_what_is_gone(index: Index, docs: Path) -> None:
    report = add(index, [docs / "typo"], sync=True)
    assert report.removed == []
    assert [(file, "does not exist" in why) for file, why in report.skipped] == [(str(docs / "typo"), True)]
    assert nothing_to_do(index.location, [docs, docs / "typo"], sync=True) is None


def test_sync_keeps_files_in_a_folder_that_may_not_be_looked_into(index: Index, docs: Path) -> None:
    files = index.files()
    docs.chmod(0)
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
        assert list(ingest._gone(files, [str(docs)], [])) == []
        if os.getuid() == 0:
            with pytest.raises(BrokenIndex, match="Give yourself the right to read"):
                index.files()
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        docs.chmod(0o755)


@pytest.mark.parametrize("damaged", ["chunks.lance/data", "chunks.lance/_indices", "vocabulary.lance/data"])
def test_a_damaged_index_is_told(index: Index, damaged: str) -> None:
    for file in (Path(index.location) / damaged).rglob("*.lance"):
        file.unlink()
    with pytest.raises(BrokenIndex, match=r"cannot be read .* Remove that folder and add the files again"):
        search(Index.open(index.location), "pump")


def test_an_index_whose_making_was_cut_short_is_made_anew(tmp_path: Path, docs: Path) -> None:
    (tmp_path / "index" / "chunks.lance" / "_versions").mkdir(parents=True)
    with pytest.raises(IndexMissing):
        Index.open(tmp_path / "index")
    assert len(add(Index.create(tmp_path / "index"), [docs]).added) == 2


def test_memory_that_runs_out_is_not_taken_for_a_full_disk(index: Index) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), index.writing():
        raise RuntimeError("CUDA out of memory")


def test_two_writers(index: Index, docs: Path) -> None:
    second = Index.open(index.location)
    with index.writing(), pytest.raises(BrokenIndex, match="another process is writing"):
        add(second, [docs])
    assert add(second, [docs]).unchanged == 2


def test_a_reader_goes_on_while_another_writes(index: Index, docs: Path) -> None:
    reader = Index.open(index.location)
    (docs / "guide.md").write_text("Nothing of the pump is left.")
    add(index, [docs])
    assert any("impeller" in hit.text for hit in search(reader, "impeller weight"))
    assert not any("impeller" in hit.text for hit in search(Index.open(index.location), "impeller weight"))


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_killed_add_leaves_a_whole_index_and_continues(tmp_path: Path, delay: float) -> None:
    """Each file has two chunks or more; whenever the process dies, an indexed file is there with all of them."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text("\n\n".join(f"Paragraph {part} of file{number}. " + "Some words. " * 40 for part in range(3)))
    place = tmp_path / "index"
    program = (
        "import sys\nfrom llmkit.rag import ingest\nfrom llmkit.rag.index import Index\ningest.BATCH_CHUNKS_TEXT = 9\n"
        "index = Index.create(sys.argv[1])\nprint('begun', flush=True)\ningest.add(index, [sys.argv[2]])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(place), str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    index = Index.open(place)
    rows = index.table.search().select(["file", "n"]).to_arrow().to_pylist()
    assert sorted(row["file"] for row in rows if row["n"] == 0) == sorted(index.files())
    before = len(index.files())
    assert len({(row["file"], row["n"]) for row in rows}) == len(rows)
    report = add(index, [folder])
    assert (report.unchanged, len(report.added)) == (before, 200 - before)
    assert len(index) == report.chunks + len(rows) == 600
    assert "file137" in search(index, "file137", 1)[0].text


def test_a_full_disk_is_told_and_nothing_is_lost(index: Index, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing past it fails in the same way."""
    held = index.files()
    large = tmp_path / "large"
    large.mkdir()
    for number in range(4):
        (large / f"{number}.txt").write_text(" ".join(f"word{number}x{i}" for i in range(2000)))
    program = (
        "import resource, sys\nfrom llmkit.cli.main import run\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}))\n"
        "sys.exit(run(['rag', 'add', sys.argv[1], '--index', sys.argv[2]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(large), index.location], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    again = Index.open(index.location)
    assert held.items() <= again.files().items()
    assert "Marta" in search(again, "who designed the pump")[0].text
    assert len(add(again, [large]).added) + len(again.files()) >= 4


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexMissing, match="there is no index"):
        Index.open(tmp_path / "nothing")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BrokenIndex, match="is a file"):
        Index.create(file)
    broken = tmp_path / "broken" / "chunks.lance"
    broken.mkdir(parents=True)
    with pytest.raises(BrokenIndex, match="cannot be opened"):
        Index.open(broken.parent)


def test_unsaid_batches_do_not_change_what_is_stored(tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Index.create(tmp_path / "one")
    add(one, [docs])
    monkeypatch.setattr(ingest, "BATCH_CHUNKS_TEXT", 1)
    two = Index.create(tmp_path / "two")
    add(two, [docs])

    def rows(index: Index) -> list[tuple[str, str]]:
        found = index.table.search().select(["id", "text"]).to_arrow().to_pylist()
        return sorted((row["id"], row["text"]) for row in found)

    assert rows(one) == rows(two)
    assert one.statistics() == two.statistics()
    assert one.frequencies(["pump", "absent"]) == two.frequencies(["pump", "absent"]) != {}


class Letters:
    """An embedder that counts letters; keeps how many texts it was given at once."""

    name, fingerprint, dimension, max_tokens = "letters", "letters", 26, 512

    def __init__(self) -> None:
        self.calls: list[int] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls.append(len(texts))
        return np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)

    queries = documents


def test_progress_is_told_while_a_batch_is_embedded(tmp_path: Path) -> None:
    """One commit holds hundreds of chunks; on a slow machine embedding them takes a minute."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("\n\n".join(f"{word} {number}. " + "Words that fill. " * 10 for word in ["Alpha"] * 80))
    embedder = Letters()
    index = Index.create(tmp_path / "index", Settings("letters", "letters", 26, 32))
    told: list[tuple[int, int]] = []
    report = add(index, [folder], embedder=embedder, progress=lambda done, total: told.append((done, total)))
    assert report.chunks == sum(embedder.calls) == 320
    assert max(embedder.calls) <= EMBEDDED
    assert told == sorted(told)
    assert {done for done, _ in told} == {0, 1, 3, 4}  # nothing is done before it is embedded
    assert told[-1] == (4, 4)
