"""IEEE half precision.

On GPUs, and on CPUs with `packing`, which widens it to float32 as keys and values are copied.
"""

from elsa_tune.parts.element._base import Element, Precision

ELEMENT = Element(
    "fp16",
    2,
    "float16",
    (
        Precision("fp16", "of float16; states and sums are float32", 2.0**-11, peak="fp16"),
        Precision(
            "approx",
            "by name only: also sums in halves, states are float32; logits err likewise",
            2.0**-10,
            rounds_sums=True,
        ),
    ),
)
