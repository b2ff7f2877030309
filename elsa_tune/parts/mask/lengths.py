"""Key padding: each sequence of a batch has as many keys as it says, and what follows is filling."""

from __future__ import annotations

from collections.abc import Mapping

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.operand import Array


def _half_to_all(sizes: Mapping[str, int]) -> list[int]:
    """Lengths spread evenly between half the keys and all of them: three quarters, of one sequence."""
    batch, kv_len = sizes["batch"], sizes["kv_len"]
    return [max(1, kv_len * (2 * (batch + i) + 1) // (4 * batch)) for i in range(batch)]


MASK = Mask(
    "lengths",
    "the first `lengths` keys of its own sequence",
    high=Bound("lengths"),
    arrays=(Array("lengths", "int64", ("batch",), _half_to_all),),
    examples=({"lengths": 3}, {"lengths": 0}, {"lengths": 50}, {"lengths": 1000}, {"lengths": -7}),
    picture="xxx.. xxx.. xxx..",
)
