"""What can be combined with what in C++ kernels, and why not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elsa_tune.device import Device
from elsa_tune.generate.cpp.real import real_of
from elsa_tune.generate.laws import axis_has_text, exp_errs_little, only_text, scan_has_states, state_is_of_operator
from elsa_tune.parts import element as elements
from elsa_tune.parts import exp as exps
from elsa_tune.parts import scan as scans
from elsa_tune.problem import Problem
from elsa_tune.space import Space

SCRATCH_BYTES = 64 << 20
"""At most this much memory for packed heads and the states of splits."""

EXP = exps.get(only_text("cpp", "exp"))
"""No CPU has a unit for 2^x."""


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set: floats in its widest vector, its vector registers, and the compiler's flags for it."""

    lanes: int
    registers: int
    flags: tuple[str, ...]


ISAS = {
    "avx512": Isa(
        16, 32, ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512")
    ),
    "avx2": Isa(8, 16, ("-mavx2", "-mfma")),
    "neon": Isa(4, 32, ()),
    "portable": Isa(4, 16, ()),
}


# Laws: each says in one sentence why a combination cannot work or cannot win.


def isa_is_here(isa: str, device: Device) -> str | None:
    """What the CPU lacks cannot run, and where it has better the portable set only loses."""
    if isa not in device.isas:
        return f"{device} has {', '.join(device.isas)}, not {isa}"
    if isa == "portable" and len(device.isas) > 1:
        return f"the same code compiled for {device.isas[0]} is faster"
    return None


def lanes_fit_isa(isa: str, lanes: int) -> str | None:
    """A vector wider than the instruction set's is split in pieces, one narrower than half of it wastes lanes."""
    widest = ISAS[isa].lanes
    if lanes > widest or lanes * 2 < widest:
        return f"{isa} vectors hold {widest} floats; {lanes} lanes waste or split them"
    return None


def chunk_divides(lanes: int, chunk: int, problem: Problem) -> str | None:
    """Lanes that share a row divide both dimensions evenly: nothing in the text handles what is left over."""
    there = real_of(problem.dtype).lanes(lanes)
    if chunk > there:
        return f"a row cannot take {chunk} of {there} lanes"
    if problem.head_dim % chunk or problem.value_dim % chunk:
        return f"chunk {chunk} does not divide head_dim {problem.head_dim} and value_dim {problem.value_dim}"
    return None


def rows_fill_vectors(lanes: int, chunk: int, problem: Problem) -> str | None:
    """Rows that fill a vector need no lanes to share one, and too few rows leave lanes empty: either repeats work."""
    there = real_of(problem.dtype).lanes(lanes)
    rows, per_vector = problem.q_len * problem.group, there // chunk
    if rows >= there and chunk > 1:
        return f"{rows} query rows fill {there} lanes; a chunk would only repeat work"
    if rows < there and per_vector > 2 * rows:
        return f"{rows} query rows leave most of {per_vector} row lanes empty"
    return None


def tiles_fill_registers(
    isa: str, lanes: int, chunk: int, query_vectors: int, key_tile: int, value_tile: int
) -> str | None:
    """A tile's sums that outgrow the registers spill in the innermost loop; fewer than four wait for one another."""
    registers = ISAS[isa].registers
    for tile in (key_tile, value_tile):
        accumulators = query_vectors * tile
        operands = query_vectors + (chunk > 1)
        if accumulators + operands > registers:
            return f"{accumulators} accumulators and {operands} operands exceed {registers} registers"
        if accumulators < 4:
            return f"{accumulators} accumulators cannot hide the latency of a multiply-add"
    return None


def leaf_holds_key_tiles(key_tile: int, block_n: int) -> str | None:
    """A leaf is of whole key tiles: its loop handles no other size."""
    return f"a leaf of {block_n} keys is no multiple of {key_tile}" if block_n % key_tile else None


def value_tile_fits(value_tile: int, chunk: int, problem: Problem) -> str | None:
    """More value columns at once than a lane has are columns of nothing."""
    steps = problem.value_dim // chunk
    return f"{value_tile} value columns at once, of {steps}" if value_tile > steps else None


