"""What a GPU kernel does, as far as its axes and its compiler's report tell: what a prediction of its time is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """Query rows of a tile; keys of one iteration of its loop, a leaf for each worker; splits of the keys; leaves on their way;
    launches that wait for each other; clocks of the matrix unit relative to one float16 product; and the instructions of a
    thread in an iteration: ``loop_all``, ``loop_fma``, ``loop_exp``, ``loop_matrix``, and ``wavefronts``, the clocks
    that a warp keeps shared memory busy."""

    block_m: int
    step: int
    splits: int
    stages: int
    launches: int
    product: float
    iteration: Mapping[str, int]
