"""attention() as registered operators, elsa_tune::attention and its backward: what torch.compile, torch.export and AOTInductor record.

Who serves is decided when the operator is called, as in eager code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from elsa_tune.device import host_cpu
from elsa_tune.dispatch import derivatives, fallback, meaning, passes, serving
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.masks import CAUSAL, NONE, AttnMask, as_tensor, of_tensor
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem

_MASK = "Tensor? attn_mask, Tensor[]? arrays, SymInt[]? integers, float[]? reals, str spelled, float? scale, bool enable_gqa"
"""A mask: torch's tensor, or what AttnMask holds: ``spelled`` is its mask, its score and the names of its operands, in order."""

_Library: Any = torch.library.Library  # without types
_library = _Library("elsa_tune", "FRAGMENT")
_library.define(
    f"attention(Tensor query, Tensor key, Tensor value, {_MASK}, bool keeps) -> (Tensor output, Tensor logsumexp)"
)
_library.define(
    "attention_backward(Tensor? grad, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,"
    f" {_MASK}, bool[] asked) -> Tensor[]"
)
_DTYPES = frozenset(
    getattr(torch, one.torch) for one in map(elements.get, elements.names()) if hasattr(torch, one.torch)
)
_CAUSAL = "causal none"
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)  # no object of torch's that is a tensor in name, as CausalBias
_is_transformed = torch._C._are_functorch_transforms_active


def recorded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """attention() for a compiler to follow: the operator where it may answer, torch's function elsewhere."""
    if not may_answer(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    wanting = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *_tensors(attn_mask)))
    if wanting and not _learns(query, value, attn_mask, is_causal):
        return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return call(query, key, value, attn_mask, is_causal, scale, enable_gqa, wanting)[0]


def call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, keeps: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator's output, and its log-sum-exp where it is kept."""
    mask = attn_mask if isinstance(attn_mask, Tensor) else None
    place = query.device.type
    if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place) and query.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(place)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
        mask = mask.to(narrow) if mask is not None and mask.dtype.is_floating_point else mask
    arrays: list[Tensor] = []
    integers: list[Any] = []
    reals: list[float] = []
    spelled = _CAUSAL if is_causal else ""
    if isinstance(attn_mask, AttnMask):
        wanted = attn_mask & CAUSAL if is_causal else attn_mask
        spelled = " ".join([wanted.mask, wanted.score, *wanted.operands])
        for given in wanted.operands.values():
            if isinstance(given, float):
                reals.append(given)
            elif isinstance(given, int | torch.SymInt):
                integers.append(given)
            else:
                arrays.append(as_tensor(given, query, key))
    # an empty list is None: AOTInductor makes None of it, whatever the schema says
    found: tuple[Tensor, Tensor] = torch.ops.elsa_tune.attention(
        query, key, value, mask, arrays or None, integers or None, reals or None, spelled, scale, enable_gqa, keeps
    )
    return found


def _learns(query: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, is_causal: bool) -> bool:
    """Whether gradients are by a kernel from what the operator keeps: by operations they would cost more than torch's own. Masks of ours
    are the operator's whoever computes them, for no compiler follows what torch is given of them."""
    if isinstance(attn_mask, AttnMask):
        return True
    learning = isinstance(attn_mask, Tensor) and attn_mask.requires_grad
    if query.shape[3] == value.shape[3] and not learning:
        return True  # torch's fused kernel
    return _by_kernel(str(query.dtype), attn_mask is not None, is_causal)


def _by_kernel(dtype: str, is_biased: bool, is_causal: bool) -> bool:
    """Whether a kernel of ours won some problem of such gradients here before this is compiled, of whatever dimensions."""
    element = elements.of_dtype(getattr(torch, dtype.removeprefix("torch.")))
    if element is None:
        return False
    kind = Problem(
        dtype=element.name, head_dim=1, mask="causal" if is_causal else masks.NONE, score="bias" if is_biased else scores.NONE,
        direction="backward",
    )  # fmt: skip
    return serving.current().knows_akin(kind, host_cpu())


_by_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, which loads the compiler


