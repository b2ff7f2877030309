"""IEEE double precision, on CPUs: states, sums and log-sum-exps are of it too, and so are the floats that scores take."""

from elsa_tune.parts.element._base import UNITS, Element, Precision

ELEMENT = Element(
    "fp64",
    8,
    "float64",
    (Precision("fp64", "float64 multiply-adds, against numbers with twice the digits", UNITS["float64"]),),
    state="float64",
)
