"""Counters of arriving blocks: zero whenever a kernel starts, because whoever arrives last sets them back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

MOST_GRAPHS = 256
"""Captures that are given counters to keep: nobody says when a graph ends."""


class Counters:
    """Those of one kernel, cleared when they are made and by no launch.

    Launches of one stream follow each other, so a stream has one set. A graph may run beside the stream it was captured on, so a
    capture has a set of its own, made before it began; without one, the graph clears counters itself, for each launch. An aborted
    kernel leaves no counters behind: its context is lost, and torch's memory with it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int | None, int, int], Tensor] = {}
        self._spare: dict[int | None, Tensor] = {}  # of a device: for the next capture
        self._outgrown: list[Tensor] = []  # launches under way may still count there
        self._graphs, self._lock = 0, Lock()

    def of(self, device: torch.device, stream: int, capture: int, count: int) -> Tensor:
        """At least ``count`` int32, for a launch on the device's current stream, with handle ``stream``, while the capture
        with that number is under way, or none (0)."""
        place = (device.index, stream, capture)
        found = self._made.get(place)
        if found is not None and len(found) >= count and (capture or device.index in self._spare):
            return found
        with self._lock:
            return self._of_capture(place, device, count) if capture else self._of_stream(place, device, count)

    def _of_stream(self, place: tuple[int | None, int, int], device: torch.device, count: int) -> Tensor:
        """The stream's, as many as needed, and as many to spare."""
        found = self._made.get(place)
        if found is None or len(found) < count:
            if found is not None:
                self._outgrown.append(found)
                count = max(count, 2 * len(found))
            found = self._made[place] = cleared(device, count)
        if device.index not in self._spare or len(self._spare[device.index]) < len(found):
            self._spare[device.index] = cleared(device, len(found))
        return found

    def _of_capture(self, place: tuple[int | None, int, int], device: torch.device, count: int) -> Tensor:
        """The spare ones, for a capture that has none yet; else a tensor that the graph clears."""
        found = self._spare.get(device.index)
        if place in self._made or found is None or len(found) < count or self._graphs == MOST_GRAPHS:
            return torch.zeros(count, dtype=torch.int32, device=device)
        self._graphs += 1
        self._made[place] = self._spare.pop(device.index)
        return found


def cleared(device: torch.device, count: int) -> Tensor:
    """Counters made on a thread and a stream of their own: in no graph's memory pool, even where the caller warms up for one, and
    clear for every stream without waiting for what others do."""

    def make() -> Tensor:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            made = torch.zeros(count, dtype=torch.int32, device=device)
        stream.synchronize()
        return made

    with ThreadPoolExecutor(1) as aside:
        return aside.submit(make).result()
