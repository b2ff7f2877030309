"""Masks, as a program writes them: what ``attn_mask`` may be beside a tensor.

``&`` intersects masks and combines them with scores (elsa_tune.scores): ``masks.causal() & masks.window(1023) & scores.softcap(50.0)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as parts
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask.blocks import LARGEST_BLOCK
from elsa_tune.parts.mask.columns import ENDLESS
from elsa_tune.parts.operand import Array, Operands
from elsa_tune.problem import LARGEST, Problem, declared

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "AttnMask", "blocks", "causal", "columns", "dense", "from_block_mask", "lengths", "none", "prefix", "ranges", "strided", "window",
]  # fmt: skip
"""What people write; the others are for those who ask what was written."""


class AttnMask:
    """Which keys a query sees, and what is done to their scores: masks that intersect, and scores in the order they are done.

    ``mask`` and ``score`` are spelled as in a problem (``causal+window``, ``softcap+bias``), ``operands`` are what they take, by name:
    numbers, tensors, and the layout of strided(), which depends on lengths and is made at every call.
    """

    __slots__ = ("mask", "numbers", "operands", "score")

    def __init__(
        self, mask: str = parts.NONE, score: str = scores.NONE, operands: Mapping[str, Any] | None = None
    ) -> None:
        self.mask, self.score, self.operands = mask, score, dict(operands or {})
        if self.operands and not _is_compiled():  # a compiler's are looked at when they are called
            for array in (*parts.get(mask).arrays, *scores.get(score).arrays):
                if not isinstance(self.operands[array.name], _Strided):
                    self.operands[array.name] = _aligned(array, self.operands[array.name])
        # what tells it from others of its family, without tensors
        self.numbers = tuple(x for x in self.operands.values() if isinstance(x, int | float))

    def __and__(self, other: AttnMask) -> AttnMask:
        """What both let through, this one's scores first. Raises WrongArguments where one is given twice, with other operands."""
        if not isinstance(other, AttnMask):
            return NotImplemented
        words = {one for both in (self, other) for one in both.mask.split("+")} - {parts.NONE}
        chain = [one for both in (self, other) for one in both.score.split("+") if one != scores.NONE]
        twice = set(self.operands) & set(other.operands) or {one for one in chain if chain.count(one) > 1}
        if twice:
            raise WrongArguments(f"attn_mask has {', '.join(sorted(twice))} twice; give it once, with both in one")
        mask, score = "+".join(sorted(words)) or parts.NONE, "+".join(chain) or scores.NONE
        return AttnMask(mask, score, {**self.operands, **other.operands})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in order."""
        return tuple(x for x in self.operands.values() if _is_tensor(x))

    def with_tensors(self, tensors: Sequence[Tensor]) -> AttnMask:
        """The same of other tensors, in the same order."""
        given = dict(zip((name for name, x in self.operands.items() if _is_tensor(x)), tensors, strict=True))
        return AttnMask(self.mask, self.score, {**self.operands, **given}) if given else self

    def of(self, problem: Problem) -> Problem:
        """The problem with this mask and these scores. Raises BadProblem."""
        mask, chain = parts.get(self.mask), scores.get(self.score)
        integers = tuple(self.operands[name] for name in mask.integers)
        reals = tuple(self.operands[name] for name in chain.reals)
        return problem.reshaped(mask=self.mask, score=self.score, integers=integers, reals=reals)

    def in_order(self, query: Tensor, key: Tensor) -> Operands:
        """What a kernel is given for such tensors, in the family's order. Raises WrongArguments for a bias of another dtype, and for lengths beyond
        the keys on a CPU, where asking costs nothing."""
        return tuple(
            self._converted(one, query, key) if isinstance(one, Array) else self.operands[one.name]
            for one in declared(self.mask, self.score, _state(query))
        )

    def _converted(self, array: Array, query: Tensor, key: Tensor) -> Tensor:
        import torch

        from elsa_tune.generate.tensors import one_of_each

        value = self._made(array, query.shape[2], key.shape[2], query.device)
        if value.is_cpu and value.numel() == 1 and not query.is_cpu:  # one number goes along, as torch lets it
            value = value.to(query.device)
        plain = torch.Tensor, torch.nn.Parameter
        if type(value) not in plain and type(query) in plain:
            value = _plain(array, value)
        value = value.resolve_neg() if value.is_neg() else value
        wanted: torch.dtype = getattr(torch, array.dtype)
        if array.is_float and value.dtype not in (torch.float32, query.dtype):
            raise WrongArguments(
                f"attn_mask has {array.name} of {value.dtype}; it must be torch.bool, torch.float32 or query's {query.dtype}"
            )
        if array in parts.get(self.mask).limits and may_be_read(value) and value.numel():
            _check_limit(array, value, key.shape[2])
        if value.dtype == wanted:
            return value
        return one_of_each(value).to(wanted)  # kernels take either

    def _made(self, array: Array, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        value = self.operands[array.name]
        return _aligned(array, value.layout(q_len, kv_len, device) if isinstance(value, _Strided) else value)

    def dense(self, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
        """bool, broadcastable to [batch, heads, q_len, kv_len]: whether a pair is seen. Raises WrongArguments where scores are more
        than hidden keys."""
        if self.score != scores.NONE:
            raise WrongArguments(f"attn_mask does {self.score} to scores, which no dense mask says; take masks alone")
        import torch

        from elsa_tune.generate.posed import posed

        tensors = {name: x for name, x in self.operands.items() if isinstance(x, torch.Tensor)}
        one = torch.empty(1, device=next((x.device for x in tensors.values()), None))
        if 0 in (batch, heads, q_len, kv_len):
            return one.new_zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
        of_kv_heads = [array for array in parts.get(self.mask).arrays if "kv_heads" in array.axes]
        kv_heads = max((tensors[x.name].shape[x.axes.index("kv_heads")] for x in of_kv_heads), default=1)
        query, key = one.expand(batch, heads, q_len, 1), one.expand(batch, kv_heads, kv_len, 1)
        return posed(self.of(Problem(head_dim=1)), self.in_order(query, key), query, key).dense()

    def __str__(self) -> str:
        """As a problem spells it: ``causal+window@left1023.right0``."""
        names = [name for name, x in self.operands.items() if isinstance(x, int | float)]
        family = ".".join(one for one in (self.mask, self.score) if one != parts.NONE) or parts.NONE
        own = ".".join(f"{name}{repr(self.operands[name]).removesuffix('.0')}" for name in names)
        return f"{family}@{own}" if own else family

    def __repr__(self) -> str:
        return f"AttnMask({self})"


def _is_tensor(x: object) -> bool:
    import torch

    return isinstance(x, torch.Tensor)


def as_tensor(operand: Any, query: Tensor, key: Tensor) -> Tensor:
    """An operand that is no number as a tensor, for a compiler to follow: what depends on lengths is made for those of the call."""
    import torch

    if isinstance(operand, _Strided):
        return operand.made(query.shape[2], key.shape[2], query.device)
    return torch.as_tensor(operand)


def _plain(array: Array, value: Tensor) -> Tensor:
    """A tensor with memory of its own, of one that only stands for it. Raises WrongArguments where that cannot be had."""
    import torch

    made = value.clone()
    if type(made) is not torch.Tensor:
        raise WrongArguments(f"{array.name} is a {type(value).__name__}; it must be a plain torch.Tensor")
    return made


def _is_compiled() -> bool:
    """Whether a compiler follows what is done."""
    from torch.compiler import is_compiling

    return is_compiling()


def may_be_read(x: Tensor) -> bool:
    """Whether asking for numbers costs nothing and nobody watches: a plain tensor on a CPU, which no transform wraps."""
    import torch
    from torch._C._functorch import peek_interpreter_stack

    return x.is_cpu and type(x) is torch.Tensor and peek_interpreter_stack() is None


def _check_limit(limit: Array, value: Tensor, kv_len: int) -> None:
    """Raise WrongArguments unless keys that bound what is seen are keys, and by position do not fall."""
    low, high = (int(x) for x in value.aminmax())
    if low < 0 or high > kv_len:
        raise WrongArguments(f"{limit.name} reach from {low} to {high}; they must lie within 0 and kv_len {kv_len}")
    if "q_len" in limit.axes and bool((value.diff() < 0).any()):
        raise WrongArguments(
            f"{limit.name} falls; a position sees keys that begin and end no earlier than those of the one before"
        )


def _state(query: Tensor) -> str:
    """Of which dtype the floats of states are, for such a query."""
    element = elements.of_dtype(query.dtype)
    return element.state if element else "float32"


def _aligned(array: Array, given: Any) -> Tensor:
    """A tensor of as many dimensions as the array has axes; what comes before those given is shared."""
    import torch

    try:
        value = given if isinstance(given, torch.Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WrongArguments(
            f"{array.name} is {shown(given)}; it must be a tensor, or numbers that make one"
        ) from error
    if value.layout != torch.strided:
        raise WrongArguments(f"{array.name} is {value.layout}; it must be a dense tensor")
    if value.dim() > len(array.axes):
        raise WrongArguments(
            f"{array.name} {tuple(value.shape)} has too many dimensions; it must be [{', '.join(array.axes)}]"
        )
    if (
        value.is_complex()
        or value.dtype in (torch.uint16, torch.uint32, torch.uint64)  # which torch hardly computes with
        or array.is_float is not value.is_floating_point()
        or (array.dtype == "bool") is not (value.dtype == torch.bool)
    ):
        wanted = "torch.bool" if array.dtype == "bool" else "of floats" if array.is_float else "of whole numbers"
        raise WrongArguments(f"{array.name} is {value.dtype}; it must be {wanted}")
    return value[(None,) * (len(array.axes) - value.dim())] if value.dim() < len(array.axes) else value


def whole(name: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """An argument that must be a whole number. Raises WrongArguments."""
    try:
        whole = index(value)
    except TypeError:  # a float, or a tensor of several or of floats
        whole = least - 1
    if isinstance(value, bool) or not least <= whole <= most:
        raise WrongArguments(f"{name} is {shown(value)}; it must be a whole number from {least} to {most}")
    return whole


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise WrongArguments(f"{name} is {shown(value)}; it must be True or False")
    return value


def none() -> AttnMask:
    """Every key."""
    return NONE


def causal(lower_right: bool = False) -> AttnMask:
    """Keys up to a query's own position, from the top left as torch's is_causal, or so that the last query sees the last key."""
    return AttnMask("causal_lower_right" if _flag("lower_right", lower_right) else "causal")


def window(left: int | None, right: int | None = 0, lower_right: bool = False) -> AttnMask:
    """``left`` keys before a query's own position and ``right`` after it; None: as many as there are. ``lower_right``: the last query's
    own position is the last key's."""
    last = "_lower_right" if _flag("lower_right", lower_right) else ""
    integers = {
        "left": LARGEST if left is None else whole("left", left),
        "right": LARGEST if right is None else whole("right", right),
    }
    return AttnMask(
        f"window{last}", operands={f"{name}{'late' if lower_right else ''}": n for name, n in integers.items()}
    )


