"""Copies of others' functions in which torch's scaled_dot_product_attention means another function."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "scaled_dot_product_attention"


class _Instead(ModuleType):
    """A module in which some names mean what is given here."""

    def __init__(self, module: ModuleType, **names: object) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def calls_torchs(function: object) -> bool:
    """Whether a function is written in Python and names torch's."""
    return isinstance(function, FunctionType) and NAME in function.__code__.co_names


def rebound(function: Callable[..., Any], attend: Callable[..., Tensor], **names: object) -> Callable[..., Any]:
    """A copy of a Python function in whose globals torch's function is ``attend``, by whichever module it is reached, and each of ``names``
    what is given. The other globals are those of now."""
    assert isinstance(function, FunctionType)
    of_functional = _Instead(functional, **{NAME: attend})
    of_nn = _Instead(torch.nn, functional=of_functional)
    instead = {
        id(getattr(functional, NAME)): attend,
        id(functional): of_functional,
        id(torch.nn): of_nn,
        id(torch): _Instead(torch, nn=of_nn),
    }
    own = {name: instead.get(id(x), x) for name, x in function.__globals__.items()} | names
    del own["__name__"]  # by which torch.compile would look the originals up
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    copy.__doc__, copy.__module__, copy.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    return copy
