"""OpenCL through pyopencl: compiling, and kernels on torch's CPU tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elsa_tune import device as devices
from elsa_tune.device import Device
from elsa_tune.errors import BadDevice, BuildFailed, CompilerMissing
from elsa_tune.generate.cuda.launch import C_TYPES, Launch, TorchMemory

OPTIONS = ["-cl-std=CL1.2"]


@cache
def _context(index: int) -> tuple[Any, Any]:
    """A context of the device and its queue."""
    import pyopencl

    device = [found for platform in pyopencl.get_platforms() for found in platform.get_devices()][index]
    context = pyopencl.Context([device])
    return context, pyopencl.CommandQueue(context)


@cache
def _programs(text: str, index: int) -> Any:
    """The compiled text; the OpenCL implementation keeps what it compiled on disk."""
    import pyopencl

    context, _ = _context(index)
    return pyopencl.Program(context, text).build(options=OPTIONS)


def _here(device: Device) -> Device:
    """The device as it is found now. Raises BadDevice."""
    for found in devices.opencl_devices():
        if found == device:
            return found
    raise BadDevice(f"device {device} is not on this machine; an OpenCL kernel is compiled where it runs")


def version(device: Device) -> str:
    """The implementation that compiles for the device."""
    return device.versions


def versions() -> dict[str, str]:
    """pyopencl's version, if there is a device."""
    try:
        import pyopencl

        return {"pyopencl": pyopencl.VERSION_TEXT} if devices.opencl_devices() else {}
    except ImportError:
        return {}


def compile_report(text: str, device: Device, what: str) -> dict[str, int]:
    """Compile, and say what the implementation tells of it. Raises BuildFailed, CompilerMissing, BadDevice."""
    try:
        import pyopencl
    except ImportError:
        raise CompilerMissing("pyopencl is not installed; pip install 'elsa-tune[opencl]'") from None
    here = _here(device)
    try:
        program = _programs(text, here.index)
    except pyopencl.Error as error:
        raise BuildFailed(f"{what}: OpenCL failed: {str(error).strip()[:600]}; see `elsa-tune doctor`") from error
    kernel, cl_device = pyopencl.Kernel(program, "attend"), _context(here.index)[0].devices[0]
    info = pyopencl.kernel_work_group_info
    return {"shared": int(kernel.get_work_group_info(info.LOCAL_MEM_SIZE, cl_device))}


class OpenClRuntime(TorchMemory):
    """A program on one OpenCL device, called with CPU tensors: in place where memory is shared, through copies elsewhere.

    A call returns when its output is written.
    """

    def counters(self, like: Tensor, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def __init__(self, text: str, device: Device) -> None:
        self._text, self._kernels = text, dict[str, Any]()
        self._index = _here(device).index
        self._context, self._queue = _context(self._index)
        self._in_place = bool(self._context.devices[0].host_unified_memory)

    def run(self, launches: list[Launch]) -> None:
        import pyopencl

        buffers: dict[tuple[int, int], tuple[Any, Any]] = {}  # of memory that begins there and is so long
        flags, mode = pyopencl.mem_flags, pyopencl.map_flags
        source = flags.USE_HOST_PTR if self._in_place else flags.COPY_HOST_PTR
        for launch in launches:
            if launch.name not in self._kernels:
                self._kernels[launch.name] = pyopencl.Kernel(_programs(self._text, self._index), launch.name)
            kernel = self._kernels[launch.name]
            for place, (kind, given) in enumerate(zip(launch.types, launch.arguments, strict=True)):
                if kind != "p":
                    kernel.set_arg(place, np.dtype(C_TYPES[kind]).type(given))
                elif given is None:
                    kernel.set_arg(place, None)
                else:
                    memory = _memory(given)
                    name = (given.data_ptr(), memory.nbytes)
                    if name not in buffers:
                        made = pyopencl.Buffer(self._context, flags.READ_WRITE | source, hostbuf=memory)
                        buffers[name] = (made, memory)
                    kernel.set_arg(place, buffers[name][0])
            pyopencl.enqueue_nd_range_kernel(self._queue, kernel, (launch.blocks * launch.threads,), (launch.threads,))
        written = {x.data_ptr() for launch in launches for x in _outputs(launch) if x is not None}
        for (start, _), (buffer, memory) in buffers.items():
            if start in written:
                if self._in_place:
                    mapped, _ = pyopencl.enqueue_map_buffer(
                        self._queue, buffer, mode.READ, 0, memory.shape, memory.dtype
                    )
                    mapped.base.release(self._queue)
                else:
                    pyopencl.enqueue_copy(self._queue, memory, buffer)
        self._queue.finish()


def _outputs(launch: Launch) -> tuple[Tensor | None, ...]:
    """What a kernel writes that somebody reads: output and log-sum-exp."""
    return launch.arguments[3:5] if launch.name == "attend" else launch.arguments[1:3]


def _memory(x: Tensor) -> Any:
    """The bytes from a tensor's first element to its last, where they lie."""
    extent = x.element_size() * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
    storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    start = x.storage_offset() * x.element_size()
    return storage[start : start + extent].numpy()