def prefix(p: int) -> AttnMask:
    """Keys up to a query's own position, and the first ``p``."""
    return AttnMask("prefix", operands={"prefix": whole("p", p)})


def lengths(kv_lengths: Tensor | Sequence[int], start: Tensor | Sequence[int] | None = None) -> AttnMask:
    """Key padding: of sequence b, keys from ``start[b]`` (0 where nothing is given) up to ``kv_lengths[b]``; whole numbers [batch]."""
    ends = AttnMask("lengths", operands={"lengths": kv_lengths})
    return ends if start is None else ends & AttnMask("starts", operands={"starts": start})


def ranges(first_key: Tensor | Sequence[int], end_key: Tensor | Sequence[int]) -> AttnMask:
    """Of position i, keys from ``first_key[i]`` on that lie before ``end_key[i]``; whole numbers [q_len] or [batch, q_len], which grow or
    stay: sequences that follow one another without padding (elsa_tune.attention_varlen makes them). Calls raise WrongArguments where they
    fall (on a CPU, where asking costs nothing)."""
    return AttnMask("ranges", operands={"first_key": first_key, "end_key": end_key})


def dense(seen: Tensor) -> AttnMask:
    """Pairs of which a bool tensor, broadcastable to [batch, heads, q_len, kv_len], is true."""
    return AttnMask("dense", operands={"dense": seen})


