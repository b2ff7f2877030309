"""A scan's network as a picture: a wire for each state, time downwards, a dot where another state is merged into one."""

from __future__ import annotations

from collections.abc import Sequence

from elsa_tune.parts.scan._base import Round, Scan

APART = 20
"""Between wires, and between steps."""

STYLE = ".wire{opacity:.3}.rest{opacity:.35}circle{fill:currentColor}"


def svg(scan: Scan, n: int = 16) -> str:
    """All prefixes of n states as SVG, on one line and in the colour of the text around it; what the total alone does without is pale."""
    rounds, kept = scan.prefixes(n), scan.total(n)
    drawn = list(zip(rounds, steps(rounds, n), strict=True))
    height = APART * (2 + max((step for _, step in drawn), default=0))
    body = "".join(f'<path class="wire" d="M{_x(i)} {APART // 2}V{height - APART // 2}"/>' for i in range(n))
    for r, step in drawn:
        merges = "".join(_merge(i - r.step, i, APART * step + APART // 2) for i in r.cells(n))
        body += f"<g>{merges}</g>" if r in kept else f'<g class="rest">{merges}</g>'
    title = f"<title>{scan.name}, {n} states: {scan.title}</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {APART * n} {height}" role="img" fill="none" stroke="currentColor">'
        f"{title}<style>{STYLE}</style>{body}</svg>"
    )


def steps(rounds: Sequence[Round], n: int) -> list[int]:
    """The step, from 1, in which each round can be done: after what it reads is written, not before what it overwrites is read."""
    written, read, found = [0] * n, [0] * n, list[int]()
    for r in rounds:
        step = max(max(1 + written[i], 1 + written[i - r.step], read[i]) for i in r.cells(n))
        for i in r.cells(n):
            written[i] = read[i - r.step] = step
        found.append(step)
    return found


def _x(cell: int) -> int:
    return APART * cell + APART // 2


def _merge(of: int, to: int, at: int) -> str:
    return f'<path d="M{_x(of)} {at - APART}L{_x(to)} {at}"/><circle cx="{_x(to)}" cy="{at}" r="3"/>'