def may_answer(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether these are [batch, heads, length, dim] of a kind that the operator is for, which knows no transform of torch.func."""
    given = (query, key, value)
    if dropout_p or not all(isinstance(x, Tensor) and not x.is_nested and x.dim() == 4 for x in given):
        return False
    if not query.dtype == key.dtype == value.dtype or query.dtype not in _DTYPES:
        return False
    if query.device != key.device or key.device != value.device or query.shape[3] != key.shape[3]:
        return False
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        return False
    if query.shape[1] != key.shape[1] and not (enable_gqa and query.shape[1] % key.shape[1] == 0):
        return False
    if not isinstance(attn_mask, AttnMask) and attn_mask is not None and (type(attn_mask) not in _PLAIN or is_causal):
        return False
    wanting = torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *_tensors(attn_mask)))
    on_its_side = query.is_cpu or not wanting  # torch's training on GPUs keeps what it needs itself
    return on_its_side and not _is_transformed()


def _tensors(attn_mask: Any) -> tuple[Tensor, ...]:
    """Those of a mask, in the order of its gradients."""
    if isinstance(attn_mask, AttnMask):
        return attn_mask.tensors
    return (attn_mask,) if isinstance(attn_mask, Tensor) else ()


def _wanted(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, arrays: Sequence[Tensor] | None, integers: Sequence[int] | None,
    reals: Sequence[float] | None, spelled: str, of_itself: bool = False,
) -> AttnMask:  # fmt: skip
    """The mask that was recorded, of torch's what it holds; ``of_itself``: whatever that is, for a gradient of its own. Raises WrongArguments."""
    if attn_mask is not None:
        attn_mask = attn_mask.detach()
        meant = None if of_itself else meaning.of(attn_mask, False, query, key)
        return of_tensor(attn_mask) if meant is None else meant
    if arrays:
        return _put_together(spelled, tuple(integers or ()), tuple(reals or ()), [x.detach() for x in arrays])
    return _without_tensors(spelled, tuple(integers or ()), tuple(reals or ()))


def _put_together(
    spelled: str, integers: tuple[int, ...], reals: tuple[float, ...], arrays: Sequence[Tensor]
) -> AttnMask:
    if not spelled:
        return NONE
    mask, score, *names = spelled.split(" ")
    whole, real, array = iter(integers), iter(reals), iter(arrays)
    kinds = dict.fromkeys(masks.get(mask).integers, whole) | dict.fromkeys(scores.get(score).reals, real)
    return AttnMask(mask, score, {name: next(kinds.get(name, array)) for name in names})


@lru_cache(maxsize=256)
def _without_tensors(spelled: str, integers: tuple[int, ...], reals: tuple[float, ...]) -> AttnMask:
    return _put_together(spelled, integers, reals, ())


def _new(query: Tensor, value: Tensor) -> Tensor:
    """An output [batch, heads, q_len, value_dim] whose heads lie side by side, as models join them afterwards."""
    batch, heads, q_len, _ = query.shape
    return query.new_empty((batch, q_len, heads, value.shape[3])).transpose(1, 2)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, arrays: Sequence[Tensor] | None,
    integers: Sequence[int] | None, reals: Sequence[float] | None, spelled: str, scale: float | None, enable_gqa: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """output [batch, heads, q_len, value_dim], and the log-sum-exp [batch, heads, q_len] where the backward pass needs it."""
    wanted = _wanted(query, key, attn_mask, arrays, integers, reals, spelled)
    output, lse = _new(query, value), query.new_empty(0, dtype=lse_dtype(query))
    made: Tensor | None
    if keeps:
        made, lse = passes.forward(query, key, value, wanted, scale, enable_gqa, output)
        lse = lse.contiguous()
    else:
        made = serving.by_kernel(query, key, value, wanted, scale, enable_gqa, output)
        if made is None:
            with serving.left_to_torch(query, key, value, wanted, enable_gqa):
                if attn_mask is None:
                    made = passes.attend(query, key, value, wanted, scale, enable_gqa)
                else:
                    made = fallback.attend(query, key, value, attn_mask, 0.0, False, scale, enable_gqa)
    return output if made is output else output.copy_(made), lse


def _backward(
    grad: Tensor | None, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    attn_mask: Tensor | None, arrays: Sequence[Tensor] | None, integers: Sequence[int] | None, reals: Sequence[float] | None,
    spelled: str, scale: float | None, enable_gqa: bool, asked: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients ``asked`` for, of query, key, value and the mask's tensors, laid out as these are; where no log-sum-exp was kept, as a
    program that was exported without gradients keeps none, the forward pass is done again."""
    given = (query, key, value, *_held(attn_mask, arrays))
    wanted = _wanted(query, key, attn_mask, arrays, integers, reals, spelled, any(asked[3:]))
    each = (*asked[:3], *(asked[3:] if any(asked[3:]) else [False] * len(wanted.tensors)))
    if not (output.numel() and key.shape[2]):
        return list(compress(_of_nothing(grad_lse, lse, wanted, given), asked))
    grad = torch.zeros_like(output) if grad is None else grad
    if lse.numel():
        found = passes.backward(grad, grad_lse, query, key, value, output, lse, wanted, scale, enable_gqa, each)
    else:
        found = passes.by_operations(grad, grad_lse, query, key, value, wanted, scale, each)
    return [
        torch.empty_like(x).copy_(g.reshape(x.shape))
        for x, g, one in zip(given, found, asked, strict=False) if one and g is not None
    ]  # fmt: skip


def _of_nothing(grad_lse: Tensor | None, lse: Tensor, wanted: AttnMask, given: Sequence[Tensor]) -> list[Tensor]:
    """Every gradient where there are no keys, or no queries: of terms beside keys alone, in the log-sum-exp."""
    terms = {term.name for term in scores.get(wanted.score).terms}
    of_terms = [name in terms and grad_lse is not None for name in ("", "", "", *derivatives.names(wanted))]
    return [
        (grad_lse * (x.view(-1, 1) - lse).exp()).sum((0, 2)).sum_to_size(x.shape).to(x.dtype)
        if one and grad_lse is not None else torch.zeros_like(x)
        for x, one in zip(given, of_terms, strict=True)
    ]  # fmt: skip


def _held(attn_mask: Tensor | None, arrays: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """A mask's tensors, in the order of its gradients."""
    return (arrays or ()) if attn_mask is None else (attn_mask,)


def _shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, _, value, *_, keeps = arguments
    return _new(query, value), query.new_empty(query.shape[:3] if keeps else 0, dtype=lse_dtype(query))


def _shapes_backward(grad: Tensor | None, grad_lse: Tensor | None, *arguments: Any) -> list[Tensor]:
    query, key, value, _, _, attn_mask, arrays, *_, asked = arguments
    return list(map(torch.empty_like, compress((query, key, value, *_held(attn_mask, arrays)), asked)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, arrays, *ctx.told, keeps = inputs
    ctx.has_arrays, ctx.none = arrays is not None, [_nothing(x) for x in inputs[3:]]
    ctx.set_materialize_grads(False)
    if not keeps:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, attn_mask, *(arrays or ()))


def _nothing(given: Any) -> Any:
    """What torch takes for no gradients of an argument: a list for a list of tensors, which an empty one always is."""
    of_tensors = isinstance(given, list | tuple) and all(isinstance(x, Tensor) for x in given)
    return [None] * len(given) if of_tensors else None


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, lse, attn_mask, *arrays = ctx.saved_tensors
    of_mask, of_arrays = ctx.needs_input_grad[3:5]
    asked = [*ctx.needs_input_grad[:3], *([of_mask] if attn_mask is not None else of_arrays if ctx.has_arrays else [])]
    none_is_given = grad is None and grad_lse is None
    made = iter(
        () if none_is_given else torch.ops.elsa_tune.attention_backward(
            grad, grad_lse, query, key, value, output, lse, attn_mask, arrays if ctx.has_arrays else None, *ctx.told, asked
        )
    )  # fmt: skip
    found = [None if none_is_given or not one else next(made) for one in asked]
    rest = list(ctx.none)
    if attn_mask is not None:
        rest[0] = found[3]
    elif ctx.has_arrays:
        rest[1] = found[3:]
    return (*found[:3], *rest)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "elsa_tune::attention has no second derivatives in compiled and exported code; elsa_tune.attention has them in eager code"
    )


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("elsa_tune::attention", _shapes, lib=_library)
torch.library.register_fake("elsa_tune::attention_backward", _shapes_backward, lib=_library)
torch.library.register_autograd("elsa_tune::attention_backward", _refuse, lib=_library)
torch.library.register_autograd("elsa_tune::attention", _differentiate, setup_context=_keep, lib=_library)
