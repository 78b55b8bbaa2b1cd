"""Bringing tensors to the host, and numbers to a device, without waiting for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class HostCopy:
    """A copy of many tensors to the host: started at once, read when it has arrived.

    One copy a device, in float64 (float32 on mps, which has no other). On CUDA it goes to pinned memory, behind what
    the current stream has yet to do, and nobody waits for it but ``read``. On the CPU it is there at once. On other
    accelerators starting it may wait for the device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Start it. What becomes of the tensors afterwards does not show in it."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
            by_device.setdefault(tensor.device, []).append(tensor.detach().reshape(-1).to(dtype))
        self._places = [(tensor.device, tensor.numel()) for tensor in tensors]
        self._events: list[torch.cuda.Event] = []
        self._hosts = {device: self._start(device, torch.cat(parts)) for device, parts in by_device.items()}

    def _start(self, device: torch.device, flat: Tensor) -> Tensor:
        if device.type != "cuda":
            return flat.cpu()
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self._events.append(event)
        return host

    @property
    def ready(self) -> bool:
        """Whether all of it has arrived; asking waits for nothing."""
        return all(event.query() for event in self._events)

    def read(self) -> list[list[float]]:
        """Each tensor as a flat list of floats, in order; waits for what has not arrived."""
        for event in self._events:
            event.synchronize()
        numbers = {device: iter(host.tolist()) for device, host in self._hosts.items()}
        return [[next(numbers[device]) for _ in range(count)] for device, count in self._places]


def to_host(tensors: Sequence[Tensor]) -> Iterator[list[float]]:
    """All tensors as lists of floats, in order, with one copy a device; waits for it."""
    return iter(HostCopy(tensors).read())


def moved_to(tensor: Tensor, where: Tensor | torch.device) -> Tensor:
    """A tensor on a device, or on that of another tensor and in its dtype.

    Nobody waits, but where it comes to the host: there it would be read before it has arrived.
    """
    device = where.device if isinstance(where, Tensor) else where
    return tensor.to(where, non_blocking=device.type != "cpu")


def is_on_host(tensor: Tensor) -> bool:
    """Whether reading it makes nobody wait."""
    return tensor.device.type == "cpu"
