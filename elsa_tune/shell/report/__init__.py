"""`elsa-tune report`: what was measured as one page, written to a file or served while it is tuned."""

from __future__ import annotations

import os
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
        _replace(output, page)
    return len({chapter.problem for chapter in found.chapters})


def _replace(output: Path, page: str) -> None:
    """Write a page whole or not at all, but where the file is none that could be replaced. Raises OSError."""
    if output.exists() and not output.is_file():
        output.write_text(page, encoding="utf-8")
        return
    work = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        work.write_text(page, encoding="utf-8")
        work.replace(output)
    finally:
        work.unlink(missing_ok=True)
