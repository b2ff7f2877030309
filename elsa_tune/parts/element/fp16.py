"""IEEE half precision."""

from elsa_tune.parts.element._base import Element, Precision

ELEMENT = Element(
    "fp16", 2, "float16", (Precision("fp16", 2.0**-11, peak="fp16"), Precision("approx", 2.0**-10, rounds_sums=True))
)
