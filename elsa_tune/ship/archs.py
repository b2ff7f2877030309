"""Devices by name that need not be here: NVIDIA targets, AMD targets, CPU microarchitectures, OpenCL."""

from __future__ import annotations

import re

from elsa_tune.device import Device, cpu_target, detect
from elsa_tune.errors import BadDevice


def device(text: str) -> Device:
    """The device that ``text`` means: one that is here, a full spelling, ``sm_62``, ``gfx942``, a CPU microarchitecture as
    archspec names it (``cortex_a72``, ``aarch64``, ``zen4``), or ``opencl`` for any OpenCL device. Raises BadDevice."""
    if re.fullmatch(r"sm_\d{2,3}", text):
        return Device("cuda", "any", text, 1)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", text):
        return Device("hip", "any", text, 1)
    if text == "opencl":
        return Device("opencl", "any", "shuffle0", 1)
    if ":" in text:
        return Device.parse(text)
    if cpu_target(text):
        return Device("cpu", "any", text, 4)
    try:
        return detect(text)[0]
    except BadDevice:
        raise BadDevice(
            f"device {text!r} is not known; name a target such as sm_62, gfx942, cortex_a72 or opencl, or a full spelling"
        ) from None
