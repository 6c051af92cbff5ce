"""A Jinja sandbox in which a template can neither run for long nor make large values.

The template comes with the checkpoint and the values that it works on from clients, so neither may be able to hold up
a router. Loop turns, calls and filters are steps of a budget, in which long values count more; and what could make a
value much larger than its parts is estimated before it is done.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import cast

import jinja2
from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SIZE = 32 << 20             # characters of a string, entries of a list
MAX_INTEGER_BITS = 4096
_BASE_STEPS = 100_000           # some 50 ms
_STEPS_OF_MESSAGE = 500
_STEPS_OF_CALL = 5
_SIZE_OF_STEP = 1024            # characters that cost as much as a step
_NUMBER = re.compile(r"\d+")
_MAX_INDENT = 100
_MAX_DIGITS = 100       # that a number is rounded to
_PADDED = frozenset({"center", "ljust", "rjust", "zfill"})
_WIDENED = frozenset({"indent", "expandtabs"})
# These hand entries on; all other filters write their value out, with everything in it.
_KEEPS_ENTRIES = frozenset({
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list",
    "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum",
    "unique"})
_COMPARES_ENTRIES = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})


class TemplateLimitError(jinja2.TemplateError):
    """The template does too much."""


class _Budget:
    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def spend(self, num_steps: int) -> None:
        self.num_steps -= num_steps
        if self.num_steps < 0:
            raise TemplateLimitError("it takes too many steps")


_budget: ContextVar[_Budget] = ContextVar("_budget")       # of the rendering in this thread or task


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, extensions: Sequence[type[Extension]], filters: Mapping[str, Callable[..., object]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_written)
        del self.globals["lipsum"]
        self.filters = {name: _counted_filter(name, function) for name, function in {**self.filters, **filters}.items()}
        self.filters |= {"_turns": _turns, "_concatenated": _concatenated, "_compared": _compared}
        self.tests = {name: _counted_test(cast("Callable[..., object]", test)) for name, test in self.tests.items()}

    def limited_template(self, source: str) -> jinja2.Template:
        """Compile. Raises jinja2.TemplateError."""
        limit_steps(0, 0)       # the compiler does what is constant
        tree = _Rewriter().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def call(self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        _budget.get().spend(_STEPS_OF_CALL)
        method = getattr(__obj, "__wrapped__", __obj)       # the sandbox's own str.format wraps the real one
        subject = getattr(method, "__self__", None)
        if isinstance(subject, str):
            _check_growth(str(getattr(method, "__name__", "")), subject, (*args, *kwargs.values()))
        elif subject is not None:
            _written((*args, *kwargs.values()))     # they may be compared, or become keys
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, range):
            _budget.get().spend(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):    # most of what templates do
            size = len(left) + len(right)
            _budget.get().spend(1 + size // _SIZE_OF_STEP)
            _refuse_size(size)
            return left + right
        _budget.get().spend(1 + (_size(left) + _size(right)) // _SIZE_OF_STEP)
        _refuse_size(_size_of_result(operator, left, right))
        return super().call_binop(context, operator, left, right)


def limit_steps(num_messages: int, num_characters: int) -> None:
    """Give the rendering that begins now, in this thread or task, a budget of its own."""
    _budget.set(_Budget(_BASE_STEPS + num_messages * _STEPS_OF_MESSAGE + num_characters // 4))


class _Rewriter(NodeTransformer):
    """Loops, `~` and what is compared or a key become filters, which are functions of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter_unless_constant(node.expr, "_compared")
        for operand in node.ops:
            operand.expr = _filter_unless_constant(operand.expr, "_compared")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filter_unless_constant(node.key, "_compared")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = _filter_unless_constant(node.arg, "_compared")
        return node


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _filter_unless_constant(node: nodes.Expr, name: str) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, name)


@jinja2.pass_context        # which also keeps the compiler from doing it beforehand
def _turns(context: Context, values: Iterable[object]) -> Iterator[object]:
    budget = _budget.get()
    for value in values:
        budget.spend(1)
        yield value


@jinja2.pass_context
def _concatenated(context: Context, values: Sequence[object]) -> str:
    _written(values)
    return "".join(map(str, values))


