"""What limits a GPU's kernels: registers and shared memory, by device."""

from __future__ import annotations

from elsa_tune.device import Device

MOST_REGISTERS = 255
"""Of a thread, on every GPU since Kepler."""

REGISTERS = 65536
"""Of a multiprocessor whose warps have 32 threads."""


def shared_bytes(device: Device) -> int:
    """Bytes of shared memory that a block may take on the device."""
    if device.kind != "cuda":
        return (64 if device.kind == "hip" else 32) << 10
    limits = {
        70: 96,
        72: 96,
        75: 64,
        80: 163,
        86: 99,
        87: 163,
        89: 99,
        90: 227,
        100: 227,
        103: 227,
        110: 227,
        120: 99,
        121: 99,
    }
    return limits.get(device.capability, 48 if device.capability < 70 else 99) << 10


def shared_bytes_together(device: Device) -> int:
    """Bytes of shared memory that blocks resident at the same time may take of a multiprocessor of the device."""
    if device.kind == "cuda" and device.capability < 70:
        return 96 << 10 if device.capability in (52, 61) else 64 << 10
    return shared_bytes(device)
