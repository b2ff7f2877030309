"""A schedule: who works on a tile, who merges what its workers leave in memory, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """``splits``: whether several parts of the key axis leave their states in memory, or one worker has all keys. ``launches``:
    kernels that a call starts, one after the other. ``counts``: whether a counter for each tile says who arrived last, so that memory
    must be ordered among the blocks of one launch."""

    name: str
    title: str
    splits: bool
    launches: int = 1
    counts: bool = False