def blocks(layout: Tensor, block_q: int, block_k: int) -> AttnMask:
    """Blocks of ``block_q`` queries and ``block_k`` keys of which a bool tensor, broadcastable to [batch, heads, ceil(q_len / block_q),
    ceil(kv_len / block_k)], is true. Of 1 to 1048576 positions each."""
    sizes = {"blockq": _block("block_q", block_q), "blockk": _block("block_k", block_k)}
    return AttnMask("blocks", operands={**sizes, "blocks": layout})


def _block(name: str, value: Any) -> int:
    return whole(name, value, 1, LARGEST_BLOCK)


def from_block_mask(block_mask: BlockMask) -> AttnMask:
    """A torch.nn.attention.flex_attention.BlockMask, for the lengths it was made for: blocks that it says are full, and of the others
    what its mask_mod says of each pair, asked now and kept as bits, alike ones once."""
    from elsa_tune.block_masks import operands_of

    if type(block_mask).__name__ != "BlockMask":
        raise WrongArguments(
            f"block_mask is {shown(block_mask)}; it must be a BlockMask, as create_block_mask makes it"
        )
    mask, operands = operands_of(block_mask)
    return AttnMask(mask, operands=operands)


def columns(bounds: Tensor, causal: bool) -> AttnMask:
    """FlashMask: each key is hidden from the queries of intervals of its own, ``bounds`` [batch, 1 or kv_heads, kv_len, n] of whole
    numbers (what lies beyond the queries is no end).

    Causal: from bounds[..., 0] on (n = 1), or before bounds[..., 1] (n = 2). Not causal: from bounds[..., 0] on, and before
    bounds[..., 1] (n = 2), or [bounds[..., 0], bounds[..., 1]) and [bounds[..., 2], bounds[..., 3]) (n = 4). What is given is copied.
    Raises WrongArguments.
    """
    import torch

    allowed = (1, 2) if _flag("causal", causal) else (2, 4)
    if not isinstance(bounds, torch.Tensor) or bounds.dim() != 4 or bounds.shape[3] not in allowed:
        found = tuple(bounds.shape) if isinstance(bounds, torch.Tensor) else repr(bounds)[:60]
        raise WrongArguments(
            f"bounds is {found}; it must be a tensor [batch, 1 or kv_heads, kv_len, n] of n {' or '.join(map(str, allowed))}"
            f" where causal is {causal}"
        )
    if bounds.is_floating_point() or bounds.is_complex() or bounds.dtype == torch.bool:
        raise WrongArguments(f"bounds is {bounds.dtype}; it must be of whole numbers")
    n, each = bounds.shape[3], bounds.movedim(3, 0).long().clamp(0, ENDLESS).to(torch.int32).contiguous()
    first, endless = (each.new_full((1, 1, 1), x) for x in (0, ENDLESS))
    until = each[1] if (causal and n == 2) or n == 4 else endless
    below = AttnMask("columns", operands={"hidefrom": each[0], "hideto": until})
    if causal:
        return CAUSAL & below
    above = {"upperfrom": each[2], "upperto": each[3]} if n == 4 else {"upperfrom": first, "upperto": each[1]}
    return below & AttnMask("columns_upper", operands=above)


