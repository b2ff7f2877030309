"""Key padding on the left: each sequence of a batch has keys from where it says on, and what comes before is filling."""

from __future__ import annotations

from collections.abc import Mapping

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.operand import Array


def _none_to_half(sizes: Mapping[str, int]) -> list[int]:
    """Spread evenly between no key and half of them: a quarter, of one sequence."""
    batch, kv_len = sizes["batch"], sizes["kv_len"]
    return [kv_len * (2 * i + 1) // (4 * batch) for i in range(batch)]


MASK = Mask(
    "starts",
    "keys of its own sequence from `starts` on",
    low=Bound("starts"),
    arrays=(Array("starts", "int64", ("batch",), _none_to_half),),
    examples=({"starts": 2}, {"starts": 0}, {"starts": 1000}, {"starts": 50}, {"starts": -7}),
    picture="..xxx ..xxx ..xxx",
)
