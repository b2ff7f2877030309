"""torch's own attention: the incumbent, raced like any candidate, and the last rung of dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.backends import Built, Call, Kernel
from elsa_tune.device import Device
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

if TYPE_CHECKING:
    from elsa_tune.render import Source
    from elsa_tune.space import Law

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def kernel_is_here(kernel: str, problem: Problem, device: Device) -> str | None:
    if not device.is_gpu:
        return None if kernel in ("flash", "math") else f"{kernel} is not raced on CPUs"
    if kernel == "cudnn" and device.kind == "hip":
        return "cuDNN runs on NVIDIA GPUs"
    if kernel in ("flash", "cudnn") and problem.dtype == "fp32":
        return f"torch's {kernel} kernel takes float16 and bfloat16 on GPUs, not float32"
    return None


def class_is_kept(kernel: str, problem: Problem, device: Device) -> str | None:
    if problem.precision == "strict" and device.is_gpu and kernel != "math":
        return f"torch's {kernel} kernel may use matrix units for float32"
    return None


def scores_fit_memory(kernel: str, problem: Problem, device: Device) -> str | None:
    scores = 4 * problem.batch * problem.heads * problem.q_len * problem.kv_len
    if kernel == "math" and device.memory and 3 * scores > device.memory // 4:
        return f"the math backend would hold {scores >> 20} MiB of scores, several times"
    return None


def fused_kernel_has_one_dim(kernel: str, problem: Problem) -> str | None:
    if kernel == "flash" and problem.head_dim != problem.value_dim:
        return f"torch's fused kernel needs value_dim {problem.value_dim} equal to head_dim {problem.head_dim}"
    return None


laws: tuple[Law, ...] = (kernel_is_here, class_is_kept, scores_fit_memory, fused_kernel_has_one_dim)
generated = False


def refusal(problem: Problem, device: Device) -> str | None:
    """torch serves every problem."""
    return None


def source(variant: Variant, problem: Problem) -> Source | None:
    """Nothing is rendered."""
    return None


def command(variant: Variant) -> list[str]:
    """Nothing is compiled."""
    return []


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """The variant itself."""
    return str(variant)


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """Nothing to build."""
    return Built(str(variant))


def find(digest: str) -> Built | None:
    """Always there."""
    return Built(digest)


class SdpaKernel:
    """torch's function with one of its backends chosen; it always allocates its own output."""

    def __init__(self, backend: SDPBackend, is_causal: bool) -> None:
        self._backend, self._is_causal = backend, is_causal

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        if lse is not None:
            lse.copy_(logsumexp(query, key, self._is_causal, scale))
        grouped = query.shape[1] != key.shape[1]
        if grouped and self._backend is SDPBackend.EFFICIENT_ATTENTION:  # it takes no groups: what users do by hand
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            grouped = False
        with sdpa_kernel(self._backend):
            return scaled_dot_product_attention(
                query, key, value, is_causal=self._is_causal, scale=scale, enable_gqa=grouped
            )

    def bind(self, query_shape: Sequence[int], value_shape: Sequence[int]) -> Call:
        """Nothing can be computed beforehand."""
        return self


class FlexKernel:
    """torch's FlexAttention, compiled."""

    def __init__(self, is_causal: bool) -> None:
        self._is_causal = is_causal

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        lengths, grouped = (query.shape[2], key.shape[2]), query.shape[1] != key.shape[1]
        mask = _causal_blocks(*lengths, query.device) if self._is_causal else None
        if lse is None:
            made: Tensor = _flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
            return made
        made, sums = _flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, return_lse=True)
        lse.copy_(sums)
        return made

    def bind(self, query_shape: Sequence[int], value_shape: Sequence[int]) -> Call:
        """Nothing can be computed beforehand."""
        return self


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal_blocks(q_len: int, kv_len: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, q_len, kv_len, device=str(device))


def logsumexp(query: Tensor, key: Tensor, is_causal: bool, scale: float | None, rows: int = 256) -> Tensor:
    """log of each row's sum of exponentials, [batch, heads, q_len], float32; scores of ``rows`` rows exist at a time."""
    batch, heads, q_len, head_dim = query.shape
    group, kv_len = heads // key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(wide).unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, 1, head_dim, kv_len]
    found = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    for first in range(0, q_len, rows):
        some = query[:, :, first : first + rows].to(wide) * (head_dim**-0.5 if scale is None else scale)
        scores = (some.view(batch, -1, group, some.shape[2], head_dim) @ keys).flatten(1, 2)
        if is_causal:
            position = torch.arange(first, first + some.shape[2], device=query.device)[:, None]
            hidden = torch.arange(kv_len, device=query.device)[None, :] > position
            scores = scores.masked_fill(hidden, float("-inf"))
        found[:, :, first : first + rows] = torch.logsumexp(scores, -1)
    return found


def load(built: Built, variant: Variant, problem: Problem) -> Kernel:
    """The chosen kernel."""
    kernel, is_causal = str(variant.axes["kernel"]), problem.mask == "causal"
    return FlexKernel(is_causal) if kernel == "flex" else SdpaKernel(BACKENDS[kernel], is_causal)


def toolchain() -> dict[str, str]:
    """torch's version."""
    return {"torch": torch.__version__}
