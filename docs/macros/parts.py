"""Tables of parts, from their registries: what each is, what it takes, and which languages have it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
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
from elsa_tune.parts.operand import STATE, Array, Number, Operand
from elsa_tune.parts.scan._base import depth

from ._markdown import code, said, table


def mask_table() -> str:
    """Every mask: which keys, as a sentence, as bounds and as a picture, a line a position; operands."""
    rows = []
    for mask in (masks.of_one_file(name) for name in masks.names()):
        operands = _operands(mask.operands, mask.allowed)
        rows.append(
            [
                code(mask.name) + _picture(mask),
                _lines(_strong(mask.title), _bounds(mask), _told("mask", mask.name), operands),
            ]
        )
    return table(["mask", "the query at a position sees"], rows)


def score_table() -> str:
    """Every score: what it makes of a score, and operands."""
    found = (scores.of_one_file(name) for name in scores.names())
    rows = (
        [code(one.name), _lines(_strong(one.title), _told("score", one.name), _operands(one.operands))] for one in found
    )
    return table(["score", "what becomes of a score"], rows)


def element_table() -> str:
    """Every element: torch's dtype, that of its states, classes."""
    found = (elements.get(name) for name in elements.names())
    rows = [
        [
            code(one.name),
            one.torch,
            one.state,
            code(*one.classes),
            _languages("element", one.name),
            _told("element", one.name),
        ]
        for one in found
    ]
    return table(["element", "torch's dtype", "states", "classes", "backends", "what it is"], rows)


def precision_table() -> str:
    """Every class of arithmetic: whose it is, its unit, products."""
    rows = []
    for element in map(elements.get, elements.names()):
        for one in element.precisions:
            rows.append(
                [code(one.name), code(element.name), f"2^{_power(one.unit)}", said(one.title, f"class {one.name}")]
            )
    return table(["class", "element", "u", "products"], rows)


def part_table(kind: str) -> str:
    """Every part of a kind that languages have texts of: what it is, and which have one."""
    registry = import_module(f"elsa_tune.parts.{kind}")
    found = [registry.get(name) for name in registry.names()]
    rows = [[code(one.name), one.title, _languages(kind, one.name), _told(kind, one.name)] for one in found]
    return table([kind, "in short", "backends", "what it is"], rows)


def scan_table(n: int = 64) -> str:
    """Every scan: what it is, and depth and merges of the total of n states."""
    rows = []
    for scan in map(scans.get, scans.names()):
        total = scan.total(n)
        merges = sum(one.merges(n) for one in total)
        rows.append([code(scan.name), scan.title, str(depth(total, n)), str(merges), _told("scan", scan.name)])
    return table(["scan", "in short", f"depth of {n}", "merges", "what it is"], rows)


def order_table() -> str:
    """Every memory order."""
    return table(["order", "memory"], ([code(name), said(what, name)] for name, what in order.ORDERS.items()))


def _lines(*lines: str) -> str:
    return "<br>".join(filter(None, lines))


def _strong(title: str) -> str:
    return f"**{title}**"


def _told(kind: str, name: str) -> str:
    return said(import_module(f"elsa_tune.parts.{kind}.{name}").__doc__, f"{kind} {name}")


def _power(unit: float) -> int:
    return int(unit.hex().partition("p")[2])


def _languages(kind: str, name: str) -> str:
    """Backends whose language has a text of a part."""
    return code(*(one for one in backends.candidates() if has_text(one, kind, name)))


def _bounds(mask: Mask) -> str:
    low = "" if mask.low == ZERO else f"{mask.low.text} <= "
    high = "" if mask.high == EVERY_KEY else f" < {mask.high.text}"
    return code(f"{low}key{high}") if low or high else ""


def _picture(mask: Mask) -> str:
    """Its first example."""
    return f"<br><code>{'<br>'.join(mask.picture.split())}</code>" if mask.picture else ""


def _operands(operands: Iterable[Operand], allowed: Any = None) -> str:
    return _lines(*(_number(one, allowed or {}) if isinstance(one, Number) else _array(one) for one in operands))


def _number(one: Number, allowed: Any) -> str:
    least, most = allowed.get(one.name, (0, None))
    between = f"from {least} to {most}" if most else "from 0" if one.kind == "integer" else "above 0"
    return f"{code(one.name)}, {'whole' if one.kind == 'integer' else 'a number'} {between}"


def _array(one: Array) -> str:
    axes = [f"ceil({axis} / {one.per[axis]})" if axis in one.per else axis for axis in one.axes]
    each = ", each or 1" if one.placed else ""
    dtype = "floats of states" if one.dtype == STATE else one.dtype
    return f"{code(one.name)}, {dtype} [{', '.join(axes)}]{each}"
