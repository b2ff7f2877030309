"""Causal but for a prefix that everybody sees, as a prefix language model reads its prompt."""

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask

MASK = Mask(
    "prefix",
    "keys up to its own position, and the first `prefix` ones",
    high=Bound("max(prefix, position + 1)"),
    integers=("prefix",),
    examples=({"prefix": 3}, {"prefix": 0}, {"prefix": 1000}),
    picture="xxx.. xxx.. xxx.. xxxx. xxxxx xxxxx",
)
