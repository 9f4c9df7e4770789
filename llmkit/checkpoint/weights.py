"""Which stored tensor becomes which parameter: the family rules applied forwards (loading) and backwards (saving). No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from llmkit.checkpoint.files import Checkpoint, TensorFile
from llmkit.config import ModelConfig
from llmkit.families import Family, Rule

BODY = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# transformers 5 keeps all experts of a layer in one tensor [experts, out, in]; saved with `save_original_format=False`
# it stands like that on disk too. `{j}` only on our side: one slice of the leading axis each. Read, never written.
STACKED_EXPERTS = (
    Rule(
        "model.layers.{i}.mlp.experts.gate_up_proj",
        ("model.layers.{i}.mlp.experts.{j}.gate_proj.weight", "model.layers.{i}.mlp.experts.{j}.up_proj.weight"),
    ),
    Rule("model.layers.{i}.mlp.experts.down_proj", ("model.layers.{i}.mlp.experts.{j}.down_proj.weight",)),
)


@dataclass(frozen=True)
class Piece:
    """One of our parameters as a part of a stored tensor: first the expert's slice, then the transpose, then the rows."""

    tensor: TensorFile
    shape: tuple[int, ...]  # of the parameter
    expert: int | None = None
    transpose: bool = False
    rows: tuple[int, int] | None = None


@dataclass
class Assignment:
    """What a checkpoint gives a model: a piece for each parameter, names skipped on purpose, and what does not fit."""

    pieces: dict[str, Piece] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    tied_head: TensorFile | None = None  # stored although the head is the embedding; must equal it
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Pattern:
    """A name with `{i}` and `{j}` standing for numbers."""

    text: str
    regex: re.Pattern[str]

    @classmethod
    def of(cls, text: str) -> _Pattern:
        escaped = re.escape(text)
        for key in "ij":
            escaped = escaped.replace(rf"\{{{key}\}}", rf"(?P<{key}>0|[1-9][0-9]{{0,8}})")
        return cls(text, re.compile(escaped))

    def match(self, name: str) -> dict[str, str] | None:
        found = self.regex.fullmatch(name)
        return None if found is None else found.groupdict()


Rules = list[tuple[_Pattern, Rule]]


def reading_rules(family: Family, config: ModelConfig) -> Rules:
    """The rules by which stored names become ours."""
    stacked = STACKED_EXPERTS if config.sparse else ()
    return [(_Pattern.of(rule.theirs), rule) for rule in (*family.rules, *stacked)]


def assign(checkpoint: Checkpoint, family: Family, config: ModelConfig, expected: Mapping[str, tuple[int, ...]]) -> Assignment:
    """A piece for each expected parameter (name -> shape), or the list of everything that is missing, surplus or misshapen."""
    rules = reading_rules(family, config)
    out = Assignment()
    for name, tensor in checkpoint.items():
        parts = parts_of(tensor, rules, config, out.problems)
        below = {BODY + ours: piece for ours, piece in parts.items()}
        if not parts.keys() <= expected.keys() and below.keys() <= expected.keys():
            parts = below  # saved from the body alone, as embedding models are
        if config.tie_word_embeddings and parts.keys() == {HEAD}:
            out.tied_head = tensor
            out.skipped.append(name)
        elif parts.keys() <= expected.keys():
            for ours, piece in parts.items():
                if ours in out.pieces:
                    out.problems.append(f"given twice: {ours}, by {out.pieces[ours].tensor.name!r} and by {name!r}")
                elif piece.shape != expected[ours]:
                    out.problems.append(f"wrong shape: {ours} needs {list(expected[ours])}, {_describe(piece)}")
                out.pieces[ours] = piece
        # Only what nobody asked for may be ignored, so that an ignore pattern cannot swallow a parameter.
        elif any(re.fullmatch(pattern, name) for pattern in family.ignore):
            out.skipped.append(name)
        else:
            out.problems.append(f"surplus: {name!r} {list(tensor.shape)}")
    out.problems += [f"missing: {ours} {list(shape)}" for ours, shape in expected.items() if ours not in out.pieces]
    return out


def parts_of(tensor: TensorFile, rules: Rules, config: ModelConfig, problems: list[str]) -> dict[str, Piece]:
    """Our names and pieces of one stored tensor; a name that no rule knows is its own. Empty, and one more problem, where it is not cut."""
    return dict(_parts(tensor, rules, config, problems))


def is_transposed(name: str, rules: Rules) -> bool:
    """Whether the tensor of a stored name is [in, out]."""
    return any(rule.transpose and pattern.match(name) is not None for pattern, rule in rules)


def _parts(tensor: TensorFile, rules: Rules, config: ModelConfig, problems: list[str]) -> Iterator[tuple[str, Piece]]:
    for pattern, rule in rules:
        numbers = pattern.match(tensor.name)
        if numbers is None:
            continue
        stacked = "{j}" in rule.ours[0] and "j" not in numbers
        shape = tensor.shape[1:] if stacked else tensor.shape
        if rule.transpose:
            shape = shape[::-1]
        # As many rows each as the parameters have; of a name that the model has not, which whoever asks will say, any.
        wanted = [config.parameters.get(ours.format(**numbers, **({"j": 0} if stacked else {}))) for ours in rule.ours]
        sizes = shape[:1] if len(wanted) == 1 else [sum(shape[:1]) // len(wanted) if one is None else one.shape[0] for one in wanted]
        experts = wanted[0].experts[1] if stacked and wanted[0] is not None else tensor.shape[0]
        if sum(sizes) != sum(shape[:1]) or (stacked and tensor.shape[0] != experts):
            problems.append(f"wrong shape: {tensor.name!r} {list(tensor.shape)} cannot be cut into {', '.join(rule.ours)}")
            return
        for j in range(tensor.shape[0]) if stacked else (None,):
            end = 0
            for ours, size in zip(rule.ours, sizes, strict=True):
                end += size
                named = ours.format(**numbers) if j is None else ours.format(**numbers, j=j)
                rows = (end - size, end) if len(sizes) > 1 else None
                yield named, Piece(tensor, (size, *shape[1:]), j, rule.transpose, rows)
        return
    yield tensor.name, Piece(tensor, tensor.shape)


def _describe(piece: Piece) -> str:
    name, shape = piece.tensor.name, list(piece.shape)
    if piece.shape == piece.tensor.shape:
        return f"{name!r} is {shape}"
    return f"{name!r} {list(piece.tensor.shape)} gives {shape}"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written: our parameters, put one below the other, then transposed."""

    name: str
    ours: tuple[str, ...]
    transpose: bool = False


def stored_layout(names: Iterable[str], family: Family) -> list[OutputTensor]:
    """The tensors of the family's own layout that hold our parameters; of several rules for one name the first is written."""
    left = dict.fromkeys(names)
    rules = writing_rules(family)
    out = []
    for name in list(left):
        if name not in left:  # already written together with an earlier one
            continue
        found = stored_as(name, rules)
        for ours in found.ours:
            del left[ours]
        out.append(found)
    return out


def writing_rules(family: Family) -> Rules:
    """The rules by which our names become stored ones."""
    return [(_Pattern.of(ours), rule) for rule in family.rules for ours in rule.ours]


def stored_as(name: str, rules: Rules) -> OutputTensor:
    """The tensor of the family's own layout that holds one of our parameters, with those that stand in it too."""
    for pattern, rule in rules:
        numbers = pattern.match(name)
        if numbers is not None:
            return OutputTensor(rule.theirs.format(**numbers), tuple(ours.format(**numbers) for ours in rule.ours), rule.transpose)
    return OutputTensor(name, (name,))
