"""IEEE single precision, which every language has."""

from elsa_tune.parts.element._base import UNIT, Element, Precision

ELEMENT = Element(
    "fp32",
    4,
    "float32",
    (
        Precision(
            "strict",
            "float32 multiply-adds; the built assembly is searched for matrix instructions, and one with any is refused",
            UNIT,
            ieee=True,
        ),
        Precision("fp32", "also three TF32 or six bfloat16 products for one", UNIT, peak="tf32", products=3),
        Precision("tf32", "also one TF32 or three bfloat16 products", 2.0**-11, rounds_operands=True, peak="tf32"),
    ),
)
