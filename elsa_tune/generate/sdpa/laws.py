"""Which of torch's kernels can serve what, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elsa_tune.device import Device
from elsa_tune.problem import Problem

if TYPE_CHECKING:
    from elsa_tune.generate.backends import Law


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
