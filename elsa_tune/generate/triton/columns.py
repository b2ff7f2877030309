"""The columns of a dimension as the powers of two that Triton's tensors have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """Some columns of a dimension of ``total``: ``size`` of them, a power of two, from ``start``."""

    start: int
    size: int
    total: int


def parts(dim: int, how: str) -> tuple[Part, ...]:
    """A dimension as one padded power of two, or as powers of two of at least 16 that fill it with the least padding."""
    if how == "pad":
        return (Part(0, max(16, 1 << (dim - 1).bit_length()), dim),)
    found, start = list[Part](), 0
    while start < dim:
        left = dim - start
        below, above = 1 << (left.bit_length() - 1), max(16, 1 << (left - 1).bit_length())
        size = above if below < 16 or above - left < 16 else below
        found.append(Part(start, size, dim))
        start += size
    return tuple(found)