def strided(*, heads: int, local: int, stride: int, block: int) -> AttnMask:
    """S2-Attention: causal, and of blocks of ``block`` positions the query in block i of head h sees block j where i - j < ``local`` or
    (j + h step) is a multiple of ``stride``, with step = max(1, stride // heads)."""
    own = {"heads": whole("heads", heads, 1), "local": whole("local", local), "stride": whole("stride", stride, 1)}
    size = _block("block", block)
    return CAUSAL & AttnMask("blocks", operands={"blockq": size, "blockk": size, "blocks": _Strided(**own, block=size)})


@dataclass(frozen=True)
class _Strided:
    """The blocks that S2-Attention's heads see, of any lengths."""

    heads: int
    local: int
    stride: int
    block: int

    @lru_cache(maxsize=64)  # noqa: B019 - of few masks, which are small
    def layout(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """The same, made once for lengths."""
        return self.made(q_len, kv_len, device)

    def made(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """bool [heads, q_len and kv_len in blocks]."""
        import torch

        rows, columns = (-(-n // self.block) for n in (q_len, kv_len))
        i, j = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
        shift = torch.arange(self.heads, device=device)[:, None, None] * max(1, self.stride // self.heads)
        return (j <= i) & ((i - j < self.local) | ((j + shift) % self.stride == 0))


def of_tensor(attn_mask: Tensor) -> AttnMask:
    """What torch's attn_mask says: of bools which pairs are seen, of floats what is added to scores."""
    if str(attn_mask.dtype) == "torch.bool":
        return dense(attn_mask)
    return AttnMask(score="bias", operands={"bias": attn_mask})


def told_by(problem: Problem, beside: AttnMask) -> AttnMask:
    """Of a problem's masks, and of its scores where there are none beside, those that its own numbers tell everything of."""
    numbers = problem.numbers

    def told(one: Any) -> bool:
        return not one.arrays

    words = [w for w in problem.mask.split("+") if w not in beside.mask.split("+") and told(parts.of_one_file(w))]
    mask = "+".join(words) or parts.NONE
    score = problem.score if beside.score == scores.NONE and told(scores.get(problem.score)) else scores.NONE
    names = (*parts.get(mask).integers, *scores.get(score).reals)
    return AttnMask(mask, score, {name: numbers[name] for name in names})


NONE, CAUSAL = AttnMask(), AttnMask("causal")
