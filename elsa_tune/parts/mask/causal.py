"""Causal from the top left, as torch's is_causal: the query at position i sees keys 0..i."""

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask

MASK = Mask(
    "causal", "keys up to its own position", high=Bound("position + 1"), picture="x... xx.. xxx.", torchs="is_causal"
)
