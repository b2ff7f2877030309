"""What may have made yesterday's timings untrue: another driver, compiler, torch or clock; and where imports disagree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from elsa_tune.device import Device
from elsa_tune.measurement import Evidence, Measurement
from elsa_tune.remember.winners import Database

MOVED = 1.05
"""A ratio has moved if its interval no longer meets the old one, by at least this factor."""

FASTER_CLOCK = 1.25
"""A measured peak that differs by this factor is a change of clock."""


def changes(database: Database, device: Device, versions: Mapping[str, str], peaks: Mapping[str, float]) -> list[str]:
    """What differs from the last run on this device, a few words each; the first run sees no difference."""
    text = database.about(f"software of {device}")
    if not text:
        return []
    before = json.loads(text)
    found = [
        f"{name} {before[name]} is now {now}"
        for name, now in sorted(versions.items())
        if isinstance(before.get(name), str) and before[name] != now
    ]
    for name, peak in sorted(peaks.items()):
        old = before.get(name)
        if isinstance(old, float) and old > 0 and max(peak / old, old / peak) > FASTER_CLOCK:
            found.append(f"{name} {old:.0f} is now {peak:.0f}")
    return found


def remember(database: Database, device: Device, versions: Mapping[str, str], peaks: Mapping[str, float]) -> None:
    """Compare the next run with this one."""
    database.note(f"software of {device}", json.dumps({**versions, **peaks}, sort_keys=True))


def moved(before: Evidence, after: Measurement | Evidence) -> bool:
    """Whether a ratio to torch is not what it was, beyond both intervals and MOVED."""
    if not (after.ratio and after.ratio_low and after.ratio_high):
        return True
    apart = before.ratio_high < after.ratio_low or after.ratio_high < before.ratio_low
    return apart and max(before.ratio / after.ratio, after.ratio / before.ratio) > MOVED


def era(database: Database, device: Device, problem: str) -> int:
    """How often a problem was reopened here: its finals of an earlier era no longer count."""
    return int(database.about(f"era of {problem} on {device}") or 0)


def reopen(database: Database, device: Device, problem: str) -> None:
    """Begin a new era of a problem: what was measured before is no evidence of what is true now."""
    database.note(f"era of {problem} on {device}", str(era(database, device, problem) + 1))


def contested(database: Database, device: Device) -> dict[str, list[str]]:
    """Problem -> variants that others measured on this device or its model, and that were not raced here, or with another
    result."""
    own = {(m.problem, m.variant): m for m in database.evidence(local=True, device=str(device))}
    found: dict[str, list[str]] = {}
    for m in _others(database, device):
        mine = own.get((m.problem, m.variant))
        if not m.variant.startswith("sdpa.") and (mine is None or moved(m, mine)):
            found.setdefault(m.problem, [])
            if m.variant not in found[m.problem]:
                found[m.problem].append(m.variant)
    return found


def _others(database: Database, device: Device) -> Iterable[Evidence]:
    """Others' winners of this model, and whatever they measured that this machine has a final of."""
    close = {one for one, _ in database.finals_of() if _is_close(device, one)}
    yield from database.winners(local=False, devices=close) if close else ()
    for one in sorted(close):
        yield from database.evidence(local=False, device=one)


def _is_close(device: Device, spelled: str) -> bool:
    return device.kinship(Device.parse(spelled)) in ("exact", "versions", "model")
