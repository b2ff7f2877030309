"""No mask: every position sees every key."""

from elsa_tune.parts.mask._base import Mask

MASK = Mask("none", "every key", picture="xxx xxx")