@jinja2.pass_context
def _compared(context: Context, value: object) -> object:
    """Return the value if it can be compared and hashed in no time: lists may hold one another many times."""
    return value if isinstance(value, str) else _written(value)


def _counted_test(function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def counted(*args: object, **kwargs: object) -> object:
        for value in args:
            if isinstance(value, (list, tuple, dict)):
                _written(value)
        return function(*args, **kwargs)
    return counted


def _counted_filter(name: str, function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)      # with the mark of what else it wants to be given
    def counted(*args: object, **kwargs: object) -> object:
        values = (*args, *kwargs.values())
        if isinstance(values[0], (Context, EvalContext, Environment)):
            values = values[1:]
        _budget.get().spend(1 + sum(_size(value) for value in values) // _SIZE_OF_STEP)
        if name not in _KEEPS_ENTRIES:
            _check_growth(name, values[0], values[1:])
        elif name in _COMPARES_ENTRIES:
            _written(values[0])
        elif name in ("batch", "slice"):
            _refuse_size(_largest_integer(values[1:]))
            _budget.get().spend(_largest_integer(values[1:]))
        return function(*args, **kwargs)
    return counted


def _check_growth(name: str, subject: object, options: Sequence[object]) -> None:
    """Estimate what a method of a string, or a filter, returns. Raises TemplateLimitError."""
    written = _written_size((subject, *options))
    width = _largest_integer(options)
    text = subject if isinstance(subject, str) else ""
    if name in _PADDED:
        _refuse_size(written + width)
    elif name in _WIDENED:
        _refuse_size((width + written) * (1 + text.count("\n") + text.count("\t")))
    elif name in ("replace", "join"):
        longest = max((len(value) for value in (subject, *options) if isinstance(value, str)), default=0)
        _refuse_size(written + longest * max(_size(value) for value in (subject, *options)))
    elif name in ("format", "format_map"):
        _refuse_size(_formatted_size(text, options) + width)
    elif name == "round":
        _refuse_size(0 if width <= _MAX_DIGITS else MAX_SIZE + width)       # it may compute 10 ** width
    elif name == "wordwrap":
        _budget.get().spend(written // 16)                                  # a microsecond a character
    elif name == "tojson":
        _refuse_size(written * 6 if width <= _MAX_INDENT else MAX_SIZE + width)     # \\u00e9 for a letter
    else:
        _refuse_size(written)


def _largest_integer(values: Sequence[object]) -> int:
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _formatted_size(layout: str, values: Sequence[object]) -> int:
    widths = sum(int(number[:12]) for number in _NUMBER.findall(layout))
    if "*" in layout or "{}" in layout[1:]:     # a width that may come with the values
        widths += sum(abs(value) for value in values if isinstance(value, int))
    return len(layout) + widths + (layout.count("%") + layout.count("{")) * _written_size(values)


def _size_of_result(operator: str, left: object, right: object) -> int:
    match operator, left, right:
        case "+", (str() | list() | tuple()), (str() | list() | tuple()):
            return len(left) + len(right)
        case "*", (str() | list() | tuple()), int():
            return len(left) * right
        case "*", int(), (str() | list() | tuple()):
            return left * len(right)
        case "%", str(), _:
            return _formatted_size(left, right if isinstance(right, tuple) else (right,))
        case "*", int(), int():
            _refuse_bits(left.bit_length() + right.bit_length())
        case "**", int(), int():
            _refuse_bits(left.bit_length() * abs(right))
    return 0


def _written(value: object) -> object:
    """Let a value be written out if it is not too large."""
    _refuse_size(_written_size(value))
    return value


def _written_size(value: object) -> int:
    """Return about how many characters the value has when it is written out. Lists may hold one another many times, so
    the way through them is bounded, by the budget and by the size."""
    budget, size, rest = _budget.get(), 0, [value]
    while rest and size <= MAX_SIZE:
        found = rest.pop()
        size += _size(found)
        if isinstance(found, (list, tuple)):
            budget.spend(1)
            rest += found
        elif isinstance(found, dict):
            budget.spend(1)
            rest += (*found.keys(), *found.values())
    budget.spend(size // _SIZE_OF_STEP)
    return size


def _size(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _refuse_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE} characters or entries")


def _refuse_bits(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise TemplateLimitError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")
