"""What a report draws: Optuna's own figures of a search, a map of two axes, rooflines. As JSON that plotly.js draws."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import plotly.graph_objects as go
import plotly.io
from optuna import visualization

from elsa_tune.measurement import Measurement
from elsa_tune.problem import Problem
from elsa_tune.shell.report.contents import Chapter
from elsa_tune.space import Space
from elsa_tune.tuning import search

MOST_SLICES = 6
"""Axes that are shown one by one: those that mattered most."""

FEWEST_TRIALS = 2
"""Trials that make a search of which something can be drawn."""

ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
"""Where names of lines and dots stand, so that they fit on a phone."""

DECADES = [digit * 10**power for power in range(-2, 8) for digit in (1, 2, 5)]
"""Where logarithmic axes are labelled."""

OPERATIONS = {"gflops": "multiply-adds"}
"""What readers call a peak whose name in measurements is not that."""

RATIO = "ratio to torch's own"

WIDE = 2.5
"""How far a roof goes beyond its outermost point, as a factor."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: what it shows in a few words, and what plotly.js draws, as JSON."""

    title: str
    drawn: str


@contextmanager
def plain() -> Iterator[None]:
    """Inside, figures carry no colours or grids of their own: the page gives them, in the light and in the dark."""
    before = plotly.io.templates.default
    plotly.io.templates.default = "none"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        plotly.io.templates.default = before


def of(chapter: Chapter) -> list[Figure]:
    """Everything that is drawn of a problem: its searches, one a backend, and its roofline."""
    found = [figure for backend in chapter.backends for figure in _of_search(chapter, backend)]
    if roofline := _roofline(_dots([chapter], every=True), [chapter]):
        found.append(_figure("Roofline: every contender", roofline))
    return found


def roofline(chapters: Sequence[Chapter]) -> Figure | None:
    """The roofline of a device: each problem's winner and torch's best; None where its peaks were never measured."""
    drawn = _roofline(_dots(chapters, every=False), chapters)
    return _figure("Roofline: winners, and torch's own", drawn) if drawn else None


def ratios(rows: Sequence[tuple[Problem, Sequence[Chapter | None]]], names: Sequence[str]) -> Figure:
    """The winners' ratios side by side, a colour a column, with their intervals."""
    figure = go.Figure()
    for number, name in enumerate(names):
        won = [(problem, row[number]) for problem, row in rows]
        found = [(str(p), c.outcome.winner) for p, c in won if c and c.outcome.winner]
        figure.add_scatter(
            name=name, mode="markers", marker={"size": 9}, y=[p for p, _ in found], x=[w.ratio for _, w in found],
            error_x={
                "symmetric": False,
                "array": [w.ratio_high - w.ratio for _, w in found],
                "arrayminus": [w.ratio - w.ratio_low for _, w in found],
            },
        )  # fmt: skip
    figure.update_layout(height=140 + 30 * len(rows), xaxis_title=RATIO, legend=ABOVE)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _figure("Ratios side by side", figure)


def _figure(title: str, drawn: go.Figure) -> Figure:
    drawn.update_layout(title=None, margin={"t": 24, "r": 40, "b": 48, "l": 48})
    return Figure(title, json.dumps(json.loads(str(plotly.io.to_json(drawn, validate=False))), separators=(",", ":")))


# The search as it went.


def _of_search(chapter: Chapter, backend: str) -> Iterator[Figure]:
    """Ratio over trials, which axes mattered, each of those by itself, and the first two together."""
    space = Space.read(backend)
    study = search.study(space, (m for m in chapter.tried if not m.is_hint))
    done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if len(done) < FEWEST_TRIALS:
        return
    yield _figure(f"{backend}: ratio over trials", _history(study))
    varied = [axis.name for axis in space.axes if len({trial.params[axis.name] for trial in done}) > 1]
    shares = search.mattered(study)
    ranked = sorted(varied, key=lambda name: -shares.get(name, 0.0))
    if shares and varied:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        drawn = visualization.plot_param_importances(study, evaluator=evaluator, params=varied, target_name=RATIO)
        drawn.update_yaxes(title=None)  # it would lie on the names of axes
        yield _figure(f"{backend}: axes that mattered", drawn)
    if ranked:
        drawn = visualization.plot_slice(study, params=ranked[:MOST_SLICES], target_name=RATIO)
        drawn.update_layout(width=None, showlegend=False)
        yield _figure(f"{backend}: axis by axis", drawn)
    if len(ranked) > 1:
        yield _figure(f"{backend}: best ratio by {ranked[0]} and {ranked[1]}", _map(space, ranked[:2], done))


