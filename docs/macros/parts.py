"""Tables of parts, from their registries: what each is, what it takes, and which languages have it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from math import frexp
from typing import Any

from elsa_tune import order
from elsa_tune.generate import backends
from elsa_tune.generate.laws import has_text
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import scan as scans
from elsa_tune.parts import score as scores
from elsa_tune.parts.bound import EVERY_KEY, ZERO
from elsa_tune.parts.mask import Mask
from elsa_tune.parts.operand import STATE, Array, Number
from elsa_tune.parts.scan._base import depth
from elsa_tune.parts.score import Score

from ._markdown import code, said, table


def mask_table() -> str:
    """Every mask: which keys, as a sentence, as bounds and as a picture, a line a position; operands."""
    found = (masks.of_one_file(name) for name in masks.names())
    rows = ([code(one.name) + _picture(one), _told("mask", one, _bounds(one), _operands(one))] for one in found)
    return table(["mask", "the query at a position sees"], rows)


def score_table() -> str:
    """Every score: what it makes of a score, and operands."""
    found = (scores.of_one_file(name) for name in scores.names())
    return table(["score", "what becomes of a score"], ([code(o.name), _told("score", o, _operands(o))] for o in found))


def element_table() -> str:
    """Every element: torch's dtype, that of its states, classes, backends that have it."""
    heads = ["element", "torch's dtype", "states", "classes", "backends", "what it is"]
    found = (elements.get(name) for name in elements.names())
    facts = ((o, [code(o.name), o.torch, o.state, code(*o.classes), _backends("element", o.name)]) for o in found)
    return table(heads, ([*row, _docstring("element", one.name)] for one, row in facts))


def precision_table() -> str:
    """Every class of arithmetic: whose it is, its unit, products."""
    found = [(element, one) for element in map(elements.get, elements.names()) for one in element.precisions]
    rows = (
        [code(one.name), code(of.name), f"$2^{{{_power(one.unit)}}}$", said(one.title, one.name)] for of, one in found
    )
    return table(["class", "element", "$u$", "products"], rows)


def part_table(kind: str) -> str:
    """Every part of a kind that languages have texts of: what it is, and which have one."""
    registry = import_module(f"elsa_tune.parts.{kind}")
    found = (registry.get(name) for name in registry.names())
    return table(
        [kind, "what it is", "backends"], ([code(o.name), _told(kind, o), _backends(kind, o.name)] for o in found)
    )


def scan_table(n: int = 64) -> str:
    """Every scan: what it is, and depth and merges of the total of n states."""
    found = [(scan, scan.total(n)) for scan in map(scans.get, scans.names())]
    rows = (
        [code(scan.name), _told("scan", scan), str(depth(total, n)), str(sum(one.merges(n) for one in total))]
        for scan, total in found
    )
    return table(["scan", "what it is", f"depth of {n}", "merges"], rows)


def order_table() -> str:
    """Every memory order."""
    return table(["order", "memory"], ([code(name), said(what, name)] for name, what in order.ORDERS.items()))


def _told(kind: str, part: Any, *facts: str) -> str:
    """A part's title, what its file says, and facts, a line each."""
    return "<br>".join(filter(None, (f"**{part.title}**", _docstring(kind, part.name), *facts)))


def _docstring(kind: str, name: str) -> str:
    return said(import_module(f"elsa_tune.parts.{kind}.{name}").__doc__, f"{kind} {name}")


def _power(unit: float) -> int:
    return frexp(unit)[1] - 1


def _backends(kind: str, name: str) -> str:
    """Backends whose language has a text of a part."""
    return code(*(one for one in backends.candidates() if has_text(one, kind, name)))


def _bounds(mask: Mask) -> str:
    low = "" if mask.low == ZERO else f"{mask.low.text} <= "
    high = "" if mask.high == EVERY_KEY else f" < {mask.high.text}"
    return code(f"{low}key{high}") if low or high else ""


def _picture(mask: Mask) -> str:
    """Its first example."""
    return f"<br><code>{'<br>'.join(mask.picture.split())}</code>" if mask.picture else ""


def _operands(part: Mask | Score) -> str:
    numbers = (_number(one, getattr(part, "allowed", {})) for one in part.operands if isinstance(one, Number))
    return "<br>".join([*numbers, *map(_array, part.arrays)])


def _number(one: Number, allowed: Mapping[str, tuple[int, int]]) -> str:
    if one.kind == "real":
        return f"{code(one.name)}, a number above 0"
    least, most = allowed.get(one.name, (0, None))
    return f"{code(one.name)}, whole, from {least}{f' to {most}' if most else ''}"


def _array(one: Array) -> str:
    axes = [f"ceil({axis} / {one.per[axis]})" if axis in one.per else axis for axis in one.axes]
    each = ", each or 1" if one.placed else ""
    dtype = "floats as of states" if one.dtype == STATE else one.dtype
    return f"{code(one.name)}, {dtype} [{', '.join(axes)}]{each}"
