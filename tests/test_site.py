"""The documentation as a site: built once with warnings as errors, every link followed, some pages read in a browser from files."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from elsa_tune import errors
from elsa_tune.generate import backends
from elsa_tune.shell import cli
from elsa_tune.space import Space

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).resolve().parent.parent
KINDS = sorted(path.parent.name for path in (ROOT / "elsa_tune" / "parts").glob("*/__init__.py"))


@dataclass
class Read(HTMLParser):
    """What a page of the site says, names and refers to."""

    path: Path
    names: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    within: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            (self.links if tag == "a" else self.loaded).append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "code" in self.within:
            self.codes.add(data.strip())
        if {"td", "th"} & set(self.within) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site. Building it warns of nothing."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    told: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(listener)
    path = [*sys.path]
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(listener)
        sys.path[:] = path  # where macros are imported from
    assert not told, told
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Read]:
    """Every page of the site, read."""
    return {path: Read(path) for path in site.rglob("*.html")}


def test_every_link_and_asset_is_there_and_of_this_site(site: Path, pages: dict[Path, Read]) -> None:
    assert len(pages) > 40
    followed = 0
    for page in pages.values():
        for link in page.loaded:
            assert not urlsplit(link).scheme and not link.startswith("//"), (
                page.path,
                "is fetched from elsewhere",
                link,
            )
        if page.path.name == "404.html":  # its links are those of a server's root
            continue
        for link in filter(lambda link: not urlsplit(link).scheme, [*page.loaded, *page.links]):
            address = urlsplit(link)
            target = (page.path.parent / unquote(address.path)).resolve() if address.path else page.path
            assert target.is_file(), (page.path.relative_to(site), link)
            anchor = unquote(address.fragment)
            assert not anchor or anchor in pages[target].names | {"__consent"}, (page.path.relative_to(site), link)
            followed += 1
    assert followed > 2000


def test_styles_fetch_nothing(site: Path) -> None:
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles
    for style in styles:
        assert not re.findall(r"@import|url\(\s*[\"']?(?:https?:)?//", style)


def test_the_reference_says_what_the_program_has(site: Path, pages: dict[Path, Read]) -> None:
    """Each part, axis, command, option and exception, with words beside it."""

    def page(name: str) -> Read:
        return pages[site / "reference" / f"{name}.html"]

    def described(name: str) -> dict[str, str]:
        return {row[0]: "".join(row[1:]).strip() for row in page(name).rows}

    for name in backends.names():
        for axis in Space.read(name).axes:
            assert any(row[0] == axis.name and row[-1] == axis.meaning for row in page("axes").rows), (name, axis.name)
        for law in backends.get(name).LAWS:
            assert described("axes")[law.__name__], law
    for kind in KINDS:
        for part in import_module(f"elsa_tune.parts.{kind}").names():
            told = [row for row in page("masks").rows + page("parts").rows if row[0].startswith(part)]
            assert any(len(" ".join(row[1:])) > 20 for row in told), (kind, part)
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.ElsaTuneError):
            assert described("errors")[error.__name__], error
    commands = page("commands").codes
    for name, command in _commands(cli.main, "elsa-tune"):
        assert name in commands, name
        assert all(set(option.opts) <= commands for option in command.params if option.param_type_name == "option"), (
            name
        )


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _commands(below, f"{path} {name}")


def test_every_public_name_has_a_section(site: Path, pages: dict[Path, Read]) -> None:
    import elsa_tune

    named = pages[site / "reference" / "python.html"].names
    assert {f"elsa_tune.{name}" for name in elsa_tune.__all__ if not name.startswith("_")} <= named


def test_formulas_are_drawn(site: Path) -> None:
    text = (site / "how-it-works.html").read_text()
    assert text.count("<math") > 20
    assert "arithmatex" not in text and "$$" not in text


READ = (
    "index",
    "tutorial",
    "install",
    "gallery",
    "how-it-works",
    "performance",
    "reference/masks",
    "reference/axes",
    "reference/commands",
    "reference/python",
    "gpus",
)
"""Those with the widest tables, formulas, signatures and code."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_read_on_a_telephone(site: Path, browser: Any, scheme: str) -> None:
    """From files, 360 pixels wide: nothing scrolls sideways, nothing is fetched, nothing complains; colours follow the system."""
    window = browser.new_context(viewport={"width": 360, "height": 800}, color_scheme=scheme)
    page, told = window.new_page(), list[str]()
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith(("file:", "data:", "about:")) else told.append(asked.url)
    )
    for name in READ:
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 128
        assert dark == (scheme == "dark"), (name, ground)
        pictures = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        assert not pictures, (name, pictures)
    window.close()
    assert not told, told


def test_search_answers_from_files(site: Path, browser: Any) -> None:
    """A word is typed, and the first result opened: a page that holds it."""
    window = browser.new_context(viewport={"width": 1300, "height": 900})
    page, told = window.new_page(), list[str]()
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto((site / "index.html").as_uri())
    page.locator("input.md-search__input").click()
    page.keyboard.type("hillis_steele")
    found = page.locator("a.md-search-result__link").first
    found.wait_for(timeout=20_000)
    found.click()
    page.wait_for_url(re.compile(r"\.html\?h="))
    assert "hillis_steele" in page.locator("article").inner_text()
    window.close()
    assert not told, told
