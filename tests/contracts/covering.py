"""Which kernels the contract runs: a covering array in which every two values of languages, parts and shapes meet in one kernel.

Values come from the registries of parts and from the search spaces, so a new file or value is drawn without anyone adding it
here. Laws say which rows can be; what no lawful variant covers is listed with a law's reason: python -m contracts.covering.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from allpairspy import AllPairs

from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import BadProblem
from elsa_tune.generate import backends, lawful
from elsa_tune.generate.backends import Law
from elsa_tune.order import ORDERS
from elsa_tune.parts import element, mask, state
from elsa_tune.problem import Problem
from elsa_tune.space import Axis, Space
from elsa_tune.variant import Value, Variant

Row = tuple[tuple[str, Value], ...]
ABSENT = "-"
"""Where a language has no axis of a kind: its own way, which no variant chooses."""


@dataclass(frozen=True)
class Language:
    """One language of kernels: the backend that writes it, devices whose laws it is drawn under (the first that allows a row),
    the values of axes that are this language, or small enough to run here, and by arithmetic what alone runs here."""

    backend: str
    devices: tuple[Device, ...]
    values: Mapping[str, tuple[Value, ...]]
    only: Mapping[str, Row] = field(default_factory=dict)


_BLOCKS = {
    "threads": (32, 64), "lanes": (4, 8), "rows": (1, 2), "keys": (2, 4), "slice": (0, 16), "vector": (2, 4, 8),
    "blocks": (0,), "registers": (0,),
}  # fmt: skip
_TILES = {"query_vectors": (1, 2, 3), "key_tile": (2, 4), "value_tile": (2, 4), "block_n": (16, 24), "prefetch": (0, 8)}
_PROGRAMS: Mapping[str, tuple[Value, ...]] = {
    "block_m": (16, 32), "block_n": (16, 32), "warps": (4,), "stages": (1,), "programs": (0, 1),
    "dot": ("half", "ieee", "fma", "tf32x3", "tf32"),  # which the interpreter knows
}  # fmt: skip
_INTERPRETED: Mapping[str, Row] = {"bf16": (("dot", "fma"),)}
"""Triton's interpreter multiplies the bits of bfloat16 tiles as whole numbers."""
_NVIDIA = Device("cuda", "some", "sm_90", 132), Device("cuda", "some", "sm_62", 2)
_AMD = Device("hip", "some", "gfx942", 304), Device("hip", "some", "gfx1030", 40)
_OPENCL = Device("opencl", "some", "shuffle0", 2)
LANGUAGES = {
    "cpp": Language("cpp", (host_cpu(),), {"isa": host_cpu().isas[:1], **_TILES}),
    "cuda": Language("cuda", _NVIDIA, {"dialect": ("cuda",), **_BLOCKS}),
    "hip": Language("cuda", _AMD, {"dialect": ("hip",), **_BLOCKS}),
    "opencl": Language("cuda", (_OPENCL,), {"dialect": ("opencl",), **_BLOCKS}),
    "triton": Language("triton", (_NVIDIA[0], _AMD[0]), _PROGRAMS, _INTERPRETED),
}
KINDS_OF_VARIANTS = ("scan", "state", "schedule", "exp")
KINDS_OF_FAMILIES = ("mask", "score")
"""In the order that a family spells them, beside its element."""
OF_GRADIENTS = ("grad_tile", "products", "packing")
"""Axes whose every value is drawn in the backward direction."""
_FORWARD_ALONE: Row = (("scan", "serial"), ("chunk", 1), ("head_parts", 1), ("workers", 1), ("state", "triple"))
"""What laws leave of the forward pass's axes in the backward direction: known, so that nobody looks through the others."""
AT_RUN_TIME = {"query", "heads", "layout"}
SHAPES = {
    "forward": ({"q_len": 512, "kv_len": 512, "heads": 4}, {"q_len": 1, "kv_len": 512, "heads": 4}),
    "backward": ({"q_len": 512, "kv_len": 512, "heads": 4}, {"q_len": 64, "kv_len": 64, "batch": 1 << 12, "heads": 4}),
}
"""For which laws are asked."""
DIMS = ("d16", "d40.v24", "d33.v17")
SEVERAL: Mapping[str, Mapping[str, tuple[Value, ...]]] = {
    "workers": {"one": (1,), "several": (2,)},
    "splits": {"one": (1,), "several": (4,)},
}