def columns(dim: int, lanes: int, grad_tile: int, isa: Isa) -> int:
    """Vectors of columns in registers while gradients of keys are formed, with ``grad_tile`` keys: as many as there is room for, or
    fewer where that leaves none over."""
    vectors = math.ceil(dim / lanes)
    room = max(1, (isa.registers - 1) // (grad_tile + 1))
    return math.ceil(vectors / math.ceil(vectors / room))


def axes_of_direction(
    chunk: int, head_parts: int, workers: int, state: str, grad_tile: int, products: int, problem: Problem
) -> str | None:
    """Gradients are of rows in lanes and of sums, not of states; what forms them is nothing to the forward pass."""
    forward = {"chunk": chunk, "head_parts": head_parts, "workers": workers, "state": state}
    idle = {"grad_tile": grad_tile, "products": products} if problem.direction == "forward" else forward
    usual = {axis.name: axis.default for axis in Space.read("cpp").axes}
    differ = [name for name, value in idle.items() if value != usual[name]]
    return f"{', '.join(differ)} are nothing to the {problem.direction} pass" if differ else None


def grad_tile_hides_latency(isa: str, lanes: int, grad_tile: int, problem: Problem) -> str | None:
    """Fewer than four sums of a tile wait for one another; columns() never takes more than fit."""
    if problem.direction == "forward":
        return None
    there = real_of(problem.dtype).lanes(lanes)
    fewest = min(grad_tile * columns(dim, there, grad_tile, ISAS[isa]) for dim in (problem.head_dim, problem.value_dim))
    return f"{fewest} accumulators cannot hide the latency of a multiply-add" if fewest < 4 else None


def packed_heads_are_of_tasks(packing: str, products: int, problem: Problem) -> str | None:
    """A head is packed by who goes through all its tiles."""
    if packing == "head" and products == 7 and problem.direction == "backward":
        return "tasks of seven products are of one tile, or of a part of the keys"
    return None


def packed_heads_are_little(packing: str, problem: Problem, device: Device) -> str | None:
    """A training step takes no more memory than torch's: copies of a head for each thread are at most a sixteenth of output and gradients."""
    if packing == "head" and problem.direction == "backward" and problem.batch * problem.heads < 8 * device.cores:
        return f"a head for each of {device.cores} threads is much beside the gradients of {problem.batch * problem.heads} heads"
    return None


def packed_heads_are_read_again(
    lanes: int, chunk: int, query_vectors: int, splits: int, packing: str, problem: Problem
) -> str | None:
    """A packed head is lost labour unless several query tiles of one thread read it."""
    if packing != "head":
        return None
    if splits > 1:
        return "splits of a head are taken by several threads, each of which would pack its own"
    rows = problem.q_len * problem.group
    block_m = query_vectors * real_of(problem.dtype).lanes(lanes) // chunk
    return f"{rows} query rows are one tile, which reads every key once" if rows <= block_m else None


def packed_heads_fit(block_n: int, packing: str, problem: Problem, device: Device) -> str | None:
    """Every thread packs a head of its own; together they must not outgrow SCRATCH_BYTES."""
    leaves = math.ceil(problem.kv_len / block_n)
    size = real_of(problem.dtype).bytes * device.cores * leaves * block_n * (problem.head_dim + problem.value_dim)
    if packing == "head" and size > SCRATCH_BYTES:
        return f"a head for each thread takes {size >> 20} MiB, more than {SCRATCH_BYTES >> 20}"
    return None


def narrow_elements_are_packed(packing: str, chunk: int, problem: Problem) -> str | None:
    """Single numbers would be widened again for every query tile; chunks of them are, in registers."""
    if packing == "direct" and chunk == 1 and elements.get(problem.dtype).narrow:
        return f"single numbers of {problem.dtype} are widened once, as they are packed"
    return None


def head_parts_are_long(chunk: int, head_parts: int, problem: Problem) -> str | None:
    """A short sum rounds little: parts of it cost more than the rounding they save."""
    steps = problem.head_dim // chunk
    if head_parts > 1 and steps < 16 * head_parts:
        return f"{steps} products are a short sum; {head_parts} parts of it cost more than they save"
    return None


def scan_merges_states(scan: str, workers: int, splits: int, problem: Problem) -> str | None:
    """Nothing is called a scan that is a fold, and no scan a fold; gradients of splits are sums, added up in order."""
    if problem.direction == "backward":
        return None if scans.get(scan).folds else "gradients are added up, not scanned"
    return scan_has_states(scan, workers, splits)


def exp_is_exact(exp_degree: int, problem: Problem) -> str | None:
    """A polynomial that is not 1 at 0 changes a state at every leaf; one that errs too much is of another class."""
    if float(EXP.coefficients(exp_degree)[0]) != 1:
        return f"2^0 by a polynomial of degree {exp_degree} is not 1: every leaf would change what was folded before it"
    return exp_errs_little(EXP.error(exp_degree), problem)


NOTICED = 1 / 64
"""Of a unit in the last place."""


def exp_is_noticed(exp_degree: int, problem: Problem) -> str | None:
    """Digits that states have no place for cost multiply-adds like others."""
    error, state = EXP.error(exp_degree), elements.get(problem.dtype)
    return (
        f"2^x errs by {error:.1e}, which no {state.state} tells from a lower degree"
        if error < NOTICED * state.unit
        else None
    )


LAWS = (
    isa_is_here,
    lanes_fit_isa,
    chunk_divides,
    rows_fill_vectors,
    tiles_fill_registers,
    leaf_holds_key_tiles,
    value_tile_fits,
    scan_merges_states,
    axis_has_text("cpp", "state"),
    state_is_of_operator,
    packed_heads_are_read_again,
    packed_heads_fit,
    narrow_elements_are_packed,
    head_parts_are_long,
    exp_is_exact,
    exp_is_noticed,
    axes_of_direction,
    grad_tile_hides_latency,
    packed_heads_are_of_tasks,
    packed_heads_are_little,
)
