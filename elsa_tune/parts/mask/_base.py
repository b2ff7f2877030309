"""A mask in closed form is two bounds; what tiles skip, what they need not test and what is counted follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from elsa_tune.parts.bound import EVERY_KEY, POSITION, ZERO, Bound, least_of, most_of
from elsa_tune.parts.operand import Array, Number, Operand, values_at

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = frozenset((POSITION, "q_len", "kv_len"))
"""What a bound may be of, beside the mask's own integers and its limits."""

LIMITS = (("batch",), ("batch", "q_len"))
"""Axes of an array that bounds may be of: it holds an integer for each sequence of a batch, or one for each position."""

MOST_COUNTED = 1 << 22
"""Positions that are counted one by one; of more, as many are sampled evenly."""


@dataclass(frozen=True)
class Mask:
    """The query at ``position`` sees keys low <= key < high. Both bounds grow with the position, or stay.

    ``integers`` are its own, part of a problem's shape; ``arrays`` come with the tensors, and what bounds read by position must grow
    with it too. ``examples`` are values that cut inside small shapes, of its integers and, for one sequence, of arrays with one
    integer for each. ``picture`` is the first example written out by hand, a line a position: x where a key is seen.
    ``allowed`` are the least and the most that integers may be, where that is not 0 and any number.
    ``torchs`` names torch's own form, where it has one: is_causal or causal_lower_right.
    ``test``, of a mask whose other arrays decide pair by pair within its bounds: ``test(**own)`` says whether pairs are seen, of its
    integers and what its arrays hold there; ``placed``: it asks where that is too, batch=, head=, position=, key= ... Each
    language has a text of it.
    """

    name: str
    title: str
    low: Bound = ZERO
    high: Bound = EVERY_KEY
    integers: tuple[str, ...] = ()
    arrays: tuple[Array, ...] = ()
    examples: tuple[Mapping[str, int], ...] = ({},)
    allowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    picture: str = ""
    torchs: str = ""
    test: Callable[..., Any] | None = None
    placed: bool = False
    of: tuple[Mask, ...] = ()

    def __post_init__(self) -> None:
        limits = {one.name for one in self.limits}
        if unknown := (self.low.names | self.high.names) - LENGTHS - set(self.integers) - limits:
            raise ValueError(f"mask {self.name}: its bounds are of {', '.join(sorted(unknown))}, which nothing gives")
        unread = {one.name for one in self.arrays} - limits
        if unread and not self.tested:
            raise ValueError(f"mask {self.name}: nothing reads {', '.join(sorted(unread))}; its bounds or a test must")
        growing = {one.name: POSITION for one in self.by_position}
        for bound in (self.low, self.high):
            _ = Bound(bound.written("python", growing)).first_beyond  # raises ValueError where a bound may fall

    @cached_property
    def limits(self) -> tuple[Array, ...]:
        """Its arrays that its bounds are of."""
        each = [one for one in self.arrays if one.axes in LIMITS and one.dtype == "int64"]
        return tuple(one for one in each if one.name in self.low.names | self.high.names)

    @property
    def by_position(self) -> tuple[Array, ...]:
        """Those that hold an integer for each position."""
        return tuple(one for one in self.limits if "q_len" in one.axes)

    @property
    def bounded_by(self) -> tuple[str, ...]:
        """What its bounds are of in kernels, beside position and lengths: integers, limits, or of those by position the pointer to a
        sequence's own and the stride."""
        by_position = {limit.name: (limit.data, limit.strides[1]) for limit in self.by_position}
        return (*self.bounded, *(name for one in self.limits for name in by_position.get(one.name, (one.name,))))

    @property
    def bounded(self) -> tuple[str, ...]:
        """Its integers that its bounds are of."""
        return tuple(name for name in self.integers if name in self.low.names | self.high.names)

    @property
    def tested(self) -> tuple[Mask, ...]:
        """The masks among those that intersect here that test pairs."""
        return tuple(one for one in self.of or (self,) if one.test is not None)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What a kernel takes because of it, in order."""
        return (*(Number(name, "integer") for name in self.integers), *self.arrays)

    def integers_of(self, turn: int) -> tuple[int, ...]:
        """Its integers in one of its examples, in turn."""
        example = self.examples[turn % len(self.examples)]
        return tuple(example[name] for name in self.integers)

    def passes(self, own: Mapping[str, Any], **place: Any) -> Any:
        """Whether pairs somewhere (batch, head, position, key) pass the tests of pairs; ``own`` holds operands by name."""
        passed: Any = True
        for one in self.tested:
            assert one.test is not None
            passed = passed & one.test(**values_at(one.operands, own, place), **(place if one.placed else {}))
        return passed

    @property
    def cuts_front(self) -> bool:
        """Whether a position may see less than all keys before its last."""
        return self.low != ZERO

    @property
    def cuts_back(self) -> bool:
        """Whether a position may see less than all keys after its first."""
        return self.high != EVERY_KEY

    def seen(self, position: Any, q_len: Any, kv_len: Any, **own: Any) -> tuple[Any, Any]:
        """The keys [low, high) that positions (an integer, array or tensor) see, both within [0, kv_len]; a position whose low
        reaches its high sees none. ``own`` are the mask's integers, and what its limits hold there, as one integer or shaped
        to broadcast with positions, as q_len and kv_len may be too."""
        names = {"position": position, "q_len": q_len, "kv_len": kv_len, **own}
        return _within(self.low.value(**names), kv_len), _within(self.high.value(**names), kv_len)

    def seeing(self, key: Any, q_len: int, kv_len: int, **own: Any) -> tuple[Any, Any]:
        """The positions [first, end) that see a key (an integer, array or tensor within [0, kv_len)), both within [0, q_len], of a
        mask that has no limits by position."""
        names = {"key": key, "q_len": q_len, "kv_len": kv_len, **own}
        first, end = self.high.first_beyond.value(**names), self.low.first_beyond.value(**names)
        return _within(first, q_len), _within(end, q_len)

    def pairs(self, q_len: int, kv_len: int, most: int = MOST_COUNTED, **own: Any) -> int:
        """(position, key) pairs of one sequence within the bounds; of more than ``most`` positions, estimated. Limits are
        integers, or by position arrays of as many as are counted."""
        if not self.cuts_front and not self.cuts_back:
            return q_len * kv_len
        import numpy as np

        counted = min(q_len, most, *(len(own[one.name]) for one in self.by_position))
        position = np.arange(counted, dtype=np.int64)
        if counted < q_len:
            position = np.linspace(0, q_len - 1, counted).astype(np.int64)
        low, high = self.seen(position, q_len, kv_len, **own)
        return int((high - low + 0 * position).clip(0).sum()) * q_len // counted

    def dense(self, q_len: int, kv_len: int, device: Any = None, **own: Any) -> Tensor:
        """bool [..., q_len, kv_len]: whether a key is within a position's bounds; what comes before is how ``own`` are shaped,
        [..., 1, 1] or by position [..., q_len, 1], on the device."""
        import torch

        low, high = self.seen(torch.arange(q_len, device=device)[:, None], q_len, kv_len, **own)
        key = torch.arange(kv_len, device=device)
        seen: Tensor = (key >= low) & (key < high)
        return seen.expand(*seen.shape[:-2], q_len, kv_len)


def intersection(masks: Sequence[Mask]) -> Mask:
    """What all of them let through."""
    names = [one.name for mask in masks for one in mask.operands]
    if len(set(names)) < len(names):
        raise ValueError(f"masks {', '.join(m.name for m in masks)} share the name of an operand")
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
        integers=tuple(name for mask in masks for name in mask.integers),
        arrays=tuple(array for mask in masks for array in mask.arrays),
        examples=tuple(examples),
        allowed={name: limits for mask in masks for name, limits in mask.allowed.items()},
        of=tuple(masks),
    )


def _within(bound: Any, length: Any) -> Any:
    if not isinstance(length, int):
        return length.clip(max=bound).clip(min=0)
    return max(0, min(bound, length)) if isinstance(bound, int) else bound.clip(0, length)