def _axis(language: str, kind: str) -> Axis | None:
    return next((axis for axis in Space.read(LANGUAGES[language].backend).axes if axis.name == kind), None)


def _names(kind: str) -> tuple[str, ...]:
    """The files of a kind of parts; none where there is no such kind yet."""
    package = f"elsa_tune.parts.{kind}"
    return tuple(import_module(package).names()) if find_spec(package) else ()


def _values_of(kind: str) -> list[Value]:
    """Of every language's axis of that name, and every part's; absent, where a language has no such axis."""
    axes = [_axis(language, kind) for language in LANGUAGES]
    found = dict.fromkeys([*(value for axis in axes if axis for value in axis.values), *_names(kind)])
    return [*found, *([ABSENT] if None in axes else [])]


def _arithmetics() -> list[str]:
    """Every element in every class of its own: fp32, fp32.strict ... Rows are filled up with what comes last: not with the finest, whose
    truth takes longest."""
    return [
        str(Problem(dtype=e, precision=c, head_dim=1).family)[: -len(".d1")]
        for e in sorted(element.names(), key=lambda name: element.get(name).unit)
        for c in element.get(e).classes
    ]


def _alone_and_together(kind: str) -> list[Value]:
    """Every part of a kind of which a family has several, and all of them together."""
    several = [name for name in _names(kind) if name != mask.NONE]
    return [*dict.fromkeys([*_names(kind), "+".join(several)])] if several else [mask.NONE]


@cache
def parameters(direction: str = "forward") -> dict[str, list[Value]]:
    """What a row says, in the order that laws speak up in, and the values it may take."""
    families: dict[str, list[Value]] = {kind: _alone_and_together(kind) for kind in KINDS_OF_FAMILIES}
    of_variants: dict[str, list[Value]] = {name: list(values) for name, values in SEVERAL.items()}
    if direction == "forward":
        of_variants |= {kind: _values_of(kind) for kind in KINDS_OF_VARIANTS}
    else:  # rows are filled up with what costs least
        families = {kind: sorted(values, key=lambda value: value == mask.NONE) for kind, values in families.items()}
        families["direction"] = [direction]
        of_variants = {"splits": of_variants["splits"], **{kind: [*offered("cpp", kind)] for kind in OF_GRADIENTS}}
    return dict(
        language=list(LANGUAGES) if direction == "forward" else ["cpp"],
        arithmetic=_arithmetics(),
        dims=list(DIMS),
        **families,
        **of_variants,
        query=["many", "one"],
        heads=["alone", "grouped"],
        layout=[*ORDERS, "unaligned"],
    )


def _direction(row: Mapping[str, Value]) -> str:
    return str(row.get("direction", "forward"))


def family_of(row: Mapping[str, Value]) -> Problem:
    """The family of a row. Raises BadProblem."""
    parts = [row["arithmetic"], row["dims"], *(row[kind] for kind in KINDS_OF_FAMILIES if row[kind] != mask.NONE)]
    parts += [row["direction"]] if "direction" in row else []
    return _parsed(".".join(map(str, parts)))


@cache
def _parsed(spelled: str) -> Problem:
    return Problem.parse(spelled)


@cache
def _narrowed(language: str, chosen: Row) -> Space:
    """The language's space with what a row fixes, the fewest values first: laws over these speak up early."""
    wanted, fixed = LANGUAGES[language].values, dict(chosen)

    def left(axis: Axis) -> tuple[Value, ...]:
        values = tuple(v for v in axis.values if v in wanted.get(axis.name, axis.values))
        if axis.name in SEVERAL and axis.name in fixed:
            return SEVERAL[axis.name].get(str(fixed[axis.name]), (fixed[axis.name],))
        return tuple(v for v in values if axis.name not in fixed or v == fixed[axis.name])

    space = Space.read(LANGUAGES[language].backend)
    return replace(
        space, axes=tuple(sorted((replace(a, values=left(a)) for a in space.axes), key=lambda a: len(a.values)))
    )


