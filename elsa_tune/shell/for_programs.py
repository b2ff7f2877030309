"""What commands say, as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.shell import whole_models
from elsa_tune.tuning.forecast import Forecast
from elsa_tune.tuning.offline import Ranking
from elsa_tune.tuning.report import Report


def winner(found: Evidence) -> dict[str, Any]:
    """A winner as JSON types: its newest final, with the ratio of all of its ``finals``."""
    pooled = asdict(found)
    newest = pooled.pop("measurement")
    return {**{f.name: newest[f.name] for f in fields(Measurement) if f.init}, **pooled}


def forecast(found: Forecast) -> dict[str, Any]:
    """A forecast as JSON types; ``whole`` is null where nobody knows what the programs took."""
    gains = [{**asdict(gain), "problem": str(gain.problem), "saved": gain.saved} for gain in found.gains]
    said = {"device": str(found.device), "wall": found.wall, "before": found.before, "gains": gains}
    intervals = {"after": found.after, "attention": found.attention, "whole": found.whole}
    return {**said, **{name: value and asdict(value) for name, value in intervals.items()}}


def report(found: Report, forecasts: Iterable[Forecast] = ()) -> str:
    """A run's report for programs."""
    lines = [
        {
            "problem": str(o.problem),
            "device": str(o.device),
            "winner": o.winner and winner(o.winner),
            "gflops": o.gflops,
            "share_of_limit": o.limit,
            "tried": o.tried,
            "reproduce": o.command,
        }
        for o in found.outcomes
    ]
    gains = {g.model.name: {"attention": g.attention, "whole": g.whole} for g in whole_models.gains(found.outcomes)}
    content = {
        "complete": found.complete, "seconds": found.seconds, "notes": found.notes, "outcomes": lines, "models": gains,
        "forecasts": [forecast(one) for one in forecasts],
    }  # fmt: skip
    return json.dumps(content, indent=2)


def ranked(rankings: Iterable[Ranking]) -> str:
    """The shortlists for programs; ``predicted_seconds`` orders them and is no measurement."""
    lines = [
        {
            "problem": str(ranking.problem),
            "compiled": len(ranking.candidates),
            "refused": ranking.refused,
            "candidates": [
                {"variant": str(c.variant), "predicted_seconds": c.predicted, "resources": dict(c.built.resources)}
                for c in ranking.best
            ],
        }
        for ranking in rankings
    ]
    return json.dumps({"measured": False, "rankings": lines}, indent=2)
