"""Modules for new models: attention with its projections."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, Module

from elsa_tune.dispatch.attention import attention
from elsa_tune.errors import WrongArguments, shown
from elsa_tune.masks import AttnMask


class Attention(Module):
    """Multi-head attention by elsa_tune.attention: ``query``, ``key`` and ``value`` project embed_dim to heads of ``head_dim``
    (embed_dim / num_heads), ``out`` projects back. ``kv_heads`` (num_heads) heads of key and value are shared by equally many of the query;
    ``dropout`` is of weights, in training. Weights begin Xavier-uniform, biases 0. Raises WrongArguments.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, kv_heads: int | None = None, head_dim: int | None = None, bias: bool = True,
        dropout: float = 0.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        for name, one in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kv_heads", kv_heads)):
            if type(one) is not int or one < 1:
                raise WrongArguments(f"{name} is {shown(one)}; it must be a whole number, 1 or more")
        if num_heads % kv_heads:
            raise WrongArguments(f"num_heads is {num_heads}, kv_heads {kv_heads}; kv_heads must divide it")
        if head_dim is None and embed_dim % num_heads:
            raise WrongArguments(
                f"embed_dim is {embed_dim}, num_heads {num_heads}; give a head_dim, or one that it divides"
            )
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if type(head_dim) is not int or head_dim < 1:
            raise WrongArguments(f"head_dim is {shown(head_dim)}; it must be a whole number, 1 or more")
        self.head_dim, self.dropout, self.shared = head_dim, dropout, kv_heads != num_heads
        self.query = Linear(embed_dim, num_heads * head_dim, bias, device, dtype)
        self.key = Linear(embed_dim, kv_heads * head_dim, bias, device, dtype)
        self.value = Linear(embed_dim, kv_heads * head_dim, bias, device, dtype)
        self.out = Linear(num_heads * head_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights and biases."""
        for projection in (self.query, self.key, self.value, self.out):
            torch.nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                torch.nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, attn_mask: Tensor | AttnMask | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """[batch, q_len, embed_dim] of query [batch, q_len, embed_dim], and of key (query) and value (key) [batch, kv_len, embed_dim]. Masks as
        elsa_tune.attention takes them: of bools, True is seen, unlike torch.nn.MultiheadAttention's."""
        key = query if key is None else key
        value = key if value is None else value
        heads = [
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for projection, x in ((self.query, query), (self.key, key), (self.value, value))
        ]
        dropout = self.dropout if self.training else 0.0
        made = attention(heads[0], heads[1], heads[2], attn_mask, dropout, is_causal, enable_gqa=self.shared)
        return self.out(made.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]
