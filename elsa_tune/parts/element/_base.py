"""An element: its size, torch's name for it, and the classes of arithmetic that it may be computed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Element:
    """``bytes`` of one number, the name of its dtype in ``torch``, and the precision ``classes`` that its tensors have, the one it is
    named after among them. States are float32, whatever the element."""

    name: str
    bytes: int
    torch: str
    classes: tuple[str, ...]
