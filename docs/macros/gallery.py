"""Kernels as the generator writes them, for pages: whole, or what one has that another has not."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from elsa_tune.device import Device, named
from elsa_tune.errors import KernelMissing
from elsa_tune.generate import backends, lawful
from elsa_tune.generate.render import Source
from elsa_tune.problem import Problem
from elsa_tune.shell.report import page
from elsa_tune.space import Space
from elsa_tune.variant import Value, Variant

DEVICES = ("zen5", "sm_86")
"""Whom kernels are written for: of each backend the first that it serves."""

LANGUAGES = {"cpp": "C++", "cuda": "CUDA C", "triton": "Triton"}
"""What readers call the language of a backend, where its name is not that."""

Axes = Mapping[str, Value]


@dataclass(frozen=True)
class _Shown:
    """A kernel on a page."""

    variant: Variant
    problem: Problem

    @property
    def source(self) -> Source:
        source = backends.get(self.variant.backend).source(self.variant, self.problem)
        assert source is not None, f"{self.variant.backend} writes no source"
        return source

    @property
    def command(self) -> str:
        return f"elsa-tune show {self.variant} {self.problem.family}"


def kernels(problem: str, axes: Axes | None = None) -> str:
    """The kernel of a problem, a tab for each language: of the first variant that a search would try there, or the lawful one nearest to it
    that has these axis values."""

    def whole(backend: str, device: Device) -> str:
        shown = _first(backend, Problem.parse(problem), device, axes or {})
        text, suffix = shown.source.text, shown.source.suffix
        return _fenced(shown.command, "sh") + _folded(
            f"the whole kernel, {len(text.splitlines())} lines", text, page.LANGUAGES[suffix]
        )

    return _tabs(whole)


def changes(problem: str, than: str = "", axes: Axes | None = None, without: Axes | None = None) -> str:
    """What the kernel of ``kernels(problem, axes)`` has that another has not, a tab for each language: the one of the problem ``than`` (by
    default the same), whose variant is the lawful one nearest to it that has the values ``without``."""

    def changed(backend: str, device: Device) -> str:
        shown = _first(backend, Problem.parse(problem), device, axes or {})
        other = _nearest(shown.variant, Problem.parse(than or problem), device, without or {})
        lines = _difference(other.source.text, shown.source.text)
        counted = sum(line.startswith("+") for line in lines)
        text = _fenced(f"diff <({other.command}) \\\n     <({shown.command})", "sh")
        return text + _folded(f"{counted} lines that the other has not", "\n".join(lines), "diff")

    return _tabs(changed)


def _tabs(content: Callable[[str, Device], str]) -> str:
    """What each language shows, or why it has nothing to show."""
    tabs = []
    for backend in backends.candidates():
        device = next(d for d in map(named, DEVICES) if backends.get(backend).refusal(lawful.PLAIN, d) is None)
        try:
            text = content(backend, device)
        except KernelMissing as error:
            text = f"Nothing: {error}.\n"
        tabs.append(
            f'=== "{LANGUAGES.get(backend, backend)}"\n\n' + textwrap.indent(f"For {device.arch}.\n\n{text}", "    ")
        )
    return "\n".join(tabs)


def _first(backend: str, problem: Problem, device: Device, wanted: Axes) -> _Shown:
    """The first variant of a search, or the lawful one nearest to it that has the wanted values. Raises KernelMissing."""
    if reason := backends.get(backend).refusal(problem, device):
        raise KernelMissing(reason)
    space = Space.read(backend)
    start = (lawful.starts(space, problem, device) or [next(lawful.variants(space, problem, device))])[0]
    return _nearest(start, problem, device, wanted)


def _nearest(variant: Variant, problem: Problem, device: Device, wanted: Axes) -> _Shown:
    """The lawful variant nearest to another that has the wanted values. Raises KernelMissing."""
    space = Space.read(variant.backend)
    values = {axis.name: axis.values for axis in space.axes}
    for name, value in wanted.items():
        if value not in values.get(name, ()):
            raise KernelMissing(
                f"there the axis `{name}` has no `{value}`" if name in values else f"there is no axis `{name}` there"
            )
    axes = tuple(replace(axis, values=(wanted[axis.name],)) if axis.name in wanted else axis for axis in space.axes)
    found = next(lawful.variants(replace(space, axes=axes), problem, device, {**variant.axes, **wanted}), None)
    if found is None:
        raise KernelMissing(f"no law allows {', '.join(f'`{name} = {value}`' for name, value in wanted.items())}")
    return _Shown(space.variant(found.axes), problem)


def _difference(old: str, new: str) -> list[str]:
    """A unified difference without its header, nor the lines that say which command renders a text."""
    before, after = ([line for line in text.splitlines() if "elsa-tune" not in line] for text in (old, new))
    return [line for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:] if line.strip()]


def _folded(title: str, text: str, lexer: str) -> str:
    return f'???+ example "{title}"\n\n' + textwrap.indent(_fenced(text, lexer), "    ")


def _fenced(text: str, lexer: str) -> str:
    return f"```{lexer}\n{text.rstrip()}\n```\n\n"
