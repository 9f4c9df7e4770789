"""Ask the project's own documents: `python examples/rag.py "Which exit codes are there?"`

Each answer is made of sentences of the documents, with the place they stand at; where the documents do not say, neither does it.
"""

import sys
import tempfile
from pathlib import Path

from llmkit import rag

ROOT = Path(__file__).parent.parent
QUESTIONS = ["What does exit code 3 mean?", "Who trained the story teller?", "Who won the football world cup in 1998?"]

with tempfile.TemporaryDirectory() as folder:
    index = rag.Index.create(Path(folder) / "index")
    report = rag.add(index, [ROOT / "README.md", ROOT / "docs"])
    print(f"{len(report.added)} files, {report.chunks} chunks\n")
    for question in sys.argv[1:] or QUESTIONS:
        answer = rag.ask(None, question, index)  # with a model in place of None the answer is in its words, and checked
        print(f"{question}\n  {answer}")
        for number, source in enumerate(answer.sources, 1):
            print(f"  [{number}] {Path(source.file).relative_to(ROOT)}:{source.line}")
        print()
