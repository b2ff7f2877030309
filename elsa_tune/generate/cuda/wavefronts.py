"""How long a CUDA C kernel keeps shared memory busy: the wavefronts of a warp's accesses, from its threads' addresses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from elsa_tune.generate.cuda.tiling import Tiling

WARP = BANKS = 32


def of_access(addresses: Sequence[int], size: int) -> int:
    """Clocks of one access by a warp: byte addresses by thread, ``size`` bytes each.

    Banks are 4 bytes wide, and 128 bytes go to registers in a clock: of accesses of 8 or 16 bytes a half or a quarter of the warp is
    served at a time, and twice as many threads where every thread t reads what t ^ 1 reads, or every thread what t ^ 2 reads
    (NVIDIA's developer forum, topic 77228, for sm_70 and sm_75; taken for all here).
    """
    at_once = WARP * 4 // max(4, size)
    if any(all(addresses[t ^ other] == a for t, a in enumerate(addresses)) for other in (1, 2)):
        at_once *= 2
    clocks = 0
    for first in range(0, len(addresses), at_once):
        words = {word for a in addresses[first : first + at_once] for word in range(a // 4, (a + size + 3) // 4)}
        clocks += max(Counter(word % BANKS for word in words).values())
    return clocks


@lru_cache(256)
def of_loads(tiling: Tiling) -> dict[str, int]:
    """Of a thread's loads in one iteration over a leaf, by what is read: query, key, weight, value."""
    steps, slices = tiling.head_columns // tiling.vector, tiling.value_slices
    each, rows, vector = tiling.vector_bytes, _row, tiling.vector
    query = _of_warp(tiling, each, lambda t: _place(tiling, rows(tiling, t), 0, tiling.query_stride))
    key = _of_warp(tiling, each, lambda t: _place(tiling, _lane(tiling, t), 0, tiling.slice_stride))
    weight = _of_warp(tiling, each, lambda t: _place(tiling, rows(tiling, t), 0, tiling.p_stride))
    value = _of_warp(tiling, each, lambda t: _place(tiling, 0, _lane(tiling, t) * vector, tiling.slice_stride))
    return {
        "query": tiling.rows * steps * query,
        "key": tiling.keys * steps * key,
        "weight": tiling.rows * tiling.block_n // vector * slices * weight,
        "value": tiling.block_n * tiling.groups * slices * value,
    }


@lru_cache(256)
def of_iteration(tiling: Tiling) -> int:
    """Of all a warp does with shared memory in one iteration over a leaf: loads, weights and slices put down."""
    put = _of_warp(
        tiling, tiling.stored_bytes, lambda t: _place(tiling, _row(tiling, t), _lane(tiling, t), tiling.p_stride)
    )
    copied = tiling.copies * (tiling.head_slices + tiling.value_slices) * tiling.words
    return sum(of_loads(tiling).values()) + tiling.rows * tiling.keys * put + copied


def _lane(tiling: Tiling, t: int) -> int:
    """Which lane of its row a thread of a worker is."""
    return t // tiling.abreast % tiling.lanes


def _row(tiling: Tiling, t: int) -> int:
    """The first of its query rows, counted over threads."""
    return t // (tiling.abreast * tiling.lanes) * tiling.abreast + t % tiling.abreast


def _place(tiling: Tiling, row: int, column: int, stride: int) -> int:
    """Where a value lies in shared memory, rows of ``stride`` values, swizzled or not."""
    swapped = column ^ (row & 7) * tiling.vector if tiling.layout == "swizzled" else column
    return row * stride + swapped


def _of_warp(tiling: Tiling, size: int, place: Callable[[int], int]) -> int:
    """Of one access: where each thread of a worker reaches, in values; workers of one warp reach into memories of their own."""
    apart = tiling.stages * tiling.stage_size
    reached = [t // tiling.team * apart + place(t % tiling.team) for t in range(WARP)]
    return of_access([n * tiling.stored_bytes for n in reached], size)
