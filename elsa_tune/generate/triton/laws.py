"""What can be combined with what in Triton kernels, and why not."""

from __future__ import annotations

from functools import cache

from elsa_tune.device import Device
from elsa_tune.errors import CompilerMissing
from elsa_tune.generate.gpu.limits import shared_bytes
from elsa_tune.generate.laws import (
    SCRATCH_BYTES,
    axis_has_text,
    longest_is_causal,
    running_sum_is_short,
    scan_has_states,
    schedule_has_splits,
    scratch_is_bounded,
    state_is_of_operator,
)
from elsa_tune.generate.triton.columns import parts
from elsa_tune.generate.triton.version import version
from elsa_tune.parts import element as elements
from elsa_tune.parts import scan as scans
from elsa_tune.parts import score as scores
from elsa_tune.parts import state as states
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Value

MULTIPLY_ADDS = ("ieee", "fma")
SPLIT = ("tf32x3", "bf16x6")
ROUNDED = ("bf16x3", "tf32")
HALVES = ("half", "fma")
"""The arithmetic of products: of floats IEEE's, of floats as sums of several operands that a matrix unit takes, as good as exact; of
rounded ones; and of halves, whose products are exact in float32."""


def dots(problem: Problem) -> tuple[str, ...]:
    """The arithmetic of products that the problem's precision class allows; none for a class that its element has not."""
    element, precision = elements.get(problem.dtype), elements.precision(problem.precision)
    if precision not in element.precisions or precision.rounds_sums:
        return ()
    if element.narrow:
        return HALVES
    return (*MULTIPLY_ADDS, *(() if precision.ieee else SPLIT), *(ROUNDED if precision.rounds_operands else ()))


VOLTAS_UNIT = 2.0**-11
"""Unit round-off of the halves that matrix units take before sm_80."""

LONGEST_PRODUCT = 8192
"""Multiply-adds of a thread in a row: sixteen bytes each, they fill what GPUs since Volta cache of a program."""


# Laws: each says in one sentence why a combination cannot work or cannot win.


def dot_suits_class(dot: str, problem: Problem) -> str | None:
    """Products rounded more than the class allows are wrong, and others than its own are another class's."""
    allowed = dots(problem)
    return None if dot in allowed else f"class {problem.precision} allows {', '.join(allowed)}, not {dot}"


def dot_is_there(dot: str, device: Device, problem: Problem) -> str | None:
    """Triton compiles a product only for matrix units that have it, in versions that know it."""
    if dot.startswith("bf16x"):
        try:
            if tuple(map(int, version().split(".")[:2])) < (3, 6):
                return f"{dot} needs Triton 3.6, not {version()}"
        except CompilerMissing as error:
            return str(error)
    if device.kind == "cuda" and device.capability < 80 and dot not in ("ieee", "fma", "half"):
        return f"{dot} needs the matrix units of sm_80 and later, not {device.arch}"
    if device.kind == "hip" and dot in ("tf32", "tf32x3"):
        return f"{dot} is not offered for {device.arch}"
    coarse = elements.precision(problem.precision).unit > VOLTAS_UNIT
    if dot == "half" and coarse and device.kind == "cuda" and device.capability < 80:
        return f"{device.arch} has no {elements.get(problem.dtype).torch} products"
    return None


def tile_fits_dot(dot: str, block_m: int) -> str | None:
    """tl.dot refuses tiles of fewer than 16 rows."""
    return f"a matrix product has at least 16 rows, not {block_m}" if dot != "fma" and block_m < 16 else None


def rows_are_computed_once(
    dot: str, block_m: int, block_n: int, warps: int, problem: Problem, device: Device
) -> str | None:
    """Whether Triton's warps repeat one another's products (AccelerateMatmul.cpp, warpsPerTile).

    A matrix instruction of a warp gives 16 rows and 8 columns. Of products that feed one another, mma.sync (sm_80 to sm_89, sm_120)
    lays out all like the last, of weights with values: all warps along its rows if it has at least as many rows as columns, else all
    along the columns. wgmma (sm_90: 64 rows and four warps, or multiples) puts all along the rows of the scores. Warps beyond the
    end of a tile start over and compute the same again. The tensor memory of sm_100 has no such warps, and AMD's compiler lays
    out otherwise: both are left to the clock.
    """
    mma = device.kind == "cuda" and (80 <= device.capability < 100 or device.capability >= 120)
    if dot in ("ieee", "fma") or not mma:
        return None
    for rows, columns, dim in _products(block_m, block_n, problem):
        wgmma = device.capability // 10 == 9 and rows % 64 == 0 and warps % 4 == 0
        if wgmma or rows >= dim:
            if 16 * warps > rows:
                return f"{warps} warps of 16 rows share {rows}: they compute each {16 * warps // rows} times"
        elif 8 * warps > min(columns, dim):
            return f"{warps} warps of 8 columns share {min(columns, dim)}: they compute each more than once"
    return None


