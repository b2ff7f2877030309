"""IEEE half precision."""

from elsa_tune.parts.element._base import Element

ELEMENT = Element("fp16", 2, "float16", ("fp16", "approx"))
