"""The upper half of a float: its exponent, and 8 bits of its significand."""

from elsa_tune.parts.element._base import Element, Precision

ELEMENT = Element("bf16", 2, "bfloat16", (Precision("bf16", 2.0**-8, peak="bf16"),))
