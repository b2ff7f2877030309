"""Links that leave docs/: what they name gets a page of the site, so that a link that is right on a forge is right here too.

Markdown is shown as it is, a folder as its files, each other file as text. What a page that is made so links to gets a page in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = "repository"
"""Of the site, for what is not in docs/."""
TARGET = re.compile(r"(?<=\]\()(?!\w+:|#|/)[^)\s#]+")
FENCE = "~" * 10
HIDDEN = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for everything that pages link to outside docs/."""
    pending = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    made: dict[str, str] = {}
    while pending:
        path, text = pending.pop()
        for target in set(_outside(path, text)) - set(made):
            made[target] = _text(ROOT / target)
            pending.append((target, made[target]))
    for path, text in made.items():
        files.append(File.generated(config, _uri(path), content=HIDDEN + _linked(path, text)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to what has been made."""
    uri = page.file.src_uri
    return markdown if uri.startswith(f"{FOLDER}/") else _linked(f"docs/{uri}", markdown)


def _uri(path: str) -> str:
    """Of the page of a path in the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path}.md"


def _outside(path: str, text: str) -> Iterator[str]:
    """Paths in the repository, but not in docs/, that a text links to."""
    for target in TARGET.findall(text):
        found = normpath(join(dirname(path), target))
        if not found.startswith(("docs/", "..")) and (ROOT / found).exists():
            yield found


def _linked(path: str, text: str) -> str:
    """A text whose links lead from its page to the pages of what they name."""
    begin = dirname(_uri(path))

    def moved(found: re.Match[str]) -> str:
        target = normpath(join(dirname(path), found[0]))
        return relpath(_uri(target), begin or ".") if (ROOT / target).exists() else found[0]

    return TARGET.sub(moved, text)


def _text(path: Path) -> str:
    """What the page of a file or a folder says."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "".join(
            f"- [{one.name}]({path.name}/{one.name})\n" for one in sorted(path.iterdir()) if one.is_file()
        )
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else f"{title}{FENCE}{path.suffix.removeprefix('.')}\n{text}\n{FENCE}\n"
