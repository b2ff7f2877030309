"""Figures, drawn when the site is built: the networks of scans by the program itself, results from what benchmarks measured."""

from __future__ import annotations

import statistics

from elsa_tune.parts import scan as scans
from elsa_tune.problem import Problem

from ._markdown import code, table
from ._plot import Plot, powers
from ._results import TORCH, fastest, read

STATES = 16
"""Of the networks drawn."""


def networks() -> str:
    """Every scan strategy: its network, and what it costs, counted."""
    known = [scans.get(name) for name in scans.names()]
    figures = [_figure(scans.svg(scan, STATES), f"{scan.name}: {scan.title}") for scan in known]
    rows = []
    for scan in known:
        every, alone = scan.prefixes(STATES), scan.total(STATES)
        counts = [
            n for rounds in (every, alone) for n in (scans.depth(rounds, STATES), sum(r.merges(STATES) for r in rounds))
        ]
        rows.append([code(scan.name), *map(str, counts)])
    heads = [f"of {STATES} states", "depth of all prefixes", "merges", "depth of the total alone", "merges"]
    return "\n".join([*figures, "", table(heads, rows)])


def errors_drawn(name: str) -> str:
    """The largest error against the number of keys, and the bound."""
    errors = {who: {int(n): e for n, e in of.items()} for who, of in read(name)["errors"].items()}
    values = [e for of in errors.values() for e in of.values()]
    lengths = {float(n): _short(n) for of in errors.values() for n in of}
    plot = Plot("Error against the number of keys", lengths, powers(min(values), max(values)), "keys", "error / max|v|")
    for who, of in errors.items():
        plot.line(of.items(), who, "5 3" if who.startswith("bound") else "2 2" if who.startswith("torch") else "")
    return _figure(
        plot.svg(), f"Largest error relative to max|v|, on {read(name)['device']}; the bound is for logits as given."
    )


def errors_by_length(name: str) -> str:
    """The same in numbers."""
    errors = read(name)["errors"]
    lengths = next(iter(errors.values()))
    return table(
        ["keys", *(_short(int(n)) for n in lengths)],
        [[who, *(f"{of[n]:.1e}" for n in lengths)] for who, of in errors.items()],
    )


def roofline(name: str) -> str:
    """What was reached of what the device allows: the rate of every problem of a file against its operations for each byte moved."""
    lines = {p: (Problem.parse(p), line) for p, line in read(name)["results"].items()}
    peak, width = (
        statistics.median(line["limits"][limit] for _, line in lines.values()) for limit in ("gflops", "gbytes")
    )
    dots = {
        who: {
            p: (posed.flops / posed.bytes, peer["gflops"])
            for p, (posed, line) in lines.items()
            if (peer := fastest(line["peers"], names))
        }
        for who, names in {"elsa-tune": ("elsa-tune",), "torch's fastest": TORCH}.items()
    }
    along, rates = zip(*(dot for of in dots.values() for dot in of.values()), strict=True)
    x_ticks, y_ticks = powers(min(along), max(along)), powers(min(rates), max(peak, *rates))
    begin, end = max(min(x_ticks), min(y_ticks) / width), max(x_ticks)
    plot = Plot(f"Roofline of {name}", x_ticks, y_ticks, "operations a byte", "GFLOP/s")
    plot.line([(begin, begin * width), (peak / width, peak), (end, peak)], "the limits measured")
    for who, of in dots.items():
        plot.dots(of, who, hollow=who != "elsa-tune")
    return _figure(
        plot.svg(), "Every problem of the run: how fast, against how much it computes for each byte that must move."
    )


def _short(length: int) -> str:
    """1K, 64K, 1M."""
    return f"{length >> 20}M" if length >> 20 else f"{length >> 10}K"


def _figure(svg: str, caption: str) -> str:
    """A picture as wide as a phone, with what it shows below."""
    return f'<figure style="max-width: 26rem">{svg}<figcaption>{caption}</figcaption></figure>\n'
