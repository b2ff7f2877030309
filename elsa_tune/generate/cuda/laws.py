"""What can be combined with what in CUDA C kernels, and why not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

from elsa_tune.device import Device
from elsa_tune.generate.cuda.tiling import TILED, Tiling, padded
from elsa_tune.generate.gpu.limits import MOST_REGISTERS, REGISTERS, shared_bytes, shared_bytes_together
from elsa_tune.generate.laws import (
    axis_has_text,
    exp_errs_little,
    longest_is_causal,
    running_sum_is_short,
    scan_has_states,
    schedule_has_splits,
    scratch_is_bounded,
)
from elsa_tune.parts import element as elements
from elsa_tune.parts import exp as exps
from elsa_tune.parts import schedule as schedules
from elsa_tune.problem import Problem


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
    """A device's compiler reads its own dialect alone."""
    return None if dialect == device.kind else f"{device} is spoken to in {device.kind}, not {dialect}"


def halves_are_asked_for(arithmetic: str, vector: int, problem: Problem, device: Device) -> str | None:
    """Sums in halves are of a class by itself, on GPUs that multiply pairs of them fast; only they have vectors of eight."""
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
    """A running sum in halves would lose what later leaves add; only a leaf's own may be of halves."""
    return "a running sum is of floats" if arithmetic == "half2" and accumulate == "running" else None


def team_is_whole(threads: int, lanes: int, workers: int, device: Device) -> str | None:
    """The lanes of a row are of one worker and one warp: else they could not exchange what they find."""
    if threads // workers < lanes:
        return f"{workers} workers of {threads} threads are fewer than {lanes} lanes each"
    if device.kind != "opencl" and (threads % device.warp or lanes > device.warp):
        return f"{threads} threads in rows of {lanes} do not fill warps of {device.warp}"
    return None


@_of_tiling
def lanes_can_exchange(tiling: Tiling, exchange: str, device: Device) -> str | None:
    """Shuffles reach as far as the device lets them; where they do, shared memory only wins on the oldest GPUs."""
    if exchange == "shuffle" and device.kind == "opencl":
        width, among = int(device.arch.partition("shuffle")[2] or 0), tiling.lanes * tiling.abreast
        if width < among:
            return f"{device} has no shuffles among {among} work-items"
    if exchange == "shared" and device.kind != "opencl" and device.capability not in (50, 52, 53):
        return f"shuffles on {device.arch} are faster than shared memory"
    return None


def copies_are_there(copies: str, stages: int, arithmetic: str, device: Device, problem: Problem) -> str | None:
    """An asynchronous copy needs a GPU that has it, a place to go to, and bytes that need no conversion."""
    if copies == "held":
        return f"registers hold one slice on its way, not {stages - 1}" if stages > 2 else None
    if device.kind != "cuda" or device.capability < 80:
        return f"{device.arch} has no asynchronous copies"
    if elements.get(problem.dtype).narrow and arithmetic == "float":
        return f"an asynchronous copy cannot make floats of {problem.dtype}"
    return "an asynchronous copy needs a second place to go to" if stages == 1 else None


def leaf_holds_vectors(lanes: int, keys: int, vector: int, layout: str) -> str | None:
    """Weights are read in whole vectors, in whole swizzled rows where they are swizzled: a leaf must be a multiple."""
    row = 8 * vector if layout == "swizzled" else vector
    return f"{lanes * keys} weights of a row are no multiple of {row}" if lanes * keys % row else None


def lane_adds_several_weights(keys: int, problem: Problem) -> str | None:
    """To a sum of 1 and more, single weights of 2^-25 add nothing, however many come."""
    exact = elements.precision(problem.precision).exact
    return f"a lane adds single weights to its sum, which {problem.precision} notices" if keys == 1 and exact else None


