"""A report as one page that needs no network: its text from page.html, its looks from page.css, what moves from page.js."""

from __future__ import annotations

import hashlib
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import jinja2
import plotly.offline
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from elsa_tune import __version__
from elsa_tune.errors import ElsaTuneError
from elsa_tune.generate import backends
from elsa_tune.measurement import Measurement
from elsa_tune.shell import screen
from elsa_tune.shell.report import figures
from elsa_tune.shell.report.contents import Chapter, Column, Contents
from elsa_tune.shell.report.figures import Figure
from elsa_tune.space import parse
from elsa_tune.tuning.report import Outcome

LANGUAGES = {"cpp": "c++", "cu": "cuda", "cl": "c", "py": "python"}
"""Suffix of a generated text -> what highlights it."""

STYLES = {"light": "default", "dark": "github-dark"}
"""Colours of code where a reader prefers the light, and the dark."""


@dataclass(frozen=True, slots=True)
class Code:
    """The generated text of winners, its name on the page, and how it is compiled."""

    anchor: str
    name: str
    text: Markup
    command: str


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter as the page shows it: its name there, its figures, and its winner's code or why there is none."""

    anchor: str
    chapter: Chapter
    figures: Sequence[Figure]
    code: Code | None
    no_code: str
    command: str


@dataclass(frozen=True, slots=True)
class Place:
    """A device as a layer knows it: its measured peaks, software, measurements by status, its problems, its roofline."""

    column: Column
    peaks: str
    software: str
    counts: str
    sections: Sequence[Section]
    roofline: Figure | None


class Writer:
    """Makes pages of contents, and keeps what it drew of a chapter as long as nothing new is measured of it."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[Column, str], tuple[int, list[Figure]]] = {}
        self._codes: dict[str, Code] = {}

    def page(self, contents: Contents, *, live: bool = False) -> str:
        """The whole page; a ``live`` one fetches its script and its news from who serves it."""
        self._codes = {}
        with figures.plain():
            places = [self._place(column, contents.of(column)) for column in contents.columns]
            rows = list(contents.side_by_side.items())
            compared = figures.ratios(rows, [str(column) for column in contents.columns]) if rows else None
        return _template("page.html").render(
            places=places, rows=rows, columns=contents.columns, compared=compared, codes=list(self._codes.values()), notes=contents.notes,
            anchors={(s.chapter.column, s.chapter.problem): s.anchor for place in places for s in place.sections},
            version=__version__, when=time.strftime("%Y-%m-%d %H:%M"), live=live, css=Markup(css()), js=Markup(text("page.js")),
            plotly=None if live else Markup(plotly_js()),
        )  # fmt: skip

    def _place(self, column: Column, chapters: Sequence[Chapter]) -> Place:
        counts = Counter(m.status for chapter in chapters for m in chapter.tried)
        told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
        return Place(
            column,
            _peaks(chapters),
            _software(chapters),
            told,
            [self._section(one) for one in chapters],
            figures.roofline(chapters),
        )

    def _section(self, chapter: Chapter) -> Section:
        name = (chapter.column, str(chapter.problem))
        if self._drawn.get(name, (0, []))[0] != len(chapter.tried):
            self._drawn[name] = (len(chapter.tried), figures.of(chapter))
        code, why = self._code(chapter.outcome)
        anchor = f"p-{_digest(str(chapter.column), str(chapter.problem))}"
        return Section(anchor, chapter, self._drawn[name][1], code, why, chapter.outcome.command)

    def _code(self, outcome: Outcome) -> tuple[Code | None, str]:
        """The winner's generated text, each once on a page, or why there is none."""
        if outcome.winner is None:
            return None, "no winner yet"
        try:
            variant = parse(outcome.winner.variant)
            source = backends.get(variant.backend).source(variant, outcome.problem)
            command = backends.get(variant.backend).command(variant) if source else []
        except ElsaTuneError as error:  # another version's, or a compiler that is not here
            return None, str(error)
        if source is None:
            return None, "torch's own kernel; nothing is generated"
        if source.digest not in self._codes:
            compiled = f"{shlex.join(command)} kernel.{source.suffix} -o kernel.so" if command else ""
            name = f"{variant} for {outcome.problem.family}"
            self._codes[source.digest] = Code(
                f"c-{source.digest}", name, _highlighted(source.text, source.suffix), compiled
            )
        return self._codes[source.digest], ""


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


@cache
def _highlighted(text: str, suffix: str) -> Markup:
    return Markup(highlight(text, get_lexer_by_name(LANGUAGES[suffix]), HtmlFormatter(nowrap=True)))


def _peaks(chapters: Iterable[Chapter]) -> str:
    """The median of each peak that was measured beside problems, with its unit."""
    found: dict[str, list[float]] = {}
    for chapter in chapters:
        for name, value in chapter.peaks.items():
            found.setdefault(name, []).append(value)
    units = {"gbytes": ("memory", "GB/s")}
    told = [
        (*units.get(name, (figures.OPERATIONS.get(name, name), "GFLOP/s")), statistics.median(values))
        for name, values in sorted(found.items())
    ]
    return ", ".join(f"{name} {value:.0f} {unit}" for name, unit, value in told)


def _software(chapters: Iterable[Chapter]) -> str:
    """The newest word of each program that measurements depend on."""
    hidden = {"installation", "source", "era"}
    found: dict[str, str] = {}
    for m in sorted((m for chapter in chapters for m in chapter.tried), key=lambda m: m.created):
        found |= {name: word for name, word in m.provenance.items() if isinstance(word, str) and name not in hidden}
    return ", ".join(f"{name} {word}" for name, word in sorted(found.items()))


# The files that the page is made of.


def text(name: str) -> str:
    """A file beside this one."""
    return (resources.files("elsa_tune.shell.report") / name).read_text(encoding="utf-8")


@cache
def css() -> str:
    """How the page looks, code included."""
    light, dark = (HtmlFormatter(style=name).get_style_defs("pre.code") for name in STYLES.values())
    return f"{text('page.css')}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


@cache
def plotly_js() -> str:
    """What draws figures in a browser."""
    return str(plotly.offline.get_plotlyjs())


def _interval(outcome: Outcome) -> str:
    """A winner's ratio with its interval."""
    return screen.ratio(outcome.winner) if outcome.winner else "-"


def _trial(m: Measurement) -> str:
    return f"{m.ratio:.2f} [{m.ratio_low or 0:.2f}, {m.ratio_high or 0:.2f}]" if m.ratio else "-"


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(interval=_interval, trial=_trial, number=screen.number)
    return environment.get_template(name)
