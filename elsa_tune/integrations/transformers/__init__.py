"""transformers: ``attn_implementation="elsa"``, which is told what a mask means and not only what it holds."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from elsa_tune.integrations.transformers.calls import attend as attend
from elsa_tune.integrations.transformers.masks import Mask as Mask
from elsa_tune.integrations.transformers.masks import mask as mask
from elsa_tune.integrations.transformers.offloaded import OffloadedCache as OffloadedCache

NAME = "elsa"


def register() -> None:
    """Let every model of this process be loaded, or set, with ``attn_implementation="elsa"``. Nothing else changes, and doing it again
    changes nothing."""
    attentions: Any = AttentionInterface  # whose methods have no types
    of_masks: Any = AttentionMaskInterface
    attentions.register(NAME, attend)
    of_masks.register(NAME, mask)
