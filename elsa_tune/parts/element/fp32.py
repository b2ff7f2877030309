"""IEEE single precision."""

from elsa_tune.parts.element._base import Element

ELEMENT = Element("fp32", 4, "float32", ("strict", "fp32", "tf32"))
