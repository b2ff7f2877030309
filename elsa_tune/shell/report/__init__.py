"""`elsa-tune report`: what was measured as one page, written to a file or served while it is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elsa_tune import places
from elsa_tune.shell.report.contents import contents
from elsa_tune.shell.report.page import Writer


def write(output: Path, sources: Sequence[str], device: str | None, problems: Sequence[str]) -> int:
    """Write the page of what sources say of a device and problems, and return how many problems it is of. Raises ElsaTuneError, NoRoom."""
    found = contents(sources, device, problems)
    page = Writer().page(found)
    with places.written(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        places.replace(output, page.encode())
    return len({chapter.problem for chapter in found.chapters})