def _chosen(row: Mapping[str, Value]) -> Row:
    """What a row says of axes."""
    said = tuple((n, row[n]) for n in (*SEVERAL, *KINDS_OF_VARIANTS, *OF_GRADIENTS) if row.get(n, ABSENT) != ABSENT)
    said += _FORWARD_ALONE if "direction" in row else ()
    return said + LANGUAGES[str(row["language"])].only.get(str(row.get("arithmetic")), ())


@cache
def _asked(law: Law) -> set[str]:
    return set(inspect.signature(law).parameters)


@cache
def _law_against(language: str, chosen: Row, problem: Problem | None, device: Device) -> str:
    """What the laws say that speak of nothing else than what is fixed."""
    if problem and (reason := backends.get(LANGUAGES[language].backend).refusal(problem, device)):
        return reason
    space = _narrowed(language, chosen)
    known: dict[str, Any] = {a.name: a.values[0] for a in space.axes if len(a.values) == 1} | {"device": device}
    known |= {"problem": problem} if problem else {}
    for law in backends.get(space.backend).LAWS:
        names = _asked(law)
        if names <= set(known) and (reason := law(**{name: known[name] for name in names})):
            return f"{law.__name__}: {reason}"
    return ""


def doubt(row: Mapping[str, Value]) -> str:
    """Why no lawful variant has what a row, or the beginning of one, says; empty if nothing speaks against it so far."""
    return _doubt(tuple(row.items())) if "language" in row else ""


@cache
def _doubt(said: Row) -> str:
    row = dict(said)
    language = str(row["language"])
    for kind in (*KINDS_OF_VARIANTS, *OF_GRADIENTS):
        if kind in row and (row[kind] == ABSENT) != (_axis(language, kind) is None):
            return f"{language} has {'an' if row[kind] == ABSENT else 'no'} axis {kind}"
    try:
        problem = family_of(row) if {"arithmetic", "dims", *KINDS_OF_FAMILIES} <= set(row) else None
    except BadProblem as error:
        return str(error)
    if set(parameters(_direction(row))) - set(row) <= AT_RUN_TIME:
        return "" if variant_of(row) else "no lawful variant has everything at once"
    posed = [problem]
    if problem and problem.direction == "backward":  # whose laws speak of batches
        posed = [problem.reshaped(**shape) for shape in SHAPES[problem.direction]]
    cases = itertools.product(posed, LANGUAGES[language].devices)
    doubts = [_law_against(language, _chosen(row), one, device) for one, device in cases]
    return doubts[0] if all(doubts) else ""


@cache
def _some(language: str, chosen: Row, family: Problem, seed: int) -> Variant | None:
    backend, space = backends.get(LANGUAGES[language].backend), _narrowed(language, chosen)
    for device, shape in itertools.product(LANGUAGES[language].devices, SHAPES[family.direction]):
        problem = family.reshaped(**shape)
        if not backend.refusal(problem, device):
            found = next(lawful.variants(space, problem, device, rng=random.Random(seed)), None)
            if found is not None:
                return Space.read(space.backend).parse(str(found))
    return None


def variant_of(row: Mapping[str, Value], seed: int = 0) -> Variant | None:
    """A variant for a row, drawn at random from those that are lawful for some shape of its family."""
    return _some(str(row["language"]), _chosen(row), family_of(row), seed)


def offered(language: str, kind: str) -> tuple[Value, ...]:
    """The parts of a kind among which the language's variants choose; none where they have no such choice."""
    axis = _axis(language, kind)
    return axis.values if axis else ()


def summing(language: str) -> dict[str, Value]:
    """The choice of a state whose columns are sums, where a language chooses: equal weights and whole values leave nothing to round."""
    names = [one for one in offered(language, "state") if not state.get(str(one)).normalised]
    return {"state": names[0]} if names else {}


def variant_with(language: str, family: str, **axes: Value) -> Variant | None:
    """A small variant with those values that is lawful for some shape of a family; None where laws allow none."""
    problem = Problem.parse(family)
    return _some(language, (*axes.items(), *LANGUAGES[language].only.get(problem.dtype, ())), problem, 0)


def _first(fixed: Mapping[str, Value]) -> list[str]:
    """Parameters with the fixed ones first, so that what speaks against them is met first."""
    return list(dict.fromkeys(["language", *fixed, *parameters(_direction(fixed))]))


