"""patch(model): attention modules of a timm model are answered by elsa_tune.attention."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, TypeVar

import torch
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor
from torch.nn.functional import linear, normalize

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.integrations.rebound import NAME, calls_torchs, rebound
from elsa_tune.integrations.scope import attend

_Model = TypeVar("_Model", bound=torch.nn.Module)
_PLAIN = "_elsa_tune_plain"
"""Of a served class: the one in whose place it stands."""


def patch(model: _Model) -> _Model:
    """The model itself, its attention answered by elsa_tune.attention: modules that call torch's scaled_dot_product_attention (ViT, DeiT, EVA,
    Swin and others of timm's; they take that path also where ``fused_attn`` is off), and the cosine attention of Swin v2.

    Nothing but these modules' class changes, to a subclass: parameters, buffers and hooks are the same, copies and pickles are patched too.
    Patching twice does nothing more. Raises WrongArguments for a model without such a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise WrongArguments(f"model is {shown(model)}; it must be a torch.nn.Module")
    found = {module: kind for module in model.modules() if (kind := _served(_plain(type(module))))}
    if not found:
        raise WrongArguments(
            f"model is {type(model).__name__}, in which no module's forward calls {NAME} and none is Swin v2's WindowAttention;"
            " with elsa_tune.sdpa() serves calls made elsewhere"
        )
    for module, kind in found.items():
        module.__class__ = kind
    return model


def unpatch(model: _Model) -> _Model:
    """The model itself, as it was before patch()."""
    for module in model.modules():
        module.__class__ = _plain(type(module))
    return model


def _plain(kind: type) -> type:
    plain: type = vars(kind).get(_PLAIN, kind)
    return plain


@cache
def _served(plain: type) -> type | None:
    """The class that stands in a class's place, or None where there is nothing to serve."""
    forward: Any = getattr(plain, "forward", None)
    if calls_torchs(forward):
        forward = rebound(forward, attend)
    elif forward is CosineAttention.forward:
        forward = _by_cosine
    else:
        return None

    def reduced(module: Any, protocol: Any) -> tuple[Any, ...]:
        """By which copies and pickles are made: no file holds the class."""
        reduce: Any = plain.__reduce_ex__
        return (_blank, (plain,), *reduce(module, 2)[2:])

    members = {
        "forward": forward, "fused_attn": property(lambda module: True, _keep_fused), "__reduce_ex__": reduced, "__doc__": plain.__doc__,
        "__module__": plain.__module__, "__qualname__": plain.__qualname__, _PLAIN: plain,
    }  # fmt: skip
    return type(plain.__name__, (plain,), members)


def _keep_fused(module: Any, value: bool) -> None:
    """What unpatch() gives back."""
    vars(module)["fused_attn"] = value


def _blank(plain: type) -> Any:
    kind: Any = _served(plain)
    return kind.__new__(kind)


def _by_cosine(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Swin v2's attention of windows x [windows batch, length, dim], mask [windows, length, length]: of unit queries and keys, times a
    number of each head, plus a bias of relative positions (Liu et al. 2022, equations 2 and 4)."""
    batch, length, dim = x.shape
    if self.q_bias is None:
        projected = self.qkv(x)
    else:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        projected = self.qkv(x) + bias if self.qkv_bias_separate else linear(x, self.qkv.weight, bias)
    query, key, value = projected.reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scale = torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
    table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
    added = table[self.relative_position_index.view(-1)].view(length, length, self.num_heads).permute(2, 0, 1)
    added = 16 * torch.sigmoid(added.contiguous())[None]
    if mask is not None:
        added = (added + mask[:, None]).expand(batch // mask.shape[0], *mask.shape[:1], -1, -1, -1).flatten(0, 1)
    dropout = self.attn_drop.p if self.training else 0.0
    made = attend(normalize(query, dim=-1) * scale, normalize(key, dim=-1), value, added, dropout, scale=1.0)
    projected = self.proj(made.transpose(1, 2).reshape(batch, length, dim))
    return self.proj_drop(projected)  # type: ignore[no-any-return]
