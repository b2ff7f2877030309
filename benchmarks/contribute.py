"""Turn an export into the file that is shipped for its devices, and rewrite the table of devices in the docs."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from elsa_tune.measurement import Measurement
from elsa_tune.remember import foreign, lines
from elsa_tune.remember.database import Database
from elsa_tune.remember.fetch import fetched

ROOT = Path(__file__).resolve().parent.parent
PAGE = """# Devices that winners are shipped for

Written by `benchmarks/contribute.py` from `cache/`; [contribute yours](how-to/contribute-a-device.md). The ratio is to torch's
best kernel on the same device, in the same race.

| device | problems | ratio: least, median, most | torch |
|---|---|---|---|
"""


def shipped(measurements: list[Measurement]) -> dict[str, list[Measurement]]:
    """Device -> winners that beat torch's kernels."""
    found: dict[str, list[Measurement]] = {}
    for m in (w.measurement for w in Database.in_memory(measurements, "contributed").winners()):
        if not m.is_rival and m.error is not None:
            found.setdefault(m.device, []).append(m)
    return found


def page(cache: Path) -> str:
    """The table of everything in ``cache``."""
    rows = []
    for path in sorted(cache.glob("*.jsonl")):
        known = list(lines.read(path))
        ratios = sorted(m.ratio or 0 for m in known)
        torch = ", ".join(sorted({str(m.provenance.get("torch", "unknown")) for m in known}))
        rows.append(
            f"| `{known[0].device}` | {len(known)} | {ratios[0]:.2f}, {ratios[len(ratios) // 2]:.2f}, {ratios[-1]:.2f} | {torch} |\n"
        )
    return PAGE + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", nargs="*", help="files or URLs; without any, only the table is written")
    parser.add_argument("--into", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args()
    refused: Counter[str] = Counter()
    found: list[Measurement] = []
    for source in options.exports:
        with fetched(source) as path:
            found += foreign.read(path, refused)
    for device, winners in shipped(found).items():
        name = f"{device.replace(':', '-', 1)}.jsonl"
        lines.write(winners, options.into / "cache" / name)
        print(f"cache/{name}: {len(winners)} winners")
    for reason, count in refused.items():
        print(f"left out {count}: {reason}")
    (options.into / "docs" / "devices.md").write_text(page(options.into / "cache"))


if __name__ == "__main__":
    main()
