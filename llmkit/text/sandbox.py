"""Chat templates come from strangers: this is the Jinja they run in, bounded in time and memory.

Jinja's own sandbox keeps a template from reaching Python's internals, not from running for ever. A signal would work
only on the main thread, a watchdog thread cannot interrupt C code (`9**9**9`, one giant join), and a process per
template costs 0.1 s. So the bound is built from two rules that hold in any thread:

1. No value a template can hold is heavy. `Meter.weigh` counts characters and elements, shared parts as often as they
   occur, and every operator, literal, filter and call passes through it, so that each single step of C code is short.
   Steps that could build something heavy at once (`"a" * 10**9`, `center`, `replace`, ...) are estimated beforehand.
2. Whatever repeats passes a checkpoint. The bodies of loops, macros and blocks begin with a call of `Meter.step`,
   put there in the syntax tree, as do all calls, filters and operators: it keeps the deadline and the sum of
   everything made.

This module imports Jinja (0.05 s); `chat.py` imports it when a template is first used.
"""

from __future__ import annotations

import json
import re
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_join, make_attrgetter
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer

SECONDS = 1.5  # of this thread's processor time, so that a busy machine stops nobody; real templates take milliseconds
HEAVIEST = 8_000_000  # characters and elements of one value: about two million tokens of text
TOTAL_BYTES = 512_000_000  # of everything made in one rendering; more is never alive at once
LONGEST_NUMBER = 100_000  # bits
WIDEST = 1_000_000  # of an integer argument that a filter or a method of text might take for a width

# Filters whose cost grows faster than their input and that no chat template has a use for.
_WITHOUT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_CODECS = ("utf-8", "utf8", "ascii", "latin-1")  # punycode and idna take quadratic time


class LimitError(Exception):
    """A template went past its limits."""


class Meter:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + SECONDS
        self._made = 0
        # Containers are immutable to the template, so they are weighed once; keeping them keeps their ids theirs.
        self._weights: dict[int, tuple[Any, int]] = {}

    def step(self, size: int = 0) -> str:
        """A checkpoint; `size` bytes are about to be made."""
        self._made += size
        if time.thread_time() > self._deadline:
            raise LimitError(f"it does not end within {SECONDS} s")
        if self._made > TOTAL_BYTES:
            raise LimitError(f"it makes more than {TOTAL_BYTES // 10**6} MB")
        return ""

    def expect(self, weight: float) -> None:
        """A value of this weight is about to be made."""
        if weight > HEAVIEST:
            raise LimitError(f"it makes a value of more than {HEAVIEST} characters or elements")
        self.step()

    def hold(self, value: Any) -> Any:
        """A value has been made: the same value, accounted for."""
        weight = self.weigh(value)
        self.expect(weight)
        self.step(sys.getsizeof(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0)
        return value

    def weigh(self, value: Any) -> int:
        """Characters and elements in a value; parts that occur twice count twice."""
        if isinstance(value, (str, bytes)):
            return 1 + len(value)
        if isinstance(value, int):
            if value.bit_length() > LONGEST_NUMBER:
                raise LimitError("it computes with numbers of more than 30,000 digits")
            return 1
        if isinstance(value, Mapping):
            parts: Iterable[Any] = (part for item in value.items() for part in item)
        elif isinstance(value, (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))):
            parts = value
        else:
            return 1
        known = self._weights.get(id(value))
        if known is None:
            weight = 1
            for part in parts:
                weight += self.weigh(part)
                if weight > HEAVIEST:
                    break
            known = self._weights[id(value)] = (value, weight)
        return known[1]


# --- what single steps may make -------------------------------------------------------------------------------------


