"""Starting kernels on GPUs: NVIDIA's driver through its own Python, AMD's through its library."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from elsa_tune.errors import CompilerMissing
from elsa_tune.generate.cuda import rocm as _rocm
from elsa_tune.generate.cuda.launch import Launch, TorchMemory, c_types, values
from elsa_tune.generate.gpu.counters import Counters


class GpuRuntime(TorchMemory):
    """A module of a GPU, launched on torch's current stream: nothing waits, and a graph can capture it."""

    def __init__(self, driver: Driver, code: bytes) -> None:
        self._driver, self._code, self._counters = driver, code, Counters()
        self._functions: dict[tuple[int, str], object] = {}  # a module belongs to one GPU's context

    def counters(self, like: Tensor, count: int) -> Tensor:
        with torch.cuda.device(like.device):
            stream, capture = torch.cuda.current_stream().cuda_stream, 0
            if torch.cuda.is_current_stream_capturing():
                self._driver.bind(torch.cuda.current_device())
                capture = self._driver.capture(stream)
            return self._counters.of(like.device, stream, capture, count)

    def run(self, launches: list[Launch]) -> None:
        with torch.cuda.device(launches[0].arguments[0].device):
            stream, ordinal = torch.cuda.current_stream().cuda_stream, torch.cuda.current_device()
            self._driver.bind(ordinal)
            for launch in launches:
                place = (ordinal, launch.name)
                if place not in self._functions:
                    self._functions[place] = self._driver.function(self._code, launch.name, launch.shared)
                self._driver.launch(self._functions[place], launch, stream)


class Driver(Protocol):
    """What loads machine code and starts it."""

    def bind(self, ordinal: int) -> None:
        """Let this thread, whose current device torch has made that one, speak to it."""

    def capture(self, stream: int) -> int:
        """The number of the capture that the stream is under."""
        ...

    def function(self, code: bytes, name: str, shared: int) -> object:
        """The kernel ``name`` of a module, allowed ``shared`` bytes of shared memory: a handle that only the driver reads."""
        ...

    def launch(self, function: object, launch: Launch, stream: int) -> None:
        """Start it."""


class CudaDriver:
    """NVIDIA's driver API through cuda-bindings; cuda-core cannot raise a kernel's limit of shared memory."""

    def __init__(self) -> None:
        from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue] - compiled, without stubs

        self._api: Any = driver

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        if answer[0] != self._api.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA error: {self._api.cuGetErrorString(answer[0])[1].decode()}")
        return answer[1] if len(answer) > 1 else None

    def bind(self, ordinal: int) -> None:
        """The current context, else the device's primary one: torch binds none where a thread is on the device already, as every
        new thread is on the first. Asked at every call, since others may change it: a quarter of a microsecond."""
        if int(self._checked(self._api.cuCtxGetCurrent())):
            return
        device = self._checked(self._api.cuDeviceGet(ordinal))
        self._checked(self._api.cuCtxSetCurrent(self._checked(self._api.cuDevicePrimaryCtxRetain(device))))

    def capture(self, stream: int) -> int:
        answer = self._api.cuStreamGetCaptureInfo(stream)
        self._checked(answer)
        return int(answer[2])

    def function(self, code: bytes, name: str, shared: int) -> object:
        module = self._checked(self._api.cuModuleLoadData(code))
        function = self._checked(self._api.cuModuleGetFunction(module, name.encode()))
        limit = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if shared > 48 << 10:
            self._checked(self._api.cuFuncSetAttribute(function, limit, shared))
        return function

    def launch(self, function: object, launch: Launch, stream: int) -> None:
        given = (values(launch), c_types(launch.types))
        self._checked(
            self._api.cuLaunchKernel(
                function, launch.blocks, 1, 1, launch.threads, 1, 1, launch.shared, stream, given, 0
            )
        )


class HipDriver:
    """AMD's driver API through the library that ROCm's torch has loaded."""

    def __init__(self) -> None:
        api = next(_rocm.libraries("amdhip64"), None)
        if api is None:
            raise CompilerMissing("libamdhip64.so was not found, so no HIP kernel can start; ROCm's torch brings it")
        self._api = api

    def _checked(self, name: str, *arguments: object) -> None:
        if failed := getattr(self._api, name)(*arguments):
            raise RuntimeError(f"HIP error: {name} answered {failed}")

    def bind(self, ordinal: int) -> None:
        """Nothing: HIP gives a thread the primary context of its device, the first unless it was told another, and torch tells."""

    def capture(self, stream: int) -> int:
        status, number = ctypes.c_int(), ctypes.c_ulonglong()
        self._checked("hipStreamGetCaptureInfo", ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number))
        return number.value

    def function(self, code: bytes, name: str, shared: int) -> object:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._checked("hipModuleLoadData", ctypes.byref(module), code)
        self._checked("hipModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, function: object, launch: Launch, stream: int) -> None:
        given = [kind(x) for kind, x in zip(c_types(launch.types), values(launch), strict=True)]
        pointers = (ctypes.c_void_p * len(given))(*(ctypes.addressof(x) for x in given))
        sizes = (ctypes.c_uint(n) for n in (launch.blocks, 1, 1, launch.threads, 1, 1, launch.shared))
        self._checked("hipModuleLaunchKernel", function, *sizes, ctypes.c_void_p(stream), pointers, None)