def slices_divide(slice: int, lanes: int, vector: int, layout: str, problem: Problem) -> str | None:
    """A slice is of whole vectors for every lane, and less than the row: else it is none."""
    if not slice:
        return None
    step = math.lcm(lanes * vector, 8 * vector if layout == "swizzled" else vector)
    if slice % step:
        return f"slices of {slice} columns are no multiple of {step}"
    if slice >= max(problem.head_dim, problem.value_dim):
        return f"one slice of {slice} columns is the whole row"
    return None


def columns_fill_lanes(lanes: int, vector: int, problem: Problem) -> str | None:
    """Lanes that divide a row by vectors must not compute mostly padding."""
    whole = padded(problem.value_dim, lanes * vector)
    return (
        f"{problem.value_dim} value columns leave most of {whole} empty"
        if whole >= 2 * max(problem.value_dim, 16)
        else None
    )


def rows_fill_tile(threads: int, lanes: int, rows: int, workers: int, problem: Problem) -> str | None:
    """A tile of mostly no query rows does the work of a smaller one, slower."""
    block_m, there = threads // workers // lanes * rows, problem.q_len * problem.group
    return f"{there} query rows leave most of a tile of {block_m} empty" if block_m > max(16, 2 * there - 1) else None


def keys_fill_leaves(lanes: int, keys: int, workers: int, splits: int, problem: Problem) -> str | None:
    """A state that has no leaf of its own is merged for nothing."""
    leaves = -(-problem.kv_len // (lanes * keys))
    return f"{problem.kv_len} keys make {leaves} leaves, fewer than states" if workers * splits > leaves else None


def exp_is_exact(exp: str, problem: Problem) -> str | None:
    """A 2^x that errs more than the class allows makes every weight wrong."""
    return exp_errs_little(exps.get(exp).error(exps.DEGREE), problem)


def blocks_see_each_other(schedule: str, dialect: str) -> str | None:
    """OpenCL 1.2, section 3.3.1: no guarantees of memory consistency between work-groups."""
    if schedules.get(schedule).counts and dialect == "opencl":
        return "OpenCL 1.2 orders no memory between work-groups; a second kernel merges their states"
    return None


@_of_tiling
def registers_hold_tile(tiling: Tiling) -> str | None:
    """A tile that outgrows the registers of its threads spills in every iteration, whatever else is chosen."""
    return _beyond(tiling.floats_of_a_thread, min(MOST_REGISTERS, REGISTERS // tiling.threads))


@_of_tiling
def registers_hold_the_rest(tiling: Tiling, copies: str, accumulate: str, blocks: int, registers: int) -> str | None:
    """So does one with its copies on their way and sums apart, under the cap that is chosen."""
    floats = tiling.floats_of_a_thread
    if copies == "held":
        floats += tiling.copies * tiling.words
    if accumulate == "apart":  # they take the place of scores, which are weights in shared memory by then
        floats += max(0, tiling.floats_apart - tiling.rows * tiling.keys)
    return _beyond(floats, registers or min(MOST_REGISTERS, REGISTERS // (max(1, blocks) * tiling.threads)))


def _beyond(floats: int, registers: int) -> str | None:
    """Beside its floats a thread needs some two dozen registers for addresses and counters."""
    return f"a thread keeps {floats} floats, and has {registers} registers" if floats + 24 > registers else None


@_of_tiling
def shared_memory_holds_tile(tiling: Tiling, device: Device) -> str | None:
    """A block that takes more shared memory than the device gives is not launched."""
    size, most = tiling.shared_bytes, shared_bytes(device)
    return f"a block takes {size >> 10} KiB of shared memory; {device.arch} gives {most >> 10}" if size > most else None


@_of_tiling
def blocks_fit_together(tiling: Tiling, blocks: int, device: Device) -> str | None:
    """Blocks that shared memory keeps from being resident together cost registers for nothing."""
    size, most = tiling.shared_bytes, shared_bytes_together(device)
    return f"{blocks} blocks of {size >> 10} KiB do not fit {most >> 10}" if blocks * size > most else None


def one_cap_on_registers(blocks: int, registers: int, device: Device) -> str | None:
    """Two caps say one thing twice, and a compiler that takes none would make the same kernel of all."""
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
