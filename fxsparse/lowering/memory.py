"""How much memory there is for copies of weights."""

from __future__ import annotations

import os

import torch


class Room:
    """The memory that one graph may take for copies of weights: half of what is left on a device."""

    def __init__(self) -> None:
        self._taken = 0

    def take(self, size: int, device: torch.device) -> bool:
        """Takes room for ``size`` bytes, if there is as much beside what was taken before."""
        fits = self._taken + size < available_memory(device) // 2
        self._taken += size if fits else 0
        return fits


def available_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device; a guess from free pages where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
