"""Counters of arriving blocks: zero whenever a kernel starts, because whoever arrives last sets them back."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

MOST_GRAPHS = 256
"""Captures that are given counters to keep: nobody says when a graph ends."""


class Counters:
    """Those of one kernel, cleared when they are made and by no launch.

    Launches of one stream follow each other, so a stream has one set. A graph may run beside the stream it was captured on, so a
    capture has a set of its own, made and cleared before it began and in no pool of the graph's; without one, it is cleared by the
    graph itself, at each launch. An aborted kernel leaves no counters behind: its context is lost, and torch's memory with it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int | None, int, int], Tensor] = {}
        self._spare: dict[int | None, Tensor] = {}  # of a device: for the next capture
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
        """The stream's, as many as needed, and a spare set: waited for, since a graph may be launched on any stream."""
        found = self._made.get(place)
        if found is None or len(found) < count:
            found = self._made[place] = torch.zeros(count, dtype=torch.int32, device=device)
        if device.index not in self._spare or len(self._spare[device.index]) < len(found):
            self._spare[device.index] = torch.zeros(len(found), dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()
        return found

    def _of_capture(self, place: tuple[int | None, int, int], device: torch.device, count: int) -> Tensor:
        found = self._spare.get(device.index)
        if place in self._made or found is None or len(found) < count or self._graphs == MOST_GRAPHS:
            return torch.zeros(count, dtype=torch.int32, device=device)
        self._graphs += 1
        self._made[place] = self._spare.pop(device.index)
        return found
