"""IEEE single precision."""

from elsa_tune.parts.element._base import UNIT, Element, Precision

ELEMENT = Element(
    "fp32",
    4,
    "float32",
    (
        Precision("strict", UNIT, ieee=True),
        Precision("fp32", UNIT, peak="tf32", products=3),
        Precision("tf32", 2.0**-11, rounds_operands=True, peak="tf32"),
    ),
)
