"""What a block of the CUDA C backend holds, and the laws of its axes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from elsa_tune.device import Device
from elsa_tune.generate.laws import (
    axis_has_text,
    exp_errs_little,
    longest_is_causal,
    running_sum_is_short,
    scan_has_states,
    schedule_has_splits,
    scratch_is_bounded,
    shared_bytes,
)
from elsa_tune.parts import element as elements
from elsa_tune.parts import exp as exps
from elsa_tune.parts import schedule as schedules
from elsa_tune.problem import Problem
from elsa_tune.variant import Value

MOST_REGISTERS = 255
"""Of a thread, on every GPU since Kepler."""


def _padded(n: int, multiple: int) -> int:
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
        return self.vector if self.layout == "padded" else 0

    @property
    def head_slice(self) -> int:
        """Columns of K in shared memory at a time."""
        whole = _padded(self.head_dim, self._row)
        return min(self.slice, whole) if self.slice else whole

    @property
    def value_slice(self) -> int:
        """Columns of V in shared memory at a time: every lane has the same number of vectors."""
        whole = _padded(self.value_dim, math.lcm(self.lanes * self.vector, self._row))
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
        return _padded(self.block_n, self._row) + self._padding

    @property
    def stage_size(self) -> int:
        """Values of a slice, so that the next begins at 16 bytes."""
        return _padded(self.block_n * self.slice_stride, 16 // self.stored_bytes)

    @property
    def p_size(self) -> int:
        """A worker's weights, or the floats that its lanes exchange."""
        exchanged = self.rows * self.team * 4 // self.stored_bytes
        return _padded(max(self.block_m * self.p_stride, exchanged), 16 // self.stored_bytes)

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


def _of_tiling(law: Callable[..., str | None]) -> Callable[..., str | None]:
    """A law over a tiling, made one over the axes it follows from: it is asked as soon as those are chosen."""
    others = [name for name in inspect.signature(law).parameters if name != "tiling"]

    @wraps(law)
    def over_axes(**known: Any) -> str | None:
        return law(Tiling.of(known, known["problem"]), **{name: known[name] for name in others})

    names = dict.fromkeys([*TILED, "problem", *others])
    over_axes.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    return over_axes


# Laws: each says in one sentence why a combination cannot work or cannot win.


def dialect_is_the_devices(dialect: str, device: Device) -> str | None:
    return None if dialect == device.kind else f"{device} is spoken to in {device.kind}, not {dialect}"


def halves_are_asked_for(arithmetic: str, vector: int, problem: Problem, device: Device) -> str | None:
    if arithmetic == "float":
        return "no vector is of eight floats" if vector == 8 else None
    if not elements.precision(problem.precision).rounds_sums:
        return f"sums in halves are of class approx, not {problem.precision}"
    if device.kind != "cuda" or device.capability < 53:
        return f"{device.arch} does not multiply pairs of halves"
    if device.capability == 61:
        return "sm_61 multiplies pairs of halves at a 64th of the rate of floats"
    return "one half is no pair" if vector == 1 else None


def halves_are_summed_apart(arithmetic: str, accumulate: str) -> str | None:
    return "a running sum is of floats" if arithmetic == "half2" and accumulate == "running" else None


def team_is_whole(threads: int, lanes: int, workers: int, device: Device) -> str | None:
    if threads // workers < lanes:
        return f"{workers} workers of {threads} threads are fewer than {lanes} lanes each"
    if device.kind != "opencl" and (threads % device.warp or lanes > device.warp):
        return f"{threads} threads in rows of {lanes} do not fill warps of {device.warp}"
    return None


@_of_tiling
def lanes_can_exchange(tiling: Tiling, exchange: str, device: Device) -> str | None:
    if exchange == "shuffle" and device.kind == "opencl":
        width, among = int(device.arch.partition("shuffle")[2] or 0), tiling.lanes * tiling.abreast
        if width < among:
            return f"{device} has no shuffles among {among} work-items"
    if exchange == "shared" and device.kind != "opencl" and device.capability not in (50, 52, 53):
        return f"shuffles on {device.arch} are faster than shared memory"
    return None


def copies_are_there(copies: str, stages: int, arithmetic: str, device: Device, problem: Problem) -> str | None:
    if copies == "held":
        return f"registers hold one slice on its way, not {stages - 1}" if stages > 2 else None
    if device.kind != "cuda" or device.capability < 80:
        return f"{device.arch} has no asynchronous copies"
    if elements.get(problem.dtype).narrow and arithmetic == "float":
        return f"an asynchronous copy cannot make floats of {problem.dtype}"
    return "an asynchronous copy needs a second place to go to" if stages == 1 else None


def leaf_holds_vectors(lanes: int, keys: int, vector: int, layout: str) -> str | None:
    row = 8 * vector if layout == "swizzled" else vector
    return f"{lanes * keys} weights of a row are no multiple of {row}" if lanes * keys % row else None


def lane_adds_several_weights(keys: int, problem: Problem) -> str | None:
    """To a sum of 1 and more, single weights of 2^-25 add nothing, however many come."""
    exact = elements.precision(problem.precision).exact
    return f"a lane adds single weights to its sum, which {problem.precision} notices" if keys == 1 and exact else None


def slices_divide(slice: int, lanes: int, vector: int, layout: str, problem: Problem) -> str | None:
    if not slice:
        return None
    step = math.lcm(lanes * vector, 8 * vector if layout == "swizzled" else vector)
    if slice % step:
        return f"slices of {slice} columns are no multiple of {step}"
    if slice >= max(problem.head_dim, problem.value_dim):
        return f"one slice of {slice} columns is the whole row"
    return None


def columns_fill_lanes(lanes: int, vector: int, problem: Problem) -> str | None:
    padded = _padded(problem.value_dim, lanes * vector)
    return (
        f"{problem.value_dim} value columns leave most of {padded} empty"
        if padded >= 2 * max(problem.value_dim, 16)
        else None
    )


def rows_fill_tile(threads: int, lanes: int, rows: int, workers: int, problem: Problem) -> str | None:
    block_m, there = threads // workers // lanes * rows, problem.q_len * problem.group
    return f"{there} query rows leave most of a tile of {block_m} empty" if block_m > max(16, 2 * there - 1) else None


def keys_fill_leaves(lanes: int, keys: int, workers: int, splits: int, problem: Problem) -> str | None:
    leaves = -(-problem.kv_len // (lanes * keys))
    return f"{problem.kv_len} keys make {leaves} leaves, fewer than states" if workers * splits > leaves else None


def exp_is_exact(exp: str, problem: Problem) -> str | None:
    return exp_errs_little(exps.get(exp).error(exps.DEGREE), problem)


def blocks_see_each_other(schedule: str, dialect: str) -> str | None:
    """OpenCL 1.2, section 3.3.1: no guarantees of memory consistency between work-groups."""
    if schedules.get(schedule).counts and dialect == "opencl":
        return "OpenCL 1.2 orders no memory between work-groups; a second kernel merges their states"
    return None


@_of_tiling
def registers_hold_tile(tiling: Tiling) -> str | None:
    return _beyond(tiling.floats_of_a_thread, min(MOST_REGISTERS, 65536 // tiling.threads))


@_of_tiling
def registers_hold_the_rest(tiling: Tiling, copies: str, accumulate: str, blocks: int, registers: int) -> str | None:
    floats = tiling.floats_of_a_thread
    if copies == "held":
        floats += tiling.copies * tiling.words
    if accumulate == "apart":  # they take the place of scores, which are weights in shared memory by then
        floats += max(0, tiling.floats_apart - tiling.rows * tiling.keys)
    return _beyond(floats, registers or min(MOST_REGISTERS, 65536 // (max(1, blocks) * tiling.threads)))


def _beyond(floats: int, registers: int) -> str | None:
    """Beside its floats a thread needs some two dozen registers for addresses and counters."""
    return f"a thread keeps {floats} floats, and has {registers} registers" if floats + 24 > registers else None


@_of_tiling
def shared_memory_holds_tile(tiling: Tiling, device: Device) -> str | None:
    size, most = tiling.shared_bytes, shared_bytes(device)
    return f"a block takes {size >> 10} KiB of shared memory; {device.arch} gives {most >> 10}" if size > most else None


@_of_tiling
def blocks_fit_together(tiling: Tiling, blocks: int, device: Device) -> str | None:
    size, most = tiling.shared_bytes, shared_bytes(device)
    if device.kind == "cuda" and device.capability < 70:
        most = 96 << 10 if device.capability in (52, 61) else 64 << 10  # of a multiprocessor, not of a block
    return f"{blocks} blocks of {size >> 10} KiB do not fit {most >> 10}" if blocks * size > most else None


def one_cap_on_registers(blocks: int, registers: int, device: Device) -> str | None:
    if blocks and registers:
        return "launch bounds cap registers already"
    if device.kind != "cuda" and (registers or (blocks and device.kind == "opencl")):
        return f"{device.kind} compilers take no such cap"
    return None


LAWS = (
    dialect_is_the_devices,
    halves_are_asked_for,
    team_is_whole,
    lanes_can_exchange,
    copies_are_there,
    leaf_holds_vectors,
    lane_adds_several_weights,
    slices_divide,
    columns_fill_lanes,
    rows_fill_tile,
    keys_fill_leaves,
    one_cap_on_registers,
    registers_hold_tile,
    halves_are_summed_apart,
    registers_hold_the_rest,
    shared_memory_holds_tile,
    blocks_fit_together,
    scan_has_states,
    axis_has_text("cuda", "exp"),
    exp_is_exact,
    axis_has_text("cuda", "schedule"),
    schedule_has_splits,
    blocks_see_each_other,
    scratch_is_bounded,
    longest_is_causal,
    running_sum_is_short,
)
