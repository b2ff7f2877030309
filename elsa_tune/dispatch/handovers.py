"""Calls that torch answered although a kernel of ours was to: counted in this process, and told to others once a reason."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from elsa_tune import places

MOST = 64
"""Reasons that a process remembers: messages may hold numbers that never repeat."""

LARGEST_FILE = 256 << 10
"""Bytes of the file beyond which no more is written to it."""

counts: Counter[tuple[str, str]] = Counter()
"""(what was asked, why it was handed over) -> how often in this process."""


def note(asked: str, error: BaseException) -> None:
    """Count a hand-over; the first of its kind in a process is written down for ``elsa-tune doctor``. Never raises."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    entry = (asked, reason)
    if entry not in counts and len(counts) >= MOST:
        entry = (asked, "other reasons")
    counts[entry] += 1
    if counts[entry] == 1:
        _write(*entry)


def _write(asked: str, reason: str) -> None:
    path = file()
    with suppress(OSError):
        if path.parent.is_dir() and not (path.exists() and path.stat().st_size > LARGEST_FILE):
            with path.open("a") as out:
                out.write(json.dumps({"at": round(time.time()), "asked": asked, "reason": reason}) + "\n")


def file() -> Path:
    """Where processes write down their hand-overs, a JSON line for each reason; removing it forgets them."""
    return places.home() / "handovers.jsonl"


def written() -> list[dict[str, Any]]:
    """What processes of this user wrote down: ``at`` (seconds since 1970), ``asked``, ``reason``; oldest first."""
    found = []
    with suppress(OSError):
        for line in file().read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and {"at", "asked", "reason"} <= set(entry):
                    found.append(entry)
    return found


def steps(family: str) -> list[str]:
    """What explain says of one family: each reason once, with how many processes met it, or how often this one did."""
    here = {reason: n for (asked, reason), n in counts.items() if asked == family}
    elsewhere = Counter(str(entry["reason"]) for entry in written() if entry["asked"] == family)
    lines = [f"handed over to torch {n} times in this process: {reason}" for reason, n in here.items()]
    return lines + [
        f"handed over to torch in {n} process{'es' * (n > 1)}: {reason}"
        for reason, n in elsewhere.items()
        if reason not in here
    ]
