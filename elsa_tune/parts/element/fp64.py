"""IEEE double precision: its states are of it too."""

from elsa_tune.parts.element._base import UNITS, Element, Precision

ELEMENT = Element("fp64", 8, "float64", (Precision("fp64", UNITS["float64"]),), state="float64")
