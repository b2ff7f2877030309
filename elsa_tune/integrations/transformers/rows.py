"""Which keys the queries see: told by bounds of each row and by padding, and said by the masks of ours that are cheapest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from elsa_tune.masks import CAUSAL, NONE, AttnMask, causal, dense, lengths, ranges, window


@dataclass(frozen=True, eq=False)
class Rows:
    """Of query i the keys [low[i], high[i]), int64 [1 or batch, q_len] that grow or stay; none where both are equal."""

    low: Tensor
    high: Tensor

    @classmethod
    def every(cls, q_len: int, kv_len: int, device: torch.device | str | None = None) -> Rows:
        """Every key."""
        low, high = (torch.full((1, q_len), n, device=device) for n in (0, kv_len))
        return cls(low, high)

    @classmethod
    def causal(cls, q_len: int, kv_len: int, before: int = 0, device: torch.device | str | None = None) -> Rows:
        """Keys up to a query's own position, the first query's behind ``before`` keys."""
        own = torch.arange(before, before + q_len, device=device)[None]
        return cls(torch.zeros_like(own), (own + 1).clamp(0, kv_len))

    @classmethod
    def band(cls, first: Tensor, last: Tensor, q_len: int, before: int) -> Rows | None:
        """What a window lets through whose first and last query, behind ``before`` keys and so many more, see bools [1, 1, kv_len]; None of other
        batches, and where a query's keys do not lie together."""
        if len(first) > 1 or len(last) > 1:
            return None
        kv_len, ends = first.shape[-1], []
        for one in (first, last):
            begin, count, together = _runs(one)
            if not together:
                return None
            ends.append((int(begin), int(begin + count)))
        own = torch.arange(before, before + q_len, device=first.device)[None]
        low, high = torch.zeros_like(own), torch.full_like(own, kv_len)
        if ends[1][0] > 0:
            low = (own + ends[1][0] - int(own[0, -1])).clamp(0, kv_len)
        if ends[0][1] < kv_len:
            high = (own + ends[0][1] - before).clamp(0, kv_len)
        return cls(low, high)

    def are(self, seen: Iterable[Tensor]) -> bool:
        """Whether bools [1 or batch, queries, kv_len], of queries that follow one another, say the same."""
        done = 0
        for some in seen:
            key, queries = torch.arange(some.shape[-1], device=some.device), slice(done, done + some.shape[1])
            said = (key >= self.low[:, queries, None]) & (key < self.high[:, queries, None])
            if not torch.equal(said.expand_as(some), some):
                return False
            done += some.shape[1]
        return True

    @classmethod
    def of(cls, seen: Iterable[Tensor]) -> Rows | None:
        """What bools [1 or batch, queries, kv_len], of queries that follow one another, let through; None where a query's keys do not lie
        together, or a later query's begin or end before those of an earlier one."""
        found = []
        for some in seen:
            first, count, together = _runs(some)
            if not together:
                return None
            found.append((first, first + count))
        return cls._growing(*(torch.cat(bounds, 1) for bounds in zip(*found, strict=True)))

    @classmethod
    def _growing(cls, low: Tensor, high: Tensor) -> Rows | None:
        """The bounds, with those of queries that see nothing where others leave room for them."""
        sees = low < high
        top = torch.where(sees, high, 0).cummax(-1).values
        low = torch.where(sees, low, top)
        if bool(((top != high) & sees).any()) or bool((low.diff() < 0).any()):
            return None
        if len(low) > 1 and bool(((low == low[:1]) & (top == top[:1])).all()):
            low, top = low[:1], top[:1]
        return cls(low, top)

    def between(self, start: Tensor, end: Tensor) -> Rows | None:
        """What of it lies within [start, end), whole numbers that broadcast with the bounds; None where that does not grow."""
        return self._growing(torch.maximum(self.low, start), torch.minimum(self.high, end))

    def of_keys(self, first: int, end: int) -> Rows:
        """The same of the keys from ``first`` to before ``end`` alone, which are counted from there."""
        return Rows(*((bound - first).clamp(0, end - first) for bound in (self.low, self.high)))

    @cached_property
    def reach(self) -> tuple[int, int]:
        """The first key that any query sees, and the one after the last; one key at least."""
        first, end = int(self.low[:, 0].min()), int(self.high[:, -1].max())
        return (first, end) if first < end else (0, max(end, 1))

    @property
    def told(self) -> AttnMask:
        """The mask that says so bound by bound: key padding, of one query."""
        if self.low.shape[1] == 1:
            return lengths(self.high[:, 0], self.low[:, 0])
        return ranges(self.low, self.high)

    @cached_property
    def closed(self) -> AttnMask | None:
        """The mask of its reach that is told by numbers alone; None where there is none. Causality and windows begin at the top left of as
        many queries as keys, at the lower right of others."""
        within = self.of_keys(*self.reach)
        low, high = within.low, within.high
        q_len, kv_len = low.shape[1], self.reach[1] - self.reach[0]
        own = torch.arange(kv_len - q_len, kv_len, device=low.device)
        left = None if not int(low[:, -1].max()) else int(own[-1] - low[0, -1])
        right = None if int(high[:, 0].min()) == kv_len else int(high[0, 0] - 1 - own[0])
        if (left is not None and left < 0) or (right is not None and right < 0):
            return None
        begin = torch.zeros_like(own) if left is None else (own - left).clamp(0, kv_len)
        end = torch.full_like(own, kv_len) if right is None else (own + right + 1).clamp(0, kv_len)
        if not bool((low == begin).all()) or not bool((high == end).all()):
            return None
        if left is right is None:
            return NONE
        last = q_len != kv_len
        directed = causal(True) if last else CAUSAL
        if left is None and right == 0:
            return directed
        return window(left, right, last) & (directed if right == 0 else NONE)

    @cached_property
    def sequences(self) -> tuple[Tensor, AttnMask] | None:
        """Of queries that are as many as keys, int64 [1 or batch, q_len], where each one's sequence begins, and what is seen within each,
        causality or all of it; None where they are one sequence, or others are seen."""
        low, high, q_len = self.low, self.high, self.low.shape[1]
        position = torch.arange(q_len, device=low.device)
        begins = bool((low <= position).all()) and bool((low.gather(1, low) == low).all())
        if not begins or not bool(low.any()):
            return None
        if bool((high == position + 1).all()):
            return low, CAUSAL
        following = low.gather(1, high.clamp(0, q_len - 1))
        ends = bool(((following == high) | (high == q_len)).all())
        same = (low.diff() != 0) | (high.diff() == 0)
        return (low, NONE) if ends and bool((high > position).all()) and bool(same.all()) else None


