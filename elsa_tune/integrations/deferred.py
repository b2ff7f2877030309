"""Tensors that are made when somebody looks: torch and every program see what they stand for, and who knows them asks for more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Deferred(Tensor):
    """A tensor of a shape, dtype and device whose contents ``make`` gives when an operation wants them: then it is that tensor."""

    _make: Callable[[], Tensor]
    _made: Tensor | None = None
    is_held = False
    """Whether somebody holds its memory, and may write to it."""

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device,
        strides: Sequence[int] | None = None,
    ) -> Any:  # fmt: skip
        """``make`` is called once, if at all, and gives a tensor of these ``strides``; contiguous, if none are given."""
        new: Any = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        new._make = make
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Any operation, upon what it stands for."""
        aliases = any(one.alias_info is not None for one in function._schema.arguments)

        def made(x: Deferred) -> Tensor:
            x.is_held |= aliases
            return x.made()

        args, kwargs = tree_map_only(Deferred, made, (args, kwargs or {}))
        return function(*args, **kwargs)

    def made(self) -> Tensor:
        """What it stands for."""
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
        return self._made

    def numpy(self, *, force: bool = False) -> Any:
        """What it stands for, as numpy has it."""
        return self.made().numpy(force=force)

    def tolist(self) -> Any:
        """What it stands for, as lists."""
        return self.made().tolist()

    def data_ptr(self) -> int:
        """Where what it stands for lies."""
        self.is_held = True
        return self.made().data_ptr()

    def share_memory_(self) -> Any:
        """What it stands for, in shared memory."""
        return self.made().share_memory_()  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.made().clone()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"
