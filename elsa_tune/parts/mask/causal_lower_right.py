"""Causal from the lower right: the last query sees every key, as when a cache holds what came before the queries."""

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask

MASK = Mask(
    "causal_lower_right",
    "keys up to its own position, counted from the last query and the last key",
    high=Bound("position + 1 + kv_len - q_len"),
    picture="xx.. xxx. xxxx",
    torchs="causal_lower_right",
)
