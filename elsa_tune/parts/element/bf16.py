"""The upper half of a float: its exponent, and 8 bits of its significand.

On GPUs, and on CPUs with `packing`, which widens it to float32 as keys and values are copied.
"""

from elsa_tune.parts.element._base import Element, Precision

ELEMENT = Element(
    "bf16", 2, "bfloat16", (Precision("bf16", "of bfloat16; states and sums are float32", 2.0**-8, peak="bf16"),)
)
