"""torch's own scaled_dot_product_attention: the incumbent, raced like any candidate, and the last rung of dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def scores_fit_memory(kernel: str, problem: Problem, device: Device) -> str | None:
    scores = 4 * problem.batch * problem.heads * problem.q_len * problem.kv_len
    if kernel == "math" and device.memory and 3 * scores > device.memory // 4:
        return f"the math backend would hold {scores >> 20} MiB of scores, several times"
    return None


def fused_kernel_has_one_dim(kernel: str, problem: Problem) -> str | None:
    if kernel == "flash" and problem.head_dim != problem.value_dim:
        return f"torch's fused kernel needs value_dim {problem.value_dim} equal to head_dim {problem.head_dim}"
    return None


laws: tuple[Law, ...] = (scores_fit_memory, fused_kernel_has_one_dim)


def refusal(problem: Problem, device: Device) -> str | None:
    """torch serves every forward problem."""
    return None if problem.direction == "forward" else "timed with autograd, not as a kernel"


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
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, out: Tensor | None = None
    ) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel(self._backend):
            return scaled_dot_product_attention(
                query, key, value, is_causal=self._is_causal, scale=scale, enable_gqa=grouped
            )

    def bind(self, query_shape: Sequence[int], value_shape: Sequence[int]) -> Call:
        """Nothing can be computed beforehand."""
        return self


def load(built: Built, variant: Variant, problem: Problem) -> Kernel:
    """The chosen backend."""
    return SdpaKernel(BACKENDS[str(variant.axes["kernel"])], problem.mask == "causal")


def toolchain() -> dict[str, str]:
    """torch's version."""
    import torch

    return {"torch": torch.__version__}