def _lawful(fixed: Mapping[str, Value]) -> bool:
    """Whether some row has those values. What is against values of axes alone is looked for before families are."""
    of_axes, values = {"language", *SEVERAL, *KINDS_OF_VARIANTS, *OF_GRADIENTS}, parameters(_direction(fixed))

    def can_be(row: dict[str, Value], names: list[str]) -> bool:
        if len(row) == len(names):
            return True
        name = names[len(row)]
        longer = ({**row, name: value} for value in ([fixed[name]] if name in fixed else values[name]))
        return any(not doubt(one) and can_be(one, names) for one in longer)

    names = _first(fixed)
    return can_be({}, [name for name in names if name in of_axes]) and can_be({}, names)


def _rows(known: list[list[Value]], fixed: Mapping[str, Value], n: int) -> Iterator[list[Value]]:
    """Rows with those values, each meeting as much as it can of what the known ones do not."""
    values = parameters(_direction(fixed))
    names = _first(fixed) if fixed else list(values)
    places = [list(values).index(name) for name in names]
    said = [[row[place] for place in places] for row in known]
    every = set(map(tuple, said))

    def possible(row: list[Value]) -> bool:
        chosen = dict(zip(names, row, strict=False))
        return tuple(row) in every or (all(chosen.get(k, v) == v for k, v in fixed.items()) and not doubt(chosen))

    for row in AllPairs([values[name] for name in names], possible, said, n):
        yield [value for _, value in sorted(zip(places, row, strict=True), key=lambda pair: pair[0])]


@cache
def drawn(n: int, language: str, direction: str = "forward") -> tuple[list[dict[str, Value]], dict[Row, str]]:
    """Rows in which every ``n`` values meet that can meet (in one language, if it is named); and those that cannot, each with a
    reason."""
    one: dict[str, Value] = {"language": language} if language else {}
    one |= {"direction": direction} if direction != "forward" else {}
    values_of = parameters(direction)
    rows, refused = list(_rows([], one, n)), dict[Row, str]()
    met = {several for row in rows for several in _together(row, n, direction)}
    for names in itertools.combinations(values_of, n):
        for chosen in itertools.product(*(values_of[name] for name in names)):
            values = tuple(zip(names, chosen, strict=True))
            if values in met or {**dict(values), **one} != {**one, **dict(values)}:
                continue
            if not _lawful({**dict(values), **one}):
                refused[values] = _why({**dict(values), **one})
                continue
            found = next(
                _rows(rows, {**dict(values), **one}, n)
            )  # allpairspy stops at the first row that brings nothing new
            rows.append(found)
            met.update(_together(found, n, direction))
    return [dict(zip(values_of, row, strict=True)) for row in rows], refused


@cache
def kernels(n: int = 2, language: str = "", direction: str = "forward") -> list[tuple[dict[str, Value], Variant]]:
    """Each row of drawn() and its variant: of a few drawn at random, the one with the most values of axes that no row before it has."""
    seen: set[tuple[str, str, Value]] = set()
    found = []
    for row in drawn(n, language, direction)[0]:
        some = [variant for seed in range(4) if (variant := variant_of(row, seed))]
        new = [{(str(row["language"]), *pair) for pair in variant.values} for variant in some]
        best = max(range(len(some)), key=lambda i: len(new[i] - seen))
        seen |= new[best]
        found.append((row, some[best]))
    return found


def _together(row: list[Value], n: int, direction: str) -> Iterator[Row]:
    return itertools.combinations(zip(parameters(direction), row, strict=True), n)


def _why(values: Mapping[str, Value]) -> str:
    """What speaks against the values in their language, or in each."""
    languages = [values["language"]] if "language" in values else list(LANGUAGES)
    reasons = {doubt({"language": language, **values}) for language in languages}
    return "; ".join(sorted(reasons - {""})) or "no lawful variant has them"


if __name__ == "__main__":
    for row, variant in kernels():
        print(*row.values(), variant)
    rows, refused = drawn(2, "")
    print(f"{len(rows)} kernels; {len(refused)} pairs that no lawful variant covers:")
    for ((one, value), (other, with_)), reason in refused.items():
        print(f"  {one} {value} with {other} {with_}: {reason}")
