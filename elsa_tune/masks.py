"""Masks, as a program writes them: what ``attn_mask`` may be beside a tensor.

``&`` intersects masks and combines them with scores (elsa_tune.scores): ``masks.causal() & masks.window(1023) & scores.softcap(50.0)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.parts import mask as parts
from elsa_tune.parts import score as scores
from elsa_tune.parts.operand import Array, Operands
from elsa_tune.problem import LARGEST, Problem, declared

if TYPE_CHECKING:
    from torch import Tensor


class AttnMask:
    """Which keys a query sees, and what is done to their scores: masks that intersect, and scores in the order they are done.

    ``mask`` and ``score`` are spelled as in a problem (``causal+window``, ``softcap+bias``), ``operands`` are what they take, by name.
    """

    __slots__ = ("mask", "numbers", "operands", "score")

    def __init__(
        self, mask: str = parts.NONE, score: str = scores.NONE, operands: Mapping[str, Any] | None = None
    ) -> None:
        self.mask, self.score, self.operands = mask, score, dict(operands or {})
        arrays = (*parts.get(mask).arrays, *scores.get(score).arrays)
        for array in arrays:
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
            for one in declared(self.mask, self.score, "float64" if str(query.dtype) == "torch.float64" else "float32")
        )

    def _converted(self, array: Array, query: Tensor, key: Tensor) -> Tensor:
        import torch

        value: Tensor = self.operands[array.name]
        wanted: torch.dtype = getattr(torch, array.dtype)
        if array.is_float and value.dtype not in (torch.float32, query.dtype):
            raise WrongArguments(
                f"attn_mask has {array.name} of {value.dtype}; it must be torch.bool, torch.float32 or query's {query.dtype}"
            )
        if array in parts.get(self.mask).limits and value.is_cpu and value.numel():
            low, high = (int(x) for x in value.aminmax())
            if low < 0 or high > key.shape[2]:
                raise WrongArguments(
                    f"{array.name} reach from {low} to {high}; they must lie within 0 and kv_len {key.shape[2]}"
                )
        return value if value.dtype == wanted else value.to(wanted)

    def dense(self, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
        """bool, broadcastable to [batch, heads, q_len, kv_len]: whether a pair is seen. Raises WrongArguments where scores are more
        than hidden keys."""
        if self.score != scores.NONE:
            raise WrongArguments(f"attn_mask does {self.score} to scores, which no dense mask says; take masks alone")
        import torch

        from elsa_tune.generate.posed import Posed

        problem = Problem(head_dim=1, batch=batch, heads=heads, q_len=q_len, kv_len=kv_len)
        device = next((x.device for x in self.operands.values() if isinstance(x, torch.Tensor)), torch.device("cpu"))
        return Posed(self.of(problem), self.operands, device).dense()

    def __str__(self) -> str:
        """As a problem spells it: ``causal+window@left1023.right0``."""
        names = [name for name, x in self.operands.items() if isinstance(x, int | float)]
        family = ".".join(one for one in (self.mask, self.score) if one != parts.NONE) or parts.NONE
        own = ".".join(f"{name}{repr(self.operands[name]).removesuffix('.0')}" for name in names)
        return f"{family}@{own}" if own else family

    def __repr__(self) -> str:
        return f"AttnMask({self})"


def _aligned(array: Array, given: Any) -> Tensor:
    """A tensor of as many dimensions as the array has axes; what comes before those given is shared."""
    import torch

    try:
        value = given if isinstance(given, torch.Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WrongArguments(
            f"{array.name} is {shown(given)}; it must be a tensor, or numbers that make one"
        ) from error
    if value.dim() > len(array.axes):
        raise WrongArguments(f"{array.name} {tuple(value.shape)} has more dimensions than [{', '.join(array.axes)}]")
    if (
        value.is_complex()
        or array.is_float is not value.is_floating_point()
        or (array.dtype == "bool") is not (value.dtype == torch.bool)
    ):
        wanted = "torch.bool" if array.dtype == "bool" else "of floats" if array.is_float else "of whole numbers"
        raise WrongArguments(f"{array.name} is {value.dtype}; it must be {wanted}")
    if not array.is_float and array.dtype != "bool":
        value = value.to(getattr(torch, array.dtype))
    return value[(None,) * (len(array.axes) - value.dim())] if value.dim() < len(array.axes) else value


def _whole(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value.__index__() <= LARGEST:
        raise WrongArguments(f"{name} is {shown(value)}; it must be a whole number from {least} to {LARGEST}")
    return int(value)


def none() -> AttnMask:
    """Every key."""
    return NONE


def causal(lower_right: bool = False) -> AttnMask:
    """Keys up to a query's own position, from the top left as torch's is_causal, or so that the last query sees the last key."""
    return AttnMask("causal_lower_right" if lower_right else "causal")


def window(left: int | None, right: int | None = 0, lower_right: bool = False) -> AttnMask:
    """``left`` keys before a query's own position and ``right`` after it; None: as many as there are. ``lower_right``: the last query's
    own position is the last key's."""
    last = "_lower_right" if lower_right else ""
    integers = {
        "left": LARGEST if left is None else _whole("left", left),
        "right": LARGEST if right is None else _whole("right", right),
    }
    return AttnMask(
        f"window{last}", operands={f"{name}{'late' if lower_right else ''}": n for name, n in integers.items()}
    )


def prefix(p: int) -> AttnMask:
    """Keys up to a query's own position, and the first ``p``."""
    return AttnMask("prefix", operands={"prefix": _whole("p", p)})


def lengths(kv_lengths: Tensor | Sequence[int], start: Tensor | Sequence[int] | None = None) -> AttnMask:
    """Key padding: of sequence b, keys from ``start[b]`` (0 where nothing is given) up to ``kv_lengths[b]``; whole numbers [batch]."""
    ends = AttnMask("lengths", operands={"lengths": kv_lengths})
    return ends if start is None else ends & AttnMask("starts", operands={"starts": start})


def ranges(first_key: Tensor | Sequence[int], end_key: Tensor | Sequence[int]) -> AttnMask:
    """Of position i, keys from ``first_key[i]`` on that lie before ``end_key[i]``; whole numbers [q_len] or [batch, q_len], which grow or
    stay: sequences that follow one another without padding (elsa_tune.attention_varlen makes them). Raises WrongArguments where they fall
    (on a CPU, where asking costs nothing)."""
    made = AttnMask("ranges", operands={"first_key": first_key, "end_key": end_key})
    for name, x in made.operands.items():
        if x.is_cpu and bool((x.diff() < 0).any()):
            raise WrongArguments(
                f"{name} falls; a position sees keys that begin and end no earlier than those of the one before"
            )
    return made


def dense(seen: Tensor) -> AttnMask:
    """Pairs of which a bool tensor, broadcastable to [batch, heads, q_len, kv_len], is true."""
    return AttnMask("dense", operands={"dense": seen})


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
