"""What benchmarks/gpu.py learns, a JSON line each, on disk before the next step begins; and steps that cost only themselves."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elsa_tune.tuning.trial import OutOfTime

NAME = "lines.jsonl"


class Log:
    """Lines appended to ``folder``/lines.jsonl, each durable when the call returns; ``deadline`` is of time.monotonic()."""

    def __init__(self, folder: Path, deadline: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / NAME).open("a", encoding="utf-8")
        self._start, self.deadline = time.monotonic(), deadline
        self.lines: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def line(self, kind: str, text: str, **facts: Any) -> dict[str, Any]:
        """Keep facts, and print what a reader wants of them."""
        entry = {"kind": kind, "at": round(time.monotonic() - self._start, 2), **facts}
        self._file.write(json.dumps(entry, default=str) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(entry)
        print(f"{entry['at']:7.1f} s  {kind}: {text}", flush=True)
        return entry

    @contextmanager
    def step(self, name: str, needs: float = 0.0) -> Iterator[None]:
        """A step that is skipped where fewer than ``needs`` seconds are left, and whose failure costs a line."""
        try:
            if self.left < needs:
                raise OutOfTime
            yield
        except OutOfTime:
            self.line("skipped", f"{name}: out of time", step=name, left=round(self.left, 1))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            self.line("trouble", f"{name}: {told[:300]}", step=name, reason=told, where=traceback.format_exc()[-2000:])
