"""How query, key and value lie in memory: the orders that models hand over, their names, how to recognise and make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ORDERS = {
    "bhsd": "contiguous [batch, heads, length, dim]",
    "bshd": "contiguous [batch, length, heads, dim], as a projection leaves it, transposed",
    "fused": "slices of one projection [batch, length, heads + 2 kv_heads, dim], transposed: rows lie farther apart",
    "cache": "the first keys of a longer cache [batch, heads, capacity, dim]: heads lie farther apart",
}
"""Memory orders of a [batch, heads, length, dim] tensor, last stride 1."""

CONTIGUOUS = "bhsd"


def split(text: str) -> tuple[str, str, str] | None:
    """The orders of query, key and value that ``order`` or ``query-key-value`` spells, or None where it is misspelled."""
    words = text.split("-")
    if len(words) == 1:
        words *= 3
    return (words[0], words[1], words[2]) if len(words) == 3 and all(word in ORDERS for word in words) else None


def joined(query: str, key: str, value: str) -> str:
    """One word where all three are alike."""
    return query if query == key == value else f"{query}-{key}-{value}"


def alike(order: str, heads: int, length: int) -> str:
    """The plainest order in which a tensor of so many heads and rows lies the same way."""
    return CONTIGUOUS if length == 1 or (heads == 1 and order in ("bshd", "cache")) else order


def order_of(shape: Sequence[int], strides: Sequence[int]) -> str:
    """The order of a [batch, heads, length, dim] tensor with these strides (in elements), or the nearest to it."""
    _, heads, length, dim = shape
    _, head, row, _ = strides
    if length == 1:
        return CONTIGUOUS
    if heads == 1:
        return CONTIGUOUS if row == dim else "fused"
    if head < row:
        return "bshd" if row == heads * dim else "fused"
    return CONTIGUOUS if head == length * dim else "cache"


def arranged(orders: Sequence[str], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of contiguous [batch, heads, length, dim] tensors in fresh memory, in the given orders."""
    width = query.shape[1] + 2 * key.shape[1]
    alone = query.shape[2:] != key.shape[2:] or key.shape != value.shape
    if set(orders) == {"fused"} and not alone:
        batch, _, length, dim = query.shape
        projection = query.new_empty(batch, length, width, dim).transpose(1, 2)
        heads, kv_heads = query.shape[1], key.shape[1]
        made = (
            projection[:, :heads],
            projection[:, heads : heads + kv_heads],
            projection[:, heads + kv_heads :],
        )
    else:
        made = (
            _empty(orders[0], query, width),
            _empty(orders[1], key, width),
            _empty(orders[2], value, width),
        )
    for to, source in zip(made, (query, key, value), strict=True):
        to.copy_(source)
    return made


def _empty(order: str, like: Tensor, width: int) -> Tensor:
    batch, heads, length, dim = like.shape
    if order == "cache":
        capacity = 1 << length.bit_length()  # caches are made longer than what is seen of them, often by powers of two
        return like.new_empty(batch, heads, capacity, dim)[:, :, :length]
    if order == CONTIGUOUS:
        return like.new_empty(like.shape)
    return like.new_empty(batch, length, width if order == "fused" else heads, dim)[:, :, :heads].transpose(1, 2)
