"""A bound of a mask: a small expression of integers, read once, written for every language, computed by Python and arrays.

Names, integers, + - *, floor division by a positive integer, min and max. Division floors in every language, C and Triton included.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from typing import Any

Two = Callable[[Any, Any], Any]

POSITION = "position"
"""What a bound grows with."""


@dataclass(frozen=True)
class Algebra:
    """What operations mean: arithmetic, or text of a language. ``least`` and ``most`` take two operands, ``divide`` floors."""

    name: Callable[[str], Any]
    number: Callable[[int], Any]
    add: Two
    subtract: Two
    multiply: Two
    divide: Two
    least: Two
    most: Two


def _infix(sign: str) -> Two:
    return lambda x, y: f"({x} {sign} {y})"


def _call(function: str) -> Two:
    return lambda x, y: f"{function}({x}, {y})"


def _text(names: Mapping[str, str], divide: Two, least: Two, most: Two) -> Algebra:
    add, subtract, multiply = map(_infix, "+-*")
    return Algebra(lambda name: names.get(name, name), str, add, subtract, multiply, divide, least, most)


def _least(x: Any, y: Any) -> Any:
    return (x + y - abs(x - y)) // 2  # of integers and arrays alike


def _most(x: Any, y: Any) -> Any:
    return (x + y + abs(x - y)) // 2


NOTATIONS: dict[str, tuple[Two, Two, Two]] = {
    "python": (_infix("//"), _call("min"), _call("max")),
    "c": (_call("floor_divide"), _call("least"), _call("most")),
    "triton": (_call("floor_divide"), _call("tl.minimum"), _call("tl.maximum")),
}
"""Division, minimum and maximum of each notation. C's three functions, and Triton's division, are the language's own to define."""

_OPERATIONS: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.FloorDiv: "divide",
}
_CHOICES = {"min": "least", "max": "most"}


@dataclass(frozen=True)
class Bound:
    """``text`` as it was written; two bounds are equal if their texts are."""

    text: str

    def __post_init__(self) -> None:
        _check(_tree(self.text), self.text)

    @cached_property
    def names(self) -> frozenset[str]:
        """What the expression is of."""
        called = {node.func for node in ast.walk(_tree(self.text)) if isinstance(node, ast.Call)}
        names = [node for node in ast.walk(_tree(self.text)) if isinstance(node, ast.Name)]
        return frozenset(node.id for node in names if node not in called)

    def value(self, **values: Any) -> Any:
        """The expression of these integers, numpy arrays or tensors of integers."""
        operations = operator.add, operator.sub, operator.mul, operator.floordiv
        return _folded(_tree(self.text), Algebra(values.__getitem__, int, *operations, _least, _most))

    @property
    def first_beyond(self) -> Bound:
        """The first position at which this bound lies beyond ``key``, as an expression of key and of what the bound is of: at most 0
        where it does at all, at least q_len where it does at none. Raises ValueError unless the expression is seen to grow."""
        return Bound(_first_beyond(_tree(self.text), "key", self.text))

    def written(self, notation: str, names: Mapping[str, str] | None = None) -> str:
        """The expression, fully parenthesised, in one of NOTATIONS; ``names`` says what its names are called there."""
        return str(_folded(_tree(self.text), _text(names or {}, *NOTATIONS[notation])))


def _first_beyond(node: ast.expr, key: str, text: str) -> str:
    """The first position at which ``node`` is larger than ``key``. What is of no position is so at all positions or at none."""

    def grows(part: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id == POSITION for n in ast.walk(part))

    if not grows(node):
        return f"min(max({key} - ({ast.unparse(node)}) + 1, 0), 1) * q_len"
    if isinstance(node, ast.Name):
        return f"{key} + 1"
    if isinstance(node, ast.Call):  # all of them are beyond, or one is
        assert isinstance(node.func, ast.Name)
        every = ", ".join(_first_beyond(part, key, text) for part in node.args)
        return f"{'max' if node.func.id == 'min' else 'min'}({every})"
    if isinstance(node, ast.BinOp):
        left, right = node.left, node.right
        if isinstance(node.op, ast.Add | ast.Mult) and not grows(left):
            left, right = right, left
        if not grows(right):
            n = ast.unparse(right)
            if isinstance(node.op, ast.Add):
                return _first_beyond(left, f"({key} - ({n}))", text)
            if isinstance(node.op, ast.Sub):
                return _first_beyond(left, f"({key} + ({n}))", text)
            if isinstance(node.op, ast.FloorDiv):
                return _first_beyond(left, f"(({key} + 1) * {n} - 1)", text)
            if isinstance(right, ast.Constant) and isinstance(right.value, int) and right.value > 0:
                return _first_beyond(left, f"({key} // {n})", text)
    raise ValueError(
        f"bound {text!r} is not seen to grow with the position: add to a position, subtract from it, multiply or divide it by a "
        "positive integer, and write it once in a sum"
    )


def least_of(bounds: list[Bound]) -> Bound:
    """The smallest of them everywhere."""
    return _joined("min", bounds)


def most_of(bounds: list[Bound]) -> Bound:
    """The largest of them everywhere."""
    return _joined("max", bounds)


def _joined(choice: str, bounds: list[Bound]) -> Bound:
    texts = list(dict.fromkeys(bound.text for bound in bounds))
    return Bound(texts[0] if len(texts) == 1 else f"{choice}({', '.join(texts)})")


@cache
def _tree(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _check(node: ast.AST, text: str) -> None:
    """Refuse what is no bound."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        if isinstance(node.op, ast.FloorDiv):
            by = node.right
            if not (isinstance(by, ast.Constant) and type(by.value) is int and by.value > 0):
                raise ValueError(f"bound {text!r} divides by what is no positive integer")
        parts: list[ast.expr] = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        parts = [node.operand]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CHOICES:
        if node.keywords or len(node.args) < 2:
            raise ValueError(f"bound {text!r}: {node.func.id} takes two expressions or more")
        parts = node.args
    elif isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int):
        parts = []
    else:
        raise ValueError(f"bound {text!r} may hold names, integers, + - *, // by a positive integer, min and max")
    for part in parts:
        _check(part, text)


def _folded(node: ast.expr, algebra: Algebra) -> Any:
    if isinstance(node, ast.BinOp):
        operation = getattr(algebra, _OPERATIONS[type(node.op)])
        return operation(_folded(node.left, algebra), _folded(node.right, algebra))
    if isinstance(node, ast.UnaryOp):
        return algebra.subtract(algebra.number(0), _folded(node.operand, algebra))
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return reduce(getattr(algebra, _CHOICES[node.func.id]), [_folded(x, algebra) for x in node.args])
    if isinstance(node, ast.Name):
        return algebra.name(node.id)
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    return algebra.number(node.value)


ZERO, EVERY_KEY = Bound("0"), Bound("kv_len")
"""Bounds that cost nothing."""