def _expect_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    if operator == "+":
        meter.expect(meter.weigh(left) + meter.weigh(right))
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and not isinstance(sequence, (int, float)):
                meter.expect(meter.weigh(sequence) * max(count, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > LONGEST_NUMBER:
            raise LimitError("it computes with numbers of more than 30,000 digits")
    elif operator == "%" and isinstance(left, (str, bytes)):
        _expect_percent(meter, left, right)


def _expect_percent(meter: Meter, template: str | bytes, values: Any) -> None:
    text = template.decode("latin-1") if isinstance(template, bytes) else template
    if re.search(r"%(?:\([^)]*\))?[-+ #0]*(?:\*|\d{5}|\d*\.(?:\*|\d{5}))", text):
        raise LimitError("it formats text with a width of more than 9999 or of no fixed size")
    meter.expect(len(text) + text.count("%") * (9999 + meter.weigh(values)) if "%" in text else 0)


def _expect_format(meter: Meter, template: str, values: Any) -> None:
    weight = meter.weigh(values)
    fields = 0
    for _, name, spec, _ in string.Formatter().parse(template):
        fields += name is not None
        if spec and ("{" in spec or re.search(r"\d{5}", spec)):
            raise LimitError("it formats text with a width of more than 9999 or of no fixed size")
    meter.expect(len(template) + fields * (9999 + weight))


def _expect_method(meter: Meter, text: str | bytes, method: str, args: tuple[Any, ...]) -> None:
    """Methods of text whose result can be longer than all that goes into them."""
    if any(isinstance(arg, int) and abs(arg) > WIDEST for arg in args):
        raise LimitError(f"it calls {method} with a number of more than {WIDEST}")
    if method == "replace" and len(args) >= 2:
        meter.expect(len(text) + _count(text, args[0]) * meter.weigh(args[1]))
    elif method == "join" and args:
        parts = args[0]
        meter.expect(meter.weigh(parts) + _length(parts) * (1 + len(text)))
    elif method == "expandtabs":
        meter.expect(len(text) * (1 + max([8, *(arg for arg in args if isinstance(arg, int))])))
    elif method == "translate" and args:
        meter.expect(len(text) * meter.weigh(args[0]))
    elif method in ("encode", "decode") and args and str(args[0]).lower() not in _CODECS:
        raise LimitError(f"it uses the codec {str(args[0])!r}; templates have {', '.join(_CODECS)}")


def _count(text: Any, part: Any) -> int:
    return int(text.count(part)) if isinstance(part, type(text)) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _expect_filter(meter: Meter, name: str, value: Any, args: tuple[Any, ...]) -> None:
    if any(isinstance(arg, int) and abs(arg) > WIDEST for arg in args) and name not in ("default", "d"):
        raise LimitError(f"it calls the filter {name} with a number of more than {WIDEST}")
    weight = meter.weigh(value)
    if name == "replace" and len(args) >= 2:
        text, old, new = str(value), str(args[0]), str(args[1])
        meter.expect(len(text) + text.count(old) * len(new))
    elif name == "indent":
        width = args[0] if args else 4
        meter.expect(weight + (str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
    elif name == "format":
        _expect_percent(meter, str(value), args)
    elif name == "round" and args and isinstance(args[0], int) and abs(args[0]) > 1000:
        raise LimitError("it rounds to more than 1000 digits")
    meter.step()


# --- filters and globals as transformers has them ---------------------------------------------------------------------


@pass_context
def _tojson(
    context: Context, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """json.dumps without HTML escapes (transformers' filter). In pieces: indentation multiplies with depth."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
        return encoder.encode(value)
    if isinstance(indent, int) and indent > 9999:
        raise LimitError("it indents JSON by more than 9999")
    pieces = []
    for piece in encoder.iterencode(value):
        _meter(context).step(len(piece))
        pieces.append(piece)
    return "".join(pieces)


@pass_context
def _join(context: Context, value: Any, d: str = "", attribute: Any = None) -> str:
    meter = _meter(context)
    parts = []
    size = 0
    for part in value:
        size += meter.weigh(part) + len(str(d))
        meter.expect(size)
        parts.append(part)
    return do_join(context.eval_ctx, parts, d, attribute)


@pass_context
def _sum(context: Context, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Adds one by one through the metered operator: `sum` of lists is quadratic."""
    meter = _meter(context)
    items = value if attribute is None else map(make_attrgetter(context.environment, attribute), value)
    for item in items:
        _expect_operator(meter, "+", start, item)
        start = meter.hold(start + item)
    return start


def _meter(context: Context) -> Meter:
    assert isinstance(context.environment, Sandbox)
    return context.environment.meter


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    if len(layout) > 1000:
        raise LimitError("it formats the date with more than 1000 characters")
    return datetime.now().strftime(layout)


class _Namespace(Namespace):
    """`namespace()` without names that begin with an underscore, as transformers restricts it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # like Jinja's, so that namespace(self=...) works
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # Jinja's would print all it holds, past every limit
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}; names must not begin with an underscore")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


# --- the environment ------------------------------------------------------------------------------------------------


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, for the loss mask of training."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it so

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Macro) -> str:
        environment: Any = self.environment
        text: str = caller()
        environment.generations.append((environment.written, text))
        return text


class _Checkpoints(NodeTransformer):
    """Puts checkpoints into a template's syntax tree (rule 2), and makes literals and `~` pass the meter (rule 1).

    They are reached through the environment, where the template cannot redefine them.
    """

    def visit_For(self, node: nodes.For) -> Node:  # noqa: N802
        return self._begin_body(node)

    def visit_Macro(self, node: nodes.Macro) -> Node:  # noqa: N802
        return self._begin_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> Node:  # noqa: N802
        return self._begin_body(node)

    def visit_Block(self, node: nodes.Block) -> Node:  # noqa: N802
        return self._begin_body(node)

    def visit_Concat(self, node: nodes.Concat) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _call("hold", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _call("hold", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx == "store" else _call("hold", [node], node.lineno)

    def _begin_body(self, node: Any) -> Node:
        self.generic_visit(node)
        # The body's own text is written without passing the meter.
        literal = sum(len(data.data.encode()) for part in node.body for data in part.find_all(nodes.TemplateData))
        step = nodes.ExprStmt(_call("step", [nodes.Const(literal)], node.lineno)).set_lineno(node.lineno)
        node.body.insert(0, step)
        return node


def _call(attribute: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(attribute), arguments, [], None, None)
    call.set_lineno(line, override=True)
    return call


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, metered. One is made for each rendering."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=_finalize)
        self.meter = Meter()
        self.generations: list[tuple[int, str]] = []  # (characters written before it, its text)
        self.written = 0
        self.filters = dict(_filters())
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace, "dict": _dict}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Checkpoints().visit(tree)
        return tree

    def run(self, code: Any, variables: Mapping[str, Any]) -> Iterator[str]:
        """Renders compiled code piece by piece."""
        template = self.template_class.from_code(self, code, self.make_globals(None))
        for piece in template.generate(variables):
            self.meter.step(len(piece))
            self.written += len(piece)
            yield piece

    # What _Checkpoints calls.

    def step(self, size: int) -> str:
        return self.meter.step(size)

    def hold(self, value: Any) -> Any:
        return self.meter.hold(value)

    def concatenate(self, *values: Any) -> str:
        self.meter.expect(sum(map(self.meter.weigh, values)))
        text: str = self.meter.hold("".join(map(str, values)))
        return text

    # What Jinja's compiled code calls.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _expect_operator(self.meter, operator, left, right)
        return self.meter.hold(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  the names must not clash with kwargs
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int, float)):
            args = tuple(map(_listed, args))
            text = owner if isinstance(owner, (str, bytes)) else ""
            _expect_method(__self.meter, text, __obj.__name__, (*args, *kwargs.values()))
        __self.meter.step()
        return __self.meter.hold(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def metered(*args: Any, **kwargs: Any) -> str:
            _expect_format(self.meter, value.__self__, [*args, *kwargs.values()])
            return safe(*args, **kwargs)

        return metered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Markup.striptags takes quadratic time.
        return attr != "striptags" and super().is_safe_attribute(obj, attr, value)


def _listed(value: Any) -> Any:
    """An iterator's elements, so that they can be weighed before they are joined."""
    return list(value) if isinstance(value, Iterator) else value


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """Every `{{ ... }}` passes here on its way out, also into a macro's or a block's buffer."""
    meter = _meter(context)
    meter.expect(meter.weigh(value))
    text = str(value)
    meter.step(sys.getsizeof(text))
    return text


@cache
def _filters() -> dict[str, Callable[..., Any]]:
    """Jinja's filters and transformers' `tojson`, metered."""
    own: dict[str, Callable[..., Any]] = {"tojson": _tojson, "join": _join, "sum": _sum}
    return {name: _metered(name, own.get(name, filter)) for name, filter in FILTERS.items() if name not in _WITHOUT_FILTERS}


def _metered(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that passes the meter. `pass_context` also keeps Jinja from running it while compiling."""
    wants = _PassArg.from_obj(filter)

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        if not isinstance(value, Undefined):
            _expect_filter(meter, name, value, (*args, *kwargs.values()))
        first = {_PassArg.context: context, _PassArg.eval_context: context.eval_ctx, _PassArg.environment: context.environment}
        return meter.hold(filter(*([first[wants]] if wants else []), value, *args, **kwargs))

    return metered
