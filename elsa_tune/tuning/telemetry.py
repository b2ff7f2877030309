"""What a GPU says of itself while it works: clocks, power, temperature, and its reasons to slow down."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial, reduce
from operator import or_
from typing import Any

from elsa_tune.device import Device

READ_EVERY, ASK_EVERY = 0.05, 2.0
"""Seconds between readings of a library, and of a program that is started for each."""

_QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
_REASONS = "clocks_event_reasons.active", "clocks_throttle_reasons.active"  # since driver 535, and before
_FACTS = ("sm_mhz", "memory_mhz", "watts", "celsius", "throttled")
SUMMARY = (*_FACTS, "sm_mhz_low")
Reading = dict[str, float]


class Gauge:
    """Reads a GPU's clocks, power, temperature and reasons to slow down while it works; silent for other devices, and where
    neither NVIDIA's library nor its program answers."""

    def __init__(self, device: Device) -> None:
        self._readings: list[Reading] = []
        self._read, self._pause = _instrument(device) if device.is_gpu else (None, 0.0)
        self._next = 0.0

    def read(self) -> None:
        """Take a reading, if the last one was not just now."""
        if self._read is not None and time.monotonic() >= self._next:
            if found := self._read():
                self._readings.append(found)
            self._next = time.monotonic() + self._pause

    def summary(self) -> Reading:
        """Clocks in MHz, the median and (``_low``) the least; the most watts and degrees Celsius; the bits of every reason
        to slow down (NVML's nvmlClocksEventReason); empty where nothing was read."""

        def of(name: str) -> list[float]:
            return [reading[name] for reading in self._readings if name in reading]

        found = {name: statistics.median(of(name)) for name in ("sm_mhz", "memory_mhz") if of(name)}
        found |= {"sm_mhz_low": min(of("sm_mhz"))} if of("sm_mhz") else {}
        found |= {name: round(max(of(name)), 1) for name in ("watts", "celsius") if of(name)}
        if reasons := of("throttled"):
            found["throttled"] = float(reduce(or_, map(int, reasons)))
        return found


def _instrument(device: Device) -> tuple[Callable[[], Reading] | None, float]:
    """What reads the GPU, and how long to wait between readings."""
    try:
        import torch

        uuid = str(torch.cuda.get_device_properties(device.index).uuid)
    except Exception:  # no GPU, or a torch that does not tell
        return None, 0.0
    with suppress(Exception):
        return _nvml(uuid), READ_EVERY
    program = shutil.which("nvidia-smi")
    return (partial(_ask, program, uuid), ASK_EVERY) if program else (None, 0.0)


def _nvml(uuid: str) -> Callable[[], Reading]:
    """Reads through NVIDIA's library; each fact that it does not tell is left out. Raises whatever keeps it from being read."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:  # a virtual machine may number its GPU otherwise
        if pynvml.nvmlDeviceGetCount() != 1:
            raise
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    old: Any = getattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None)  # the name before NVML 12.2
    reasons: Any = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", old)
    facts: dict[str, Callable[[], float]] = {
        "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "throttled": lambda: reasons(handle),
    }

    def read() -> Reading:
        found = Reading()
        for name, fact in facts.items():
            with suppress(Exception):  # telemetry: without it a measurement is still a measurement
                found[name] = float(fact())
        return found

    return read


def _ask(program: str, uuid: str) -> Reading:
    """Reads through NVIDIA's program."""
    found = Reading()
    with suppress(OSError, subprocess.SubprocessError):
        answers = ""
        for reasons in _REASONS:
            command = [program, f"--query-gpu={_QUERY},{reasons}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
            answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
            answers = answer.stdout
            if answer.returncode == 0:
                break
        for name, text in zip(_FACTS, answers.strip().split(","), strict=False):
            with suppress(ValueError):  # "[N/A]"
                found[name] = float(int(text, 16)) if "x" in text else float(text)
    return found
