"""torch's own attention: the incumbent, raced like any candidate, and the last rung of dispatch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.device import Device
from elsa_tune.generate.backends import Built, Call, Kernel, Operands
from elsa_tune.generate.block_masks import block_mask
from elsa_tune.parts import mask as masks
from elsa_tune.parts.mask import NONE
from elsa_tune.problem import Problem
from elsa_tune.prove.reference import logsumexp
from elsa_tune.variant import Variant

if TYPE_CHECKING:
    from elsa_tune.generate.render import Source
    from elsa_tune.space import Law

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

SLOW_TO_START = ("flex",)
"""Compiled for every shape, for many seconds: raced where there is time."""


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


LAWS: tuple[Law, ...] = (kernel_is_here, class_is_kept, scores_fit_memory, fused_kernel_has_one_dim)
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


@lru_cache(maxsize=4)
def _attn_mask(mask: str, q_len: int, kv_len: int, operands: Operands, device: torch.device) -> Tensor:
    """What torch is given of a mask that is no flag: its own object where it takes one and means the same, or dense."""
    if masks.get(mask).torchs == "causal_lower_right" and q_len <= kv_len:
        own: Tensor = causal_lower_right(q_len, kv_len)
        return own
    posed = Problem(head_dim=1, mask=mask, q_len=q_len, kv_len=kv_len, integers=operands)
    return posed.dense().to(device)


@dataclass(frozen=True)
class SdpaKernel:
    """torch's function with one of its backends chosen; it always allocates its own output. A mask comes in torch's own form, or
    dense where it has none."""

    _backend: SDPBackend
    _mask: str

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor:
        if lse is not None:
            lse.copy_(logsumexp(query, key, self._mask, operands, scale))
        is_causal, attn_mask = masks.get(self._mask).torchs == "is_causal", None
        if self._mask != NONE and not is_causal:
            attn_mask = _attn_mask(self._mask, query.shape[2], key.shape[2], operands, query.device)
        grouped = query.shape[1] != key.shape[1]
        if grouped and self._backend is SDPBackend.EFFICIENT_ATTENTION:  # it takes no groups: what users do by hand
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            grouped = False
        with sdpa_kernel(self._backend):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


class FlexKernel:
    """torch's FlexAttention, compiled for the problem."""

    def __init__(self, problem: Problem) -> None:
        self._mask, self._compiled = problem.mask, _compiled_flex(problem.reshaped(launch="eager"))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor:
        lengths, grouped = (query.shape[2], key.shape[2]), query.shape[1] != key.shape[1]
        mask = None if self._mask == NONE else block_mask(self._mask, *lengths, operands, query.device)
        options = {"block_mask": mask, "scale": scale, "enable_gqa": grouped}
        if lse is None:
            made: Tensor = self._compiled(query, key, value, **options)
            return made
        made, sums = self._compiled(query, key, value, **options, return_lse=True)
        lse.copy_(sums)
        return made

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


class AutogradKernel:
    """Gradients by autograd through one of torch's kernels; the graph of each set of inputs is made once."""

    def __init__(self, forward: Call) -> None:
        # what torch compiles may be differentiated only once otherwise; read both when it compiles and when it is called
        self._lasting = (
            partial(functorch.patch, donated_buffer=False) if isinstance(forward, FlexKernel) else nullcontext
        )
        self._forward, self._graphs = forward, dict[tuple[object, ...], tuple[Tensor, tuple[Tensor, ...]]]()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        grad: Tensor,
        scale: float | None = None,
        operands: Operands = (),
    ) -> tuple[Tensor, ...]:
        name = (query.data_ptr(), scale, operands)
        with self._lasting():
            if name not in self._graphs:
                q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
                self._graphs[name] = self._forward(q, k, v, scale, operands=operands), (q, k, v)
            made, leaves = self._graphs[name]
            return torch.autograd.grad(made, leaves, grad, retain_graph=True)


@lru_cache(maxsize=64)
def _compiled_flex(problem: Problem) -> Callable[..., Any]:
    """FlexAttention for torch.compile to compile in a code object of its own: one that was compiled for eight shapes is called
    eagerly from then on, and every problem is another shape."""
    from torch.nn.attention.flex_attention import flex_attention

    flex: Callable[..., Any] = flex_attention

    def attend(*tensors: Tensor, **options: Any) -> Any:
        return flex(*tensors, **options)

    alone = FunctionType(attend.__code__.replace(), attend.__globals__, closure=attend.__closure__)
    return torch.compile(alone, dynamic=False)


def load(built: Built, variant: Variant, problem: Problem) -> Any:
    """The chosen kernel, or the gradients through it."""
    name = str(variant.axes["kernel"])
    kernel: Kernel = FlexKernel(problem) if name == "flex" else SdpaKernel(BACKENDS[name], problem.mask)
    return kernel if problem.direction == "forward" else AutogradKernel(kernel)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """torch's version."""
    return {"torch": torch.__version__}
