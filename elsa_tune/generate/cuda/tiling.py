"""What a block of the CUDA C backend holds: threads, tiles, slices and shared memory, from a variant's axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elsa_tune.problem import Problem
from elsa_tune.variant import Value


def padded(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


TILED = ("threads", "lanes", "rows", "keys", "workers", "slice", "stages", "vector", "layout", "arithmetic")
"""The axes that a tiling follows from."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What follows from a variant's axes and a family's dimensions: threads, tiles, slices and shared memory. Strides and sizes
    count what shared memory holds: floats, or halves where those are computed with."""

    threads: int
    lanes: int
    rows: int
    keys: int
    workers: int
    slice: int
    stages: int
    vector: int
    layout: str
    arithmetic: str
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, axes: Mapping[str, Value], problem: Problem) -> Tiling:
        """The tiling of a variant for the problem's family."""
        chosen: dict[str, Any] = {name: axes[name] for name in TILED}
        return cls(**chosen, head_dim=problem.head_dim, value_dim=problem.value_dim)

    @property
    def team(self) -> int:
        """Threads of a worker."""
        return self.threads // self.workers

    @property
    def team_rows(self) -> int:
        """Threads of a worker that differ in their query rows."""
        return self.team // self.lanes

    @property
    def abreast(self) -> int:
        """Threads side by side that share keys and value columns and differ in their query rows: two, if a warp holds both."""
        return 2 if self.team_rows > 1 and 2 * self.lanes <= 32 else 1

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return self.team_rows * self.rows

    @property
    def block_n(self) -> int:
        """Keys of a leaf."""
        return self.lanes * self.keys

    @property
    def stored_bytes(self) -> int:
        """Bytes of a value in shared memory."""
        return 2 if self.arithmetic == "half2" else 4

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector in shared memory."""
        return self.vector * self.stored_bytes

    @property
    def words(self) -> int:
        """Registers of a vector."""
        return self.vector_bytes // 4

    @property
    def _row(self) -> int:
        """What a row in shared memory is a multiple of."""
        return 8 * self.vector if self.layout == "swizzled" else self.vector

    @property
    def _padding(self) -> int:
        """Values that keep the next row in shared memory from the same banks."""
        return self.vector if self.layout == "padded" else 0

    @property
    def head_slice(self) -> int:
        """Columns of K in shared memory at a time."""
        whole = padded(self.head_dim, self._row)
        return min(self.slice, whole) if self.slice else whole

    @property
    def value_slice(self) -> int:
        """Columns of V in shared memory at a time: every lane has the same number of vectors."""
        whole = padded(self.value_dim, math.lcm(self.lanes * self.vector, self._row))
        return min(self.slice, whole) if self.slice else whole

    @property
    def head_slices(self) -> int:
        """Slices of a row of K."""
        return -(-self.head_dim // self.head_slice)

    @property
    def value_slices(self) -> int:
        """Slices of a row of V."""
        return -(-self.value_dim // self.value_slice)

    @property
    def head_columns(self) -> int:
        """Columns of K, padded."""
        return self.head_slice * self.head_slices

    @property
    def value_columns(self) -> int:
        """Columns of V, padded."""
        return self.value_slice * self.value_slices

    @property
    def groups(self) -> int:
        """Vectors of value columns that a thread has of a slice."""
        return self.value_slice // (self.lanes * self.vector)

    @property
    def columns(self) -> int:
        """Value columns of a thread."""
        return self.groups * self.vector * self.value_slices

    @property
    def copies(self) -> int:
        """Vectors of a slice that a thread carries."""
        return -(-self.block_n * max(self.head_slice, self.value_slice) // (self.vector * self.team))

    @property
    def query_stride(self) -> int:
        """From one query row to the next in shared memory."""
        return self.head_columns + self._padding

    @property
    def slice_stride(self) -> int:
        """From one row of a slice to the next."""
        return max(self.head_slice, self.value_slice) + self._padding

    @property
    def p_stride(self) -> int:
        """From one row of weights to the next."""
        return padded(self.block_n, self._row) + self._padding

    @property
    def stage_size(self) -> int:
        """Values of a slice, so that the next begins at 16 bytes."""
        return padded(self.block_n * self.slice_stride, 16 // self.stored_bytes)

    @property
    def p_size(self) -> int:
        """A worker's weights, or the floats that its lanes exchange."""
        exchanged = self.rows * self.team * 4 // self.stored_bytes
        return padded(max(self.block_m * self.p_stride, exchanged), 16 // self.stored_bytes)

    @property
    def state_floats(self) -> int:
        """Floats of a worker's state."""
        return self.rows * (self.columns + 2) * self.team

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a block."""
        folding = self.block_m * self.query_stride + self.workers * (self.stages * self.stage_size + self.p_size)
        return max(self.stored_bytes * folding, 4 * self.workers * self.state_floats if self.workers > 1 else 0)

    @property
    def floats_of_a_thread(self) -> int:
        """Registers that a thread cannot do without: scores, state, operands, sums in halves."""
        states = self.rows * (self.columns + self.keys + 3)
        scores = self.rows * self.keys if self.arithmetic == "half2" and self.head_slices > 1 else 0
        return states + scores + self.words * (self.rows + 1)

    @property
    def floats_apart(self) -> int:
        """Registers of a leaf's weighted values, summed apart."""
        return self.rows * self.groups * self.words
