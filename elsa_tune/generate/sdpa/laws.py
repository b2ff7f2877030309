"""Which of torch's kernels can serve what, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elsa_tune.device import Device
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.bound import POSITION
from elsa_tune.problem import Problem

if TYPE_CHECKING:
    from elsa_tune.generate.backends import Law


def kernel_is_here(kernel: str, problem: Problem, device: Device) -> str | None:
    """A kernel that torch has not for the device, or not for the dtype there, would fail."""
    if not device.is_gpu:
        return None if kernel in ("flash", "math", "eager", "runs") else f"{kernel} is not raced on CPUs"
    if kernel == "cudnn" and device.kind == "hip":
        return "cuDNN runs on NVIDIA GPUs"
    element = elements.get(problem.dtype)
    if kernel in ("flash", "cudnn") and not element.narrow:
        return f"torch's {kernel} kernel takes float16 and bfloat16 on GPUs, not {element.torch}"
    if kernel in ("efficient", "flex") and element.unit < elements.UNIT:
        return f"torch's {kernel} kernel has sums of float32, not of {element.torch}"
    return None


def class_is_kept(kernel: str, problem: Problem, device: Device) -> str | None:
    """A strict problem is not answered by what may round float32 in a matrix unit."""
    if elements.precision(problem.precision).ieee and device.is_gpu and kernel not in ("math", "eager"):
        return f"torch's {kernel} kernel may use matrix units for float32"
    return None


def scores_fit_memory(kernel: str, problem: Problem, device: Device) -> str | None:
    """What writes the scores out holds them several times, and must leave most of the memory free."""
    size = 4 * problem.batch * problem.heads * problem.q_len * problem.kv_len
    if kernel in ("math", "eager") and device.memory and 3 * size > device.memory // 4:
        return f"{kernel} products would hold {size >> 20} MiB of scores, several times"
    return None


def scores_are_known(kernel: str, problem: Problem) -> str | None:
    """A score that is no mask is known to plain operations and FlexAttention alone, and plain operations race for nothing else."""
    if problem.score == scores.NONE or scores.get(problem.score).additive:
        return "torch's own kernels serve what has no score, or adds a mask" if kernel == "eager" else None
    if kernel == "flex" and (one := scores.get(problem.score).weighing):
        return f"FlexAttention changes scores alone, not the weights that {one.name} multiplies"
    return None if kernel in ("eager", "flex") else f"torch's {kernel} kernel knows no score, {problem.score} neither"


def fused_kernel_has_one_dim(kernel: str, problem: Problem) -> str | None:
    """torch's fused kernel takes heads and values of one dimension alone."""
    if kernel == "flash" and problem.head_dim != problem.value_dim:
        return f"torch's fused kernel needs value_dim {problem.value_dim} equal to head_dim {problem.head_dim}"
    return None


def rows_come_in_runs(kernel: str, problem: Problem) -> str | None:
    """A call for each run of rows that see the same keys is no answer where rows differ, or scores ask where they are."""
    mask = masks.get(problem.mask)
    alike = mask.by_position and POSITION not in mask.low.names | mask.high.names and not mask.tested
    if kernel != "runs" or (alike and problem.score == scores.NONE):
        return None
    return "no rows that follow one another see the same keys, with the same scores"


LAWS: tuple[Law, ...] = (
    kernel_is_here,
    scores_are_known,
    rows_come_in_runs,
    class_is_kept,
    scores_fit_memory,
    fused_kernel_has_one_dim,
)
