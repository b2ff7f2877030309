"""Laws that hold in every language."""

from __future__ import annotations


def scan_has_states(scan: str, workers: int, splits: int) -> str | None:
    """Nothing is called a scan that is a fold, and no scan a fold."""
    if scan == "serial" and workers * splits > 1:
        return "a fold has one state; several need a scan to merge them"
    if scan == "hybrid" and (workers == 1 or splits == 1):
        return "hybrid needs states on both levels, workers and splits"
    if scan != "serial" and workers * splits == 1:
        return f"with one state nothing is merged, and {scan} would be a fold under another name"
    return None
