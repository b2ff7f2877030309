"""What a C++ kernel's assembly says: multiply-adds in its innermost loops, and accumulators left in memory there."""

from __future__ import annotations

import re
from collections.abc import Mapping

SPILL_SHARE = 0.1
"""Stack stores in hot loops that are borne, for each multiply-add there."""

_LABEL = re.compile(r"(\.?L\w+):")
_JUMP = re.compile(r"\s+(?:j\w+|b\.?\w*|cbn?z\s+\w+,)\s+(\.?L\w+)")
_FMA = re.compile(r"\s(vfn?m(add|sub)\w*p[sd]|fml[as])\s")
_STACK_STORE = re.compile(r"\sv?mov[au]p\w\s+%[xyz]mm\d+, -?\d*\(%r[sb]p\)|\sst[rp]\s+q\d+.*\[sp(, ?#?\d+)?\]")


def hot_loops(assembly: str) -> dict[str, int]:
    """Multiply-adds in innermost loops, and vector stores to fixed stack slots there: accumulators left in memory."""
    lines = assembly.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    targets = {labels[m[1]] for line in lines if (m := _JUMP.match(line)) and m[1] in labels}
    counts = {"hot_fmas": 0, "hot_spills": 0}
    for end, line in enumerate(lines):
        jump = _JUMP.match(line)
        start = labels.get(jump[1], end) if jump else end
        body = lines[start + 1 : end]
        if start < end and targets.isdisjoint(range(start + 1, end)):
            fmas = sum(bool(_FMA.search(inner)) for inner in body)
            if fmas:
                counts["hot_fmas"] += fmas
                counts["hot_spills"] += sum(bool(_STACK_STORE.search(inner)) for inner in body)
    return counts


def flaw(resources: Mapping[str, int]) -> str:
    """What in an assembly's counts speaks against ever using the kernel, or nothing."""
    spills, fmas = resources["hot_spills"], resources["hot_fmas"]
    return f"{spills} stack stores for {fmas} multiply-adds in hot loops" if spills > SPILL_SHARE * fmas else ""
