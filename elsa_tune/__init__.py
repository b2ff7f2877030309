"""Exact attention kernels for PyTorch: generated, tuned, remembered and dispatched.

    >>> import elsa_tune
    >>> out = elsa_tune.attention(query, key, value, is_causal=True)   # torch's scaled_dot_product_attention, same arguments
    >>> masks, scores = elsa_tune.masks, elsa_tune.scores
    >>> out = elsa_tune.attention(query, key, value, masks.causal() & masks.window(1023) & scores.softcap(50.0))

Calls
    attention           by the fastest measured kernel that is proven here; torch's own where that is faster or no kernel may serve
    attention_varlen    the same for sequences of unequal lengths, without padding
    attention_with_lse  output and log-sum-exp, which merge() combines over disjoint sets of keys: ring attention, prefix caches
    accuracy            with accuracy(1.0): only kernels serve whose measured error is at most torch's
    masks, scores       what attn_mask may be beside a tensor; & composes them
    nn.Attention        a module for new models

Programs that are not changed
    enable, disable     torch's own operator is answered by kernels of ours; ELSA_TUNE=1 does it for a process
    sdpa                with sdpa(): the same in a scope, for what the operator never sees
    served              who answered this process's calls, and how long that took

Tuning and kernels
    tune                finds the fastest kernels of problems, as the command elsa-tune does
    load                the kernel that serves a problem, as an object to call and to ask
    Problem, Device, Variant    what is computed, where, and how: Problem.parse("fp32.d64.causal@b1.h8.q4096.k4096")

Every error is an elsa_tune.errors.ElsaTuneError whose message ends with what to do. Importing this package does nothing else: every
name is loaded when it is first used. `elsa-tune --help` describes the command, `elsa-tune doctor` this machine.
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


if not TYPE_CHECKING:  # whom a name that is not there is a mistake

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
