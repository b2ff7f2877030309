"""attention_varlen(): attention over sequences of unequal lengths that follow one another, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_tune.dispatch import attention as dispatch
from elsa_tune.dispatch import meaning
from elsa_tune.dispatch.ragged import Ragged, checked
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.tensors import check_tensors
from elsa_tune.masks import AttnMask


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    attn_mask: Tensor | AttnMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """attention() within each sequence of a ragged batch: [tokens, heads, value_dim], in the query's dtype.

    query [tokens, heads, head_dim], key [tokens_k, kv_heads, head_dim], value [tokens_k, kv_heads, value_dim] hold all sequences, one
    after the other; ``cu_q`` and ``cu_k``, int32 or int64 [sequences + 1], say where each starts, from 0, and where the last ends.
    ``attn_mask`` counts within each sequence: masks and scores of elsa_tune.masks and elsa_tune.scores (no dropout), torch's CausalBias, or a tensor
    broadcastable to [sequences, heads, longest query, longest key]. A query that sees no key is 0. Served by a tuned kernel for the
    whole batch where one is known, and where gradients are needed by one of either pass; else by attention() for each sequence. Raises
    WrongArguments for tensors and offsets that do not fit (of offsets on a GPU only where they are read, sequence by sequence).
    """
    check_tensors(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    if query.is_meta:
        return query.new_empty(*query.shape[:2], value.shape[2])
    offsets = (_offsets(name, cu, x) for name, cu, x in (("cu_q", cu_q, query), ("cu_k", cu_k, key)))
    batch = Ragged(query, key, value, *offsets)
    if len(batch.cu_q) != len(batch.cu_k):
        raise WrongArguments(f"cu_q has {len(cu_q) - 1} sequences, cu_k {len(cu_k) - 1}; both must be as many")
    wanted, learns = meaning.of_ragged(attn_mask), dispatch.is_differentiable
    return batch.attend(wanted, scale, enable_gqa, dispatch.served, learns, dispatch.attention)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
    if not query.device == key.device == value.device:
        raise WrongArguments(
            f"query is on {query.device}, key on {key.device}, value on {value.device}; all must be on one"
        )
    if not query.dim() == key.dim() == value.dim() == 3:
        raise WrongArguments(f"query, key, value {shapes} must have three dimensions, [tokens, heads, dim]")
    if key.shape[:2] != value.shape[:2] or query.shape[2] != key.shape[2]:
        raise WrongArguments(
            f"query, key, value {shapes} do not fit: key and value must have the same tokens and heads, query and key the same dim"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (not enable_gqa or not kv_heads or heads % kv_heads):
        raise WrongArguments(
            f"query has {heads} heads, key and value {kv_heads}; they must be as many, or with enable_gqa divide"
        )


def _offsets(name: str, cu: Tensor, x: Tensor) -> Tensor:
    if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or not len(cu):
        told = f"{cu.dtype} {list(cu.shape)}" if isinstance(cu, Tensor) else repr(cu)[:60]
        raise WrongArguments(f"{name} is {told}; it must be torch.int32 or torch.int64 [sequences + 1]")
    if cu.is_cpu:
        checked(name, cu.tolist(), len(x))
    return cu.to(x.device, torch.int64)
