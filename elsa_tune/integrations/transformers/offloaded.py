"""Key caches that live elsewhere, in files or in a GPU's host's memory, and are attended there chunk by chunk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from elsa_tune import places
from elsa_tune.dispatch import passes
from elsa_tune.dispatch.states import attention_with_lse, merge
from elsa_tune.errors import NoRoom, WrongArguments
from elsa_tune.generate.tensors import lse_dtype, needs_grad
from elsa_tune.integrations.deferred import Deferred
from elsa_tune.masks import NONE, AttnMask, whole

_Layer: Any = CacheLayerMixin  # whose methods have no types

CHUNK = 4096
"""Tokens that are moved, and attended, together."""

TOGETHER = 8
"""States that are merged at once: of more parts no more outputs are in memory."""

FEW = 16
"""Queries of a sequence that go to keys on another device; for more the keys come."""


@dataclass
class States:
    """Key and value states [batch, kv_heads, tokens, dim] of the same tokens, in the model's memory or elsewhere."""

    key: Tensor
    value: Tensor
    is_elsewhere: bool = False

    def __len__(self) -> int:
        """Tokens."""
        return self.key.shape[2]

    @property
    def bytes(self) -> int:
        """Of both."""
        return sum(x.numel() * x.element_size() for x in (self.key, self.value))

    def each(self, change: Callable[[Tensor], Tensor]) -> States:
        """Both changed alike."""
        return States(change(self.key), change(self.value))