def _history(study: optuna.Study) -> go.Figure:
    """Ratio over trials as Optuna draws it, and upon it finals, of many samples, with their intervals: a single trial is noisy."""
    drawn = visualization.plot_optimization_history(study, target_name=RATIO)
    finals = [one for one in study.get_trials(deepcopy=False) if one.user_attrs["stage"] == "final" and one.value]
    if finals:
        above, below = ([abs(one.user_attrs[side] - one.value) for one in finals] for side in ("high", "low"))
        drawn.add_scatter(
            name="finals", mode="markers", marker={"size": 9, "symbol": "diamond"}, x=[one.number for one in finals],
            y=[one.value for one in finals], error_y={"symmetric": False, "array": above, "arrayminus": below},
        )  # fmt: skip
    drawn.update_layout(legend=ABOVE)
    return drawn


def _map(space: Space, names: Sequence[str], done: Iterable[optuna.trial.FrozenTrial]) -> go.Figure:
    """The best ratio for each pair of values of two axes, values in the order of the space; empty where none was tried. Of a variant the
    newest ratio counts: a final, not the trial of a few rounds before it."""
    best: dict[tuple[Any, Any], float] = {}
    for trial in {tuple(trial.params.items()): trial for trial in done}.values():
        pair = trial.params[names[0]], trial.params[names[1]]
        best[pair] = max(best.get(pair, 0.0), trial.value or 0.0)
    values = {axis.name: axis.values for axis in space.axes}
    across = [value for value in values[names[0]] if any(pair[0] == value for pair in best)]
    up = [value for value in values[names[1]] if any(pair[1] == value for pair in best)]
    cells = [[best.get((x, y)) for x in across] for y in up]
    texts = [["" if cell is None else f"{cell:.2f}" for cell in row] for row in cells]
    figure = go.Figure(
        go.Heatmap(
            x=[str(x) for x in across], y=[str(y) for y in up], z=cells, text=texts, texttemplate="%{text}", colorscale="Viridis",
            hoverongaps=False, hovertemplate=f"{names[0]} %{{x}}, {names[1]} %{{y}}: %{{z:.3f}}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=names[0], type="category")
    figure.update_yaxes(title=names[1], type="category")
    return figure


# Rooflines.


def _dots(chapters: Iterable[Chapter], every: bool) -> dict[str, list[tuple[Problem, Measurement]]]:
    """Who is drawn, torch's own and ours: every contender, or the fastest of each."""
    found: dict[str, list[tuple[Problem, Measurement]]] = {"torch's own": [], "ours": []}
    for chapter in chapters:
        for name, is_rival in (("torch's own", True), ("ours", False)):
            ranked = [(chapter.problem, m) for m in chapter.contenders if m.is_rival == is_rival and m.seconds]
            found[name] += ranked if every else ranked[:1]
    return found


def _roofline(dots: dict[str, list[tuple[Problem, Measurement]]], chapters: Iterable[Chapter]) -> go.Figure | None:
    """GFLOP/s over operations a byte, both logarithmic, under what the device's measured peaks allow."""
    peaks = next((chapter.peaks for chapter in chapters if chapter.peaks.get("gbytes")), {})
    bandwidth = peaks.get("gbytes", 0.0)
    across = [problem.flops / problem.bytes for found in dots.values() for problem, _ in found]
    if not bandwidth or not across:
        return None
    low, high = min(across) / WIDE, max(across) * WIDE
    figure = go.Figure()
    for name, peak in sorted(peaks.items()):
        if name == "gbytes":
            continue
        xs = sorted({low, min(max(peak / bandwidth, low), high), high})
        figure.add_scatter(
            x=xs,
            y=[min(peak, bandwidth * x) for x in xs],
            mode="lines",
            name=f"{OPERATIONS.get(name, name)}: {peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s",
        )
    for name, found in dots.items():
        figure.add_scatter(
            name=name, mode="markers", marker={"size": 8}, x=[p.flops / p.bytes for p, _ in found],
            y=[p.flops / m.seconds / 1e9 for p, m in found if m.seconds], text=[f"{p}<br>{m.variant}" for p, m in found],
            hovertemplate="%{text}<br>%{y:.0f} GFLOP/s<extra></extra>",
        )  # fmt: skip
    figure.update_layout(legend=ABOVE)
    figure.update_xaxes(type="log", title="operations a byte", tickvals=DECADES)
    figure.update_yaxes(type="log", title="GFLOP/s", tickvals=DECADES)
    return figure
