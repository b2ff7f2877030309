"""A sliding window: so many keys left of a query's own position, and so many right of it."""

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask

MASK = Mask(
    "window",
    "`left` keys before its own position and `right` after it",
    low=Bound("position - left"),
    high=Bound("position + right + 1"),
    integers=("left", "right"),
    examples=({"left": 2, "right": 1}, {"left": 0, "right": 0}, {"left": 40, "right": 0}, {"left": 1, "right": 1000}),
    picture="xx... xxx.. xxxx. .xxxx ..xxx ...xx ....x .....",
)