@dataclass(frozen=True, eq=False)
class Seen:
    """Which keys queries see: those of their rows that are none of padding, bool [batch, kv_len], true where there is a token."""

    rows: Rows
    tokens: Tensor | None = None

    def of_keys(self, first: int, end: int) -> Seen:
        """The same of the keys from ``first`` to before ``end`` alone."""
        if (first, end) not in self._parts:
            tokens = None if self.tokens is None else self.tokens[:, first:end]
            self._parts[first, end] = Seen(self.rows.of_keys(first, end), tokens)
        return self._parts[first, end]

    @cached_property
    def _parts(self) -> dict[tuple[int, int], Seen]:
        return {}

    def dense(self, batch: int, kv_len: int) -> Tensor:
        """bool [batch, 1, q_len, kv_len]: whether a pair is seen."""
        key = torch.arange(kv_len, device=self.rows.low.device)
        seen = (key >= self.rows.low[..., None]) & (key < self.rows.high[..., None])
        seen = seen if self.tokens is None else seen & self.tokens[:, None]
        return seen[:, None].expand(batch, 1, -1, kv_len)

    @cached_property
    def is_nothing(self) -> bool:
        """Whether no query sees any key."""
        return not bool((self.rows.low < self.rows.high).any()) or not (self.tokens is None or bool(self.tokens.any()))

    @cached_property
    def attn_mask(self) -> AttnMask:
        """The mask that says so of the keys within the reach of the rows."""
        closed, first, end = self.rows.closed, *self.rows.reach
        rows = self.rows.of_keys(first, end)
        if self.tokens is None or bool(self.tokens[:, first:end].all()):
            return rows.told if closed is None else closed
        tokens = self.tokens[:, first:end]
        start, count, together = _runs(tokens)
        if not together:
            return (rows.told if closed is None else closed) & dense(tokens[:, None, None])
        if closed is not None:
            return closed & lengths(start + count, start if bool(start.any()) else None)
        within = rows.between(start[:, None], (start + count)[:, None])
        return within.told if within is not None else rows.told & dense(tokens[:, None, None])

    @cached_property
    def _sequences(self) -> tuple[Tensor, AttnMask] | None:
        if self.tokens is not None or self.rows.low.shape[1] == 1:
            return None
        return self.rows.of_keys(*self.rows.reach).sequences

    @property
    def is_shared(self) -> bool:
        """Whether all sequences of a batch see the same."""
        return self.tokens is None and len(self.rows.low) == 1

    def packed(self, batch: int) -> tuple[Tensor, Tensor, AttnMask] | None:
        """Sequences that follow one another in each row of a batch without padding, of the keys within reach: where each begins and the last
        ends, int64, in the batch as one row, of queries and of keys; and what is seen within each. None where there are none."""
        if self._sequences is None:
            return None
        first, within = self._sequences
        begins = (first == torch.arange(first.shape[1], device=first.device)).expand(batch, -1)
        cu = torch.cat([begins.flatten().nonzero()[:, 0], first.new_tensor([begins.numel()])])
        return cu, cu, within


def _runs(seen: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Along the last dimension of bools: the first that is true, how many are, and whether they lie together everywhere."""
    count, first = seen.sum(-1), seen.to(torch.uint8).argmax(-1)
    begins = seen[..., 0] + (seen[..., 1:] & ~seen[..., :-1]).sum(-1)
    return torch.where(count > 0, first, 0), count, bool((begins <= 1).all())
