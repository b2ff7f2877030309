"""Source: a variant rendered for a family. The only file that imports jinja2."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from elsa_tune import places

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, slots=True)
class Source:
    """Rendered code. ``digest`` is over the code without comments, so equal code is recognised under any name.

    A line that ends in an empty comment goes on in the next one: so long lines are broken without making another kernel of them.
    """

    text: str
    suffix: str
    digest: str


_C = re.compile(r"//.*|^[ \t]+", re.M)
_COMMENTS = {
    "cpp": _C,
    "cu": _C,
    "cl": _C,
    "py": re.compile(r'^\s*""".*?"""$|#[^\n]*', re.M | re.S),
}
"""What may change without changing what is computed, by language."""


def powers(n: int) -> list[int]:
    """1, 2, 4, ... below n."""
    return [1 << k for k in range((n - 1).bit_length())]


def halvings(n: int) -> list[int]:
    """n, n / 2, ... above 1."""
    return [n >> k for k in range(n.bit_length() - 1)]


def doublings(first: int, last: int) -> list[int]:
    """first, 2 first, ... up to last."""
    return [first << k for k in range((last // first).bit_length())]


def quoted(line: str) -> str:
    """A line as a C string literal, with its end."""
    escaped = line.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}\\n"'


def bits(cells: Iterable[int], back: int = 0) -> int:
    """A mask with a bit for each cell, moved back."""
    return sum(1 << (cell - back) for cell in cells)


@cache
def _environment() -> jinja2.Environment:
    """jinja2's, with the few functions that templates call."""
    import jinja2  # only rendering needs it: dispatch starts without

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(places.data("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals.update(powers=powers, halvings=halvings, doublings=doublings, bits=bits)
    environment.filters["quoted"] = quoted
    return environment


def write(template: str, context: Mapping[str, Any]) -> str:
    """The text of ``templates/<template>``; a name the context lacks is an error that gives the template's line."""
    return re.sub(r"\n{3,}", "\n\n", _environment().get_template(template).render(context))


def render(template: str, context: Mapping[str, Any]) -> Source:
    """Render ``templates/<template>``; a name the context lacks is an error that gives the template's line."""
    text = write(template, context)
    suffix = template.removesuffix(".j2").rpartition(".")[2]
    code = _COMMENTS[suffix].sub("", text)
    code = "\n".join(line.rstrip() for line in code.splitlines() if line.strip())
    return Source(text, suffix, hashlib.sha256(code.encode()).hexdigest()[:20])


@cache
def version(backend: str) -> str:
    """A digest of every template of a backend: what tells what this version renders from what another does."""
    folder = places.data("templates") / backend
    texts = [path.read_bytes() for path in sorted(folder.rglob("*.j2"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:8]


def undeclared(template: str) -> set[str]:
    """Every name that a template and the ones it includes read from the context."""
    from jinja2 import meta, nodes

    names: set[str] = set()
    pending, seen = [template], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        tree = _environment().parse((places.data("templates") / name).read_text())
        names |= meta.find_undeclared_variables(tree)
        referenced = {t for t in meta.find_referenced_templates(tree) if t}
        for node in tree.find_all(nodes.Concat):  # "cpp/state/" ~ state.name ~ ".j2": any of the folder
            first = node.nodes[0]
            start = str(first.value) if isinstance(first, nodes.Const) else ""
            if start.endswith("/"):
                referenced |= {f"{start}{path.name}" for path in (places.data("templates") / start).glob("*.j2")}
        pending += sorted(referenced - seen)
    return names - set(_environment().globals)
