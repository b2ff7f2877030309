"""A mask in closed form is two bounds; what tiles skip, what they need not test and what is counted follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elsa_tune.parts.bound import EVERY_KEY, ZERO, Bound, least_of, most_of

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = frozenset(("position", "q_len", "kv_len"))
"""What a bound may be of, beside the mask's own integers."""

MOST_COUNTED = 1 << 22
"""Positions that are counted one by one; of more, as many are sampled evenly."""


@dataclass(frozen=True)
class Mask:
    """The query at ``position`` sees keys low <= key < high. Both bounds grow with the position, or stay.

    ``integers`` are its own, part of a problem's shape; ``examples`` are values of them that cut inside small shapes. ``picture``
    is the first example written out by hand, a line a position: x where a key is seen.
    ``torchs`` names torch's own form, where it has one: is_causal or causal_lower_right.
    """

    name: str
    title: str
    low: Bound = ZERO
    high: Bound = EVERY_KEY
    integers: tuple[str, ...] = ()
    examples: tuple[Mapping[str, int], ...] = ({},)
    picture: str = ""
    torchs: str = ""

    def __post_init__(self) -> None:
        if unknown := (self.low.names | self.high.names) - LENGTHS - set(self.integers):
            raise ValueError(f"mask {self.name}: its bounds are of {', '.join(sorted(unknown))}, which nothing gives")
        for bound in (self.low, self.high):
            _ = bound.first_beyond  # raises ValueError where a bound may fall

    @property
    def cuts_front(self) -> bool:
        """Whether a position may see less than all keys before its last."""
        return self.low != ZERO

    @property
    def cuts_back(self) -> bool:
        """Whether a position may see less than all keys after its first."""
        return self.high != EVERY_KEY

    def seen(self, position: Any, q_len: int, kv_len: int, **integers: int) -> tuple[Any, Any]:
        """The keys [low, high) that positions (an integer, array or tensor) see, both within [0, kv_len]; a position whose low
        reaches its high sees none."""
        names = {"position": position, "q_len": q_len, "kv_len": kv_len, **integers}
        return _within(self.low.value(**names), kv_len), _within(self.high.value(**names), kv_len)

    def seeing(self, key: Any, q_len: int, kv_len: int, **integers: int) -> tuple[Any, Any]:
        """The positions [first, end) that see a key (an integer, array or tensor within [0, kv_len)), both within [0, q_len]."""
        names = {"key": key, "q_len": q_len, "kv_len": kv_len, **integers}
        first, end = self.high.first_beyond.value(**names), self.low.first_beyond.value(**names)
        return _within(first, q_len), _within(end, q_len)

    def pairs(self, q_len: int, kv_len: int, **integers: int) -> int:
        """(position, key) pairs that are seen; of more than MOST_COUNTED positions, estimated."""
        if not self.cuts_front and not self.cuts_back:
            return q_len * kv_len
        import numpy as np

        counted = min(q_len, MOST_COUNTED)
        position = np.arange(counted, dtype=np.int64)
        if counted < q_len:
            position = np.linspace(0, q_len - 1, counted).astype(np.int64)
        low, high = self.seen(position, q_len, kv_len, **integers)
        return int((high - low).clip(0).sum()) * q_len // counted

    def dense(self, q_len: int, kv_len: int, **integers: int) -> Tensor:
        """bool [q_len, kv_len]: whether a position sees a key."""
        import torch

        low, high = self.seen(torch.arange(q_len)[:, None], q_len, kv_len, **integers)
        key = torch.arange(kv_len)
        seen: Tensor = (key >= low) & (key < high)
        return seen.expand(q_len, kv_len)


def intersection(masks: Sequence[Mask]) -> Mask:
    """What all of them let through."""
    integers = [name for mask in masks for name in mask.integers]
    if len(set(integers)) < len(integers):
        raise ValueError(f"masks {', '.join(m.name for m in masks)} share the name of an integer")
    longest = max(len(mask.examples) for mask in masks)
    examples = [
        {name: value for mask in masks for name, value in mask.examples[i % len(mask.examples)].items()}
        for i in range(longest)
    ]
    return Mask(
        name="+".join(mask.name for mask in masks),
        title="; ".join(mask.title for mask in masks),
        low=most_of([mask.low for mask in masks if mask.cuts_front] or [ZERO]),
        high=least_of([mask.high for mask in masks if mask.cuts_back] or [EVERY_KEY]),
        integers=tuple(integers),
        examples=tuple(examples),
    )


def _within(bound: Any, length: int) -> Any:
    if isinstance(bound, int):
        return max(0, min(bound, length))
    return bound.clip(0, length)
