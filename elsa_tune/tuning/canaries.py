"""Canaries: a few winners timed again after a change of software or clock, to learn whether what was measured is still true."""

from __future__ import annotations

from contextlib import suppress

from elsa_tune.errors import BadVariant
from elsa_tune.space import parse
from elsa_tune.tuning import drift
from elsa_tune.tuning.final import final, seconds_of
from elsa_tune.tuning.run import Run
from elsa_tune.tuning.task import Task

CANARIES = 3
"""Winners timed again after a change; the others only if one of these has moved."""


def look_for_drift(run: Run) -> None:
    """After a change of software or clock, time a few winners again; if one has moved, all; those that moved are open."""
    peaks = {name: x for name, x in run.trials.peaks.items() if name in ("peak_gflops", "peak_fp32")}
    searched = {search.backend for task in run.tasks for search in task.searches}
    versions = {
        name: text for backend in sorted(searched) for name, text in run.trials.recorder.versions(backend).items()
    }
    if found := drift.changes(run.database, run.device, versions, peaks):
        run.notes.append("; ".join(found))
        known = sorted((t for t in run.tasks if t.incumbent and t.pooled), key=lambda task: task.seconds)
        moved = [task for task in known[:CANARIES] if has_moved(run, task)]
        if moved:
            moved += [task for task in known[CANARIES:] if run.left() > 0 and has_moved(run, task)]
        for task in moved:
            drift.reopen(run.database, run.device, str(task.problem))
            task.reopen()
        timed = len(known) if moved else min(len(known), CANARIES)
        run.notes.append(f"{timed} winners timed again, {len(moved)} have moved and are tuned anew")
        if any(task.busy for task in known[:CANARIES]):
            return  # nobody knows yet: the next run asks again
    if versions and peaks:
        drift.remember(run.database, run.device, versions, peaks)


def has_moved(run: Run, task: Task) -> bool:
    """Whether a problem's winner, raced again, is not as fast as it was."""
    before = run.winner(task)
    if before is None or before.is_rival:
        return False
    with suppress(BadVariant):  # of a version whose space had other values
        variant = parse(before.variant)
        if run.is_lawful(variant, task.problem):
            final(run, task, min(1.0, seconds_of(run, task)), [variant])
    after = task.latest.get(before.variant)
    if after is None:  # of other code, or it can no longer be built
        return True
    is_new = after.created > before.measurement.created and not after.disturbed
    return is_new and drift.moved(before, after)
