"""A sliding window counted from the lower right: the last query's own position is the last key's, as decoding needs."""

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask

MASK = Mask(
    "window_lower_right",
    "`leftlate` keys before its own position and `rightlate` after it, counted from the last query and the last key",
    low=Bound("position + kv_len - q_len - leftlate"),
    high=Bound("position + kv_len - q_len + rightlate + 1"),
    integers=("leftlate", "rightlate"),
    examples=(
        {"leftlate": 2, "rightlate": 1},
        {"leftlate": 0, "rightlate": 0},
        {"leftlate": 40, "rightlate": 0},
        {"leftlate": 1, "rightlate": 1000},
    ),
    picture="xxx.. xxxx. .xxxx ..xxx",
)