def _products(block_m: int, block_n: int, problem: Problem) -> tuple[tuple[int, int, int], ...]:
    """Rows and columns of each tile of scores that a module computes, and the columns of the last product that it feeds."""
    head, value = (parts(dim, "pad")[0].size for dim in (problem.head_dim, problem.value_dim))
    if problem.direction == "forward":
        return ((block_m, block_n, value),)
    return (block_m, block_n, head), (block_n, block_m, head)


def product_is_small(dot: str, block_m: int, block_n: int, warps: int, problem: Problem) -> str | None:
    """A reduced product holds all its terms in registers at once before it sums them."""
    each = block_m * block_n * parts(max(problem.head_dim, problem.value_dim), "pad")[0].size // (32 * warps)
    return f"a reduced product keeps {each} terms in each thread" if dot == "fma" and each > 128 else None


def rows_fill_tile(block_m: int, problem: Problem) -> str | None:
    """A tile of mostly no query rows does the work of a smaller one, slower."""
    rows = problem.q_len * problem.group
    return f"{rows} query rows leave most of a tile of {block_m} empty" if block_m > max(16, 2 * rows - 1) else None


def keys_fill_leaves(block_n: int, workers: int, splits: int, problem: Problem) -> str | None:
    """A state that has no leaf of its own is merged for nothing."""
    leaves = -(-problem.kv_len // block_n)
    return f"{problem.kv_len} keys make {leaves} leaves, fewer than states" if workers * splits > leaves else None


def registers_hold_states(
    dot: str, block_m: int, block_n: int, warps: int, workers: int, dims: str, problem: Problem, device: Device
) -> str | None:
    """Sums and scores that outgrow the registers of a thread spill in every iteration."""
    head, value = (sum(p.size for p in parts(d, dims)) for d in (problem.head_dim, problem.value_dim))
    if problem.direction == "backward":
        floats = max(block_m * head, block_n * (head + value)) + 2 * block_m * block_n
    else:
        floats = block_m * (workers * value + (block_n if dot != "fma" else 0))
    each = floats // (device.warp * warps)
    return f"sums and scores take {each} registers of each thread" if each > 208 else None


def code_fits_its_cache(
    dot: str, block_m: int, block_n: int, warps: int, dims: str, problem: Problem, device: Device
) -> str | None:
    """Plain products are unrolled whole: a loop longer than the instruction cache is fetched again in every iteration."""
    head, value = (sum(p.size for p in parts(d, dims)) for d in (problem.head_dim, problem.value_dim))
    each = block_m * block_n * (head + value) // (device.warp * warps)
    if dot == "ieee" and device.kind == "cuda" and each > LONGEST_PRODUCT:
        return f"plain products unroll into {each} multiply-adds of a thread; 128 KiB of code are cached"
    return None


def shared_memory_holds_stages(
    block_n: int, stages: int, workers: int, dims: str, problem: Problem, device: Device
) -> str | None:
    """Leaves on their way wait in shared memory, and a kernel that takes more than the device gives is not launched."""
    if device.kind != "cuda" or device.capability < 80 or problem.direction == "backward":
        return None  # leaves on their way wait in registers, or are counted by the compiler alone
    columns = sum(p.size for d in (problem.head_dim, problem.value_dim) for p in parts(d, dims))
    size, most = (stages - 1) * workers * block_n * columns * elements.get(problem.dtype).bytes, shared_bytes(device)
    return f"leaves on their way take {size >> 10} KiB; {device.arch} gives {most >> 10}" if size > most else None


def threads_have_work(block_m: int, block_n: int, warps: int, device: Device) -> str | None:
    """Threads beyond a tile's scores compute them a second time."""
    threads = device.warp * warps
    return (
        f"{threads} threads for {block_m} x {block_n} scores" if block_m * block_n < threads and block_m > 1 else None
    )


def normalised_adds_apart(state: str, accumulate: str) -> str | None:
    """A state that is the output itself takes a leaf in whole: it has no running sum to add to."""
    whole = states.get(state).normalised
    return "a normalised output takes a leaf in whole" if whole and accumulate == "running" else None


def fma_adds_apart(dot: str, accumulate: str) -> str | None:
    """A reduced product has its sum before it meets another: adding it to the running one is the same kernel."""
    return "a reduced product is summed apart anyway" if dot == "fma" and accumulate == "running" else None


def parts_differ_from_padding(dims: str, problem: Problem) -> str | None:
    """A dimension that splits into one padded power of two makes the same kernel under two names."""
    same = all(parts(d, "pad") == parts(d, "parts") for d in (problem.head_dim, problem.value_dim))
    return (
        f"{problem.head_dim} and {problem.value_dim} split into what padding makes"
        if dims == "parts" and same
        else None
    )


def stages_need_a_pipeline(stages: int, device: Device) -> str | None:
    """Without asynchronous copies a third stage keeps no further leaf on its way."""
    if device.kind == "cuda" and device.capability < 80 and stages > 2:
        return f"{device.arch} has no asynchronous copies to keep {stages} leaves in flight"
    return None


@cache
def _defaults() -> dict[str, Value | None]:
    """What axes are left at where nothing is made of them."""
    return {axis.name: axis.default for axis in Space.read("triton").axes}


def gradients_fold(
    scan: str, dot: str, state: str, accumulate: str, edges: str, order: str, programs: int, problem: Problem
) -> str | None:
    """Axes that gradients make nothing of are left at their defaults: other values spell the same kernel again."""
    unused = {"state": state, "edges": edges, "order": order, "programs": programs}
    plain = scans.get(scan).folds and unused.items() <= _defaults().items()
    if problem.direction == "backward" and not (plain and (accumulate == "running") == (dot != "fma")):
        return "gradients are folded over tiles in one order, masks always on"
    return None


def products_are_of_gradients(products: int, problem: Problem) -> str | None:
    """The forward pass has no product to save: another number of them spells the same kernel again."""
    return "the forward pass has two products" if products == 5 and problem.direction != "backward" else None


def score_gradients_are_bounded(products: int, block_m: int, problem: Problem) -> str | None:
    """dS of the query heads that share one KV head must fit SCRATCH_BYTES: fewer are never launched."""
    if products == 7 or problem.direction != "backward":
        return None
    rows = problem.group * -(-problem.q_len // block_m) * block_m
    size = rows * problem.kv_len * elements.get(problem.dtype).bytes
    return (
        f"dS of one KV head takes {size >> 20} MiB, more than {SCRATCH_BYTES >> 20}" if size > SCRATCH_BYTES else None
    )


def kept_score_gradients_know_no_rows(products: int, problem: Problem) -> str | None:
    """dS that is kept is of products: what becomes of a tensor of rows, like ALiBi's slopes, is computed beside dQ from scores."""
    chain = scores.get(problem.score)
    of_rows = [a.name for a in chain.differentiable if not a.over_keys and a not in chain.terms]
    if products == 5 and problem.direction == "backward" and of_rows:
        return f"{', '.join(of_rows)} receive what dS that is kept does not tell"
    return None


LAWS = (
    gradients_fold,
    products_are_of_gradients,
    kept_score_gradients_know_no_rows,
    score_gradients_are_bounded,
    dot_suits_class,
    dot_is_there,
    tile_fits_dot,
    rows_are_computed_once,
    product_is_small,
    rows_fill_tile,
    keys_fill_leaves,
    registers_hold_states,
    code_fits_its_cache,
    shared_memory_holds_stages,
    threads_have_work,
    scan_has_states,
    axis_has_text("triton", "state"),
    state_is_of_operator,
    axis_has_text("triton", "schedule"),
    schedule_has_splits,
    scratch_is_bounded,
    normalised_adds_apart,
    fma_adds_apart,
    parts_differ_from_padding,
    longest_is_causal,
    running_sum_is_short,
    stages_need_a_pipeline,
)