class OffloadedCache(Cache):
    """A cache whose keys and values are moved out of the model's memory, ``budget`` bytes of them excepted: of a model on a CPU to files in
    ``folder`` (by default in the user's cache folder) that nobody else sees and that go with the cache; of a model on a GPU to its host's
    memory.

    Chunks of ``chunk`` tokens are moved, the oldest of a layer first; those that are not full stay, whatever the budget. With
    ``attn_implementation="elsa"`` chunks are attended where they are, and their states are merged; others load all of them in every step.
    With the model's ``config``, layers of sliding windows keep what they see in memory. Raises WrongArguments, and NoRoom where a file
    cannot be written.
    """

    def __init__(
        self, budget: int, config: Any = None, *, chunk: int = CHUNK, folder: str | Path | None = None
    ) -> None:
        budget, chunk = whole("budget", budget), whole("chunk", chunk, 1)
        self._earlier: dict[int, dict[str, Any]] = {}
        store = _Store(budget, chunk, places.home() / "offloaded" if folder is None else Path(folder).expanduser())
        if config is None:
            super().__init__(layer_class_to_replicate=partial(OffloadedLayer, store))  # type: ignore[arg-type]
            return
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[OffloadedLayer(store) if type(one) is DynamicLayer else one for one in layers])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All key and value states of a layer, with these added. Where that raises, no layer holds anything of the step."""
        layers: list[Any] = self.layers
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        before = layer.get_seq_length() if layer is not None else 0
        if layer is not None and not isinstance(layer, OffloadedLayer):
            self._earlier[layer_idx] = dict(vars(layer))  # whose tensors are never written to
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            for number, one in enumerate(layers):
                if isinstance(one, OffloadedLayer):
                    one.crop(min(0, before - one.get_seq_length()))
                elif number in self._earlier and one.get_seq_length() > before:
                    vars(one).update(self._earlier[number])
            raise


@dataclass
class _Store:
    """Where full chunks go, and how many bytes of them are still in the model's memory."""

    budget: int
    chunk: int
    folder: Path
    held: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Store:
        memo[id(self)] = new = _Store(self.budget, self.chunk, self.folder)
        return new

    def put(self, states: States) -> States:
        """The same elsewhere."""
        if not states.key.is_cpu:
            pinned = states.each(lambda x: torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x))
            return States(pinned.key, pinned.value, True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix="elsa-tune-", dir=self.folder, delete=False) as file:
                path = f"/proc/self/fd/{file.fileno()}"
                nameless = os.path.exists(
                    path
                )  # on Linux, where a name is not needed, and nothing is left by whatever happens
                try:
                    if nameless:
                        os.unlink(file.name)
                    for x in (states.key, states.value):
                        file.write(x.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                    file.flush()
                    place = path if nameless else file.name
                    whole = torch.from_file(place, shared=False, size=states.bytes, dtype=torch.uint8)
                finally:
                    if not nameless:
                        with suppress(OSError):  # where what is mapped cannot be removed
                            os.unlink(file.name)
        except (OSError, RuntimeError) as error:  # torch's, where nothing more can be mapped
            raise NoRoom(
                f"{states.bytes} bytes of keys and values cannot be kept in {self.folder}: {error}; give OffloadedCache another folder,"
                " or a larger budget"
            ) from error
        split = states.key.numel() * states.key.element_size()
        parts = zip((states.key, states.value), (whole[:split], whole[split:]), strict=True)
        key, value = (bytes_.view(x.dtype).view(x.shape) for x, bytes_ in parts)
        return States(key, value, True)


class OffloadedLayer(_Layer):  # type: ignore[misc]
    """One layer of an OffloadedCache: full chunks, and behind them one that is filled token by token."""

    is_sliding = False
    is_croppable = True

    def __init__(self, store: _Store) -> None:
        self._store, self._full, self._filled = store, list[States](), 0
        self._last: States | None = None
        super().__init__()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the chunk that is filled first."""
        self.device, self.dtype = key_states.device, key_states.dtype
        self._last = self._empty(States(key_states, value_states))
        self.is_initialized = True

    def _empty(self, like: States) -> States:
        with torch.inference_mode(False):  # what is made inside may not be written to outside
            return like.each(lambda x: x.new_empty((*x.shape[:2], self._store.chunk, x.shape[3])))

    @property
    def keys(self) -> Tensor | None:
        """All key states, as update() gives them; None while there are none."""
        return self._side("key")

    @keys.setter
    def keys(self, none: None) -> None:
        """What the base class begins with."""

    @property
    def values(self) -> Tensor | None:
        """All value states."""
        return self._side("value")

    @values.setter
    def values(self, none: None) -> None:
        """What the base class begins with."""

    def _side(self, side: str) -> Tensor | None:
        parts = self._now
        found: Tensor | None = getattr(parts[0], side) if parts else None
        return Parted.of(parts, side) if len(parts) > 1 else found

    @property
    def _now(self) -> list[States]:
        """All tokens, in chunks."""
        rest = [self._last.each(lambda x: x[:, :, : self._filled])] if self._last is not None and self._filled else []
        return [*self._full, *rest]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All key states and all value states, [batch, kv_heads, tokens, dim]: tensors that load what is elsewhere when they are looked at.
        Raises WrongArguments for states of another batch, and for those that need gradients, which nobody keeps."""
        if torch.is_grad_enabled() and needs_grad(key_states, value_states):
            raise WrongArguments(
                "key_states or value_states need gradients, which an OffloadedCache does not keep; call under torch.no_grad(), or take a"
                " DynamicCache"
            )
        new = States(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._last is not None
        for name, there, given in (("key", self._last.key, key_states), ("value", self._last.value, value_states)):
            if (there.shape[:2], there.shape[3]) != (given.shape[:2], given.shape[3]):
                raise WrongArguments(
                    f"{name}_states are {list(given.shape)}; the cache holds [{there.shape[0]}, {there.shape[1]}, tokens, {there.shape[3]}]"
                )
        before = [] if len(new) == 1 else self._now
        self._append(new)
        parts = self._now if len(new) == 1 else [*before, new]
        if len(parts) == 1:
            return parts[0].key, parts[0].value
        return Parted.of(parts, "key"), Parted.of(parts, "value")

    def _append(self, new: States) -> None:
        assert self._last is not None
        done = 0
        while done < len(new):
            count = min(len(new) - done, self._store.chunk - self._filled)
            for there, given in ((self._last.key, new.key), (self._last.value, new.value)):
                there[:, :, self._filled : self._filled + count] = given[:, :, done : done + count].detach()
            done, self._filled = done + count, self._filled + count
            if self._filled == self._store.chunk:
                self._full.append(self._last)
                self._store.held += self._last.bytes
                self._last, self._filled = self._empty(self._last), 0
                self._move_out()  # last, for it may raise

    def _move_out(self) -> None:
        """Move chunks elsewhere, the oldest first, until the others are within the budget."""
        for i, states in enumerate(self._full):
            if self._store.held <= self._store.budget:
                return
            if not states.is_elsewhere:
                self._full[i] = self._store.put(states)
                self._store.held -= states.bytes

    def _replace(self, parts: Sequence[States]) -> None:
        """Begin anew with these states."""
        self.reset()
        for part in parts:
            if not self.is_initialized:
                self.lazy_initialization(part.key.to(self.device), part.value.to(self.device))
            self._append(part)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The keys that so many queries will see, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens."""
        return sum(map(len, self._full)) + self._filled

    def get_max_length(self) -> int:
        """None: -1."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self._store.held -= sum(one.bytes for one in self._full if not one.is_elsewhere)
        self._full, self._last, self._filled, self.is_initialized = [], None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, whose number is given below zero. Raises WrongArguments."""
        if tokens_to_remove > 0:
            raise WrongArguments(f"tokens_to_remove is {tokens_to_remove}; give minus the number of tokens to remove")
        surplus = -tokens_to_remove
        if surplus >= self.get_seq_length():
            self.reset()
            return
        while surplus > self._filled:  # a full chunk is filled again
            surplus -= self._filled
            last = self._full.pop()
            self._store.held -= 0 if last.is_elsewhere else last.bytes
            self._last, self._filled = last.each(lambda x: x.to(self.device, copy=True)), len(last)
        self._filled -= surplus

    def _changed(self, change: Callable[[Tensor], Tensor]) -> None:
        self._replace([states.each(change) for states in self._now])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these sequences of the batch, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, which writes all chunks anew unless they are all, in order."""
        batch = len(self._last.key) if self._last is not None else 0
        if indices.dtype != torch.bool and indices.tolist() == list(range(batch)):
            return
        self._changed(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._changed(lambda x: x.repeat_interleave(repeats, 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedLayer:
        new = OffloadedLayer(deepcopy(self._store, memo))
        if self.is_initialized:
            new.device = self.device
            new._replace(self._now)
        return new


class Parted(Deferred):
    """The key or value states of all tokens, which lie in parts."""

    parts: list[States]

    @classmethod
    def of(cls, parts: list[States], side: str) -> Parted:
        """One ``side`` of the parts, ``key`` or ``value``."""
        each = [getattr(part, side) for part in parts]
        batch, kv_heads, _, dim = each[-1].shape

        def load() -> Tensor:
            return torch.cat([x.to(each[-1].device) for x in each], 2)

        shape = batch, kv_heads, sum(x.shape[2] for x in each), dim
        made: Parted = cls(load, shape, each[-1].dtype, each[-1].device)
        made.parts = parts
        return made


Asked = Callable[[int, int], tuple[int, int, AttnMask] | None]
"""Of the keys from one to before another: those among them that are seen, from and to before, and the mask for them; None where none are."""


def attend(query: Tensor, parts: Sequence[States], asked: Asked, s_aux: Tensor | None, scale: float | None) -> Tensor:
    """[batch, heads, q_len, value_dim]: each part is attended where it is, and what comes out merged; ``s_aux`` are sinks [heads]."""
    wide, first = lse_dtype(query), 0
    states: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        seen, end = asked(first, first + len(part)), first + len(part)
        if seen is not None:
            begin, stop, wanted = seen
            key, value = (x[:, :, begin - first : stop - first] for x in (part.key, part.value))
            output, lse = _state(query, key, value, wanted, scale)
            states.append((output.to(wide), lse))
            states = [merge(states)] if len(states) == TOGETHER else states
        first = end
    if s_aux is not None or not states:
        nothing = query.new_zeros(*query.shape[:3], parts[0].value.shape[3], dtype=wide)
        logits = query.new_full((query.shape[1],), float("-inf")) if s_aux is None else s_aux
        states.append((nothing, logits.to(wide)[None, :, None].expand(query.shape[:3])))
    return merge(states)[0].to(query.dtype)


def _state(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, on the query's device; the few queries of a step go to the keys, many wait for them."""
    grouped, here = query.shape[1] != key.shape[1], query.device
    if key.device != here and query.shape[2] > FEW:
        key, value = (x.to(here, non_blocking=True) for x in (key, value))
    query, wanted = query.to(key.device), wanted.with_tensors([x.to(key.device) for x in wanted.tensors])
    if torch.is_grad_enabled() and needs_grad(query, key, value, *wanted.tensors):
        found = attention_with_lse(query, key, value, False, scale, grouped, None if wanted is NONE else wanted)
    else:
        found = passes.forward(query, key, value, wanted, scale, grouped)
    return found[0].to(here), found[1].to(here)
