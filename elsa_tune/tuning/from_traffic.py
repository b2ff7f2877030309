"""Tuning for what programs really ask: the problems that most of their seconds go to, each by its share of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from elsa_tune.device import Device, detect
from elsa_tune.errors import BadDevice
from elsa_tune.traffic import Traffic, of, worth_tuning
from elsa_tune.tuning import tune as tuning
from elsa_tune.tuning.forecast import Forecast, forecast
from elsa_tune.tuning.report import Outcome, Report


def devices(device: str, traffic: Sequence[Traffic]) -> list[Device]:
    """The devices here that ``device`` means; ``auto`` those of a kind that traffic was recorded on. Raises BadDevice."""
    here = detect(device)
    recorded = {one.device.kind: one.device for one in traffic}
    found = here if device != "auto" else [one for one in here if one.kind in recorded]
    if not found:
        told, machine = ", ".join(map(str, recorded.values())), ", ".join(map(str, here))
        raise BadDevice(
            f"this was recorded on {told}, of whose kind nothing is here; tune for one of {machine} with --device"
        )
    return found


def tune(
    traffic: Sequence[Traffic],
    *,
    device: str = "auto",
    budget: float = tuning.BUDGET,
    wall: float = 0.0,
    **options: Any,
) -> tuple[Report, list[Forecast]]:
    """Tune for traffic as elsa_tune.tune does, whose ``options`` are taken, and what each device gains by the winners; ``wall`` are the
    seconds that the program took. Raises what elsa_tune.tune raises. May be stopped at any moment: what is recorded stays."""
    start, outcomes, forecasts = time.monotonic(), list[Outcome](), list[Forecast]()
    notes: list[str] = []
    here = devices(device, traffic)
    for number, one in enumerate(here):
        asked = of(one, traffic)
        left = max(1.0, budget - (time.monotonic() - start)) / (len(here) - number)
        report = tuning.tune(worth_tuning(t.asked for t in asked), device=str(one), budget=left, **options)
        outcomes += report.outcomes
        notes += report.notes
        forecasts.append(forecast(asked, report.outcomes, one, wall))
    return Report(outcomes, time.monotonic() - start, notes), forecasts
