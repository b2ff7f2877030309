"""Exact attention kernels: generated, tuned, remembered and dispatched.

Importing this package does nothing else: every name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_tune import masks as masks
    from elsa_tune import nn as nn
    from elsa_tune import scores as scores
    from elsa_tune.device import Device as Device
    from elsa_tune.dispatch.attention import attention as attention
    from elsa_tune.dispatch.exactness import accuracy as accuracy
    from elsa_tune.dispatch.ledger import served as served
    from elsa_tune.dispatch.load import load as load
    from elsa_tune.dispatch.states import attention_with_lse as attention_with_lse
    from elsa_tune.dispatch.states import merge as merge
    from elsa_tune.dispatch.varlen import attention_varlen as attention_varlen
    from elsa_tune.integrations.override import disable as disable
    from elsa_tune.integrations.override import enable as enable
    from elsa_tune.integrations.scope import sdpa as sdpa
    from elsa_tune.problem import Problem as Problem
    from elsa_tune.tuning.tune import tune as tune
    from elsa_tune.variant import Variant as Variant

__version__ = "0.1.0"

_HOME = {
    "Problem": "problem",
    "disable": "integrations.override",
    "enable": "integrations.override",
    "sdpa": "integrations.scope",
    "served": "dispatch.ledger",
    "Device": "device",
    "Variant": "variant",
    "accuracy": "dispatch.exactness",
    "attention": "dispatch.attention",
    "attention_varlen": "dispatch.varlen",
    "attention_with_lse": "dispatch.states",
    "load": "dispatch.load",
    "merge": "dispatch.states",
    "tune": "tuning.tune",
}
_MODULES = "masks", "nn", "scores"
__all__ = [
    "Device", "Problem", "Variant", "__version__",
    "accuracy", "attention", "attention_varlen", "attention_with_lse", "disable", "enable", "load", "masks", "merge", "nn", "scores", "sdpa",
    "served", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"elsa_tune.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'elsa_tune' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"elsa_tune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
