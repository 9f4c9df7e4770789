"""Files of every kind to text, and those that are none."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

import pytest

from llmkit.rag.read import MAX_BYTES, MAX_UNPACKED, Unreadable, decode, read, read_bytes


def text_of(name: str, data: bytes) -> str:
    return read(Path("/somewhere") / name, data).text


def test_text_is_what_read_text_gives(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\rthree é\n".encode())
    document = read(file, read_bytes(file))
    assert document.text == file.read_text(encoding="utf-8")
    assert not document.extracted


@pytest.mark.parametrize(("encoding", "name"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("cp1252", "Windows-1252")])
def test_other_encodings_are_read_and_said(encoding: str, name: str) -> None:
    document = read(Path("/a.txt"), "Zürich costs 5 €, naïvely\n".encode(encoding))
    assert document.text == "Zürich costs 5 €, naïvely\n"
    assert document.extracted
    assert document.note is not None
    assert name in document.note


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.txt", b"", "empty"),
        ("a.md", b" \n\t", "empty"),
        ("a.txt", bytes(range(256)) * 4, "binary"),
        ("a.txt", b"\x01\x02\x03\x04\x81\x8d" * 50, "neither"),
        ("a.txt", b"\xff\xfeabc", "UTF-16"),
        ("a.pdf", b"%PDF-1.7\nnonsense", "no PDF"),
        ("a.pdf", b"", "no PDF"),
        ("a.docx", b"PK\x03\x04 not a zip", "no docx"),
        ("a.html", b"<html><body><script>x()</script></body></html>", "no text"),
        ("a.html", b"<div>" * 3000 + b"text", "nested too deeply"),
        ("a.txt", "text".encode("utf-16-le"), "binary, or UTF-16 text without the mark"),
        ("a.txt", b"\xff\xfe" + b"\1\0" * 40, "binary"),
        ("\udcff.txt", b"text", "name is not UTF-8"),
    ],
)
def test_what_is_no_document_is_refused(name: str, data: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read(Path("/") / name, data)


def test_a_docx_that_unpacks_to_gigabytes_is_refused_before_it_does() -> None:
    for name, size in (("word/document.xml", MAX_BYTES + 1), ("word/media/a.png", MAX_UNPACKED + 1)):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as part:
            for start in range(0, size, 1 << 20):
                part.write(bytes(min(1 << 20, size - start)))
        with pytest.raises(Unreadable, match="unpacks to more"):
            read(Path("/a.docx"), stream.getvalue())


def test_random_bytes_never_raise_anything_else() -> None:
    import random

    generator = random.Random(0)
    for suffix in (".txt", ".html", ".pdf", ".docx", ".csv", ".jsonl", ".py"):
        for size in (1, 30, 3000):
            for head in (b"", b"%PDF-1.4\n", b"PK\x03\x04", b"\xff\xfe", b"{"):
                data = head + generator.randbytes(size)
                with contextlib.suppress(Unreadable):
                    read(Path("/a" + suffix), data)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    with file.open("wb") as stream:
        stream.truncate(200 << 20)
    with pytest.raises(Unreadable, match="200 MB, more than the 64 MB"):
        read_bytes(file)
    with pytest.raises(Unreadable, match="regular"):
        read_bytes(tmp_path)


def test_html_keeps_structure_and_leaves_out_what_is_not_shown() -> None:
    text = text_of(
        "a.html",
        b"<html><head><title>t</title><style>p{}</style></head><body><nav>menu</nav><h1>A <b>big</b> one</h1><p>Hello <a href=x>world</a>"
        b", it<br>is.</p><ul><li>one<li>two</ul><pre>def f():\n    return 1</pre><table><tr><th>a<th>b</tr><tr><td>1<td>2</tr></table>"
        b"<!-- ignore this --><script>bad()</script></body></html>",
    )
    assert "# A big one\n\nHello world, it\nis.\n" in text
    assert "def f():\n    return 1" in text
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in text
    assert not any(word in text for word in ("menu", "bad", "ignore", "p{}"))


def test_html_in_a_declared_encoding() -> None:
    assert text_of("a.html", '<meta charset="latin-1"><p>Zürich</p>'.encode("latin-1")) == "Zürich"


def test_docx_headings_and_tables() -> None:
    import docx

    document = docx.Document()
    document.add_heading("Pumps", 1)
    document.add_paragraph("A pump moves water.")
    table = document.add_table(2, 2)
    for cell, text in zip([cell for row in table.rows for cell in row.cells], ("part", "kg", "seal", "1"), strict=True):
        cell.text = text
    stream = io.BytesIO()
    document.save(stream)
    assert text_of("a.docx", stream.getvalue()) == "# Pumps\n\nA pump moves water.\n\n| part | kg |\n| --- | --- |\n| seal | 1 |"


def write_pdf(pages: list[str]) -> bytes:
    """The smallest PDF with a line of text on each page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {resources} /Contents {len(objects)} 0 R >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    body, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer << /Size {len(objects) + 1} /Root 1 0 R >>"
    return f"{body}{end}\nstartxref\n{len(body)}\n%%EOF".encode()


def test_pdf_pages() -> None:
    document = read(Path("/a.pdf"), write_pdf(["The first page.", "The second page."]))
    assert document.text == "The first page.\n\nThe second page."
    assert document.pages == (0, 17)
    with pytest.raises(Unreadable, match="OCR"):
        read(Path("/a.pdf"), write_pdf(["", ""]))


def test_decode_keeps_every_character() -> None:
    assert decode("naïve 東京 🙂".encode()) == ("naïve 東京 🙂", "UTF-8")
