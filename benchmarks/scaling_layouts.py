"""How many engines share the devices of a machine, and how many devices an engine has."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, order=True)
class Layout:
    """Engines with the whole model, and ranks that share the model of each; written ``4x2``."""

    num_replicas: int
    num_ranks: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its written form.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"a layout is written as 4x2, 4 engines of 2 ranks each; got {text!r}")
        return cls(*map(int, found.groups()))

    @property
    def num_devices(self) -> int:
        return self.num_replicas * self.num_ranks

    def __str__(self) -> str:
        return f"{self.num_replicas}x{self.num_ranks}"


ONE = Layout(1, 1)
"""What all others are compared with."""


def default_layouts(num_devices: int, possible_ranks: Collection[int]) -> list[Layout]:
    """What fits: engines of one device, one engine of several, and all devices by engines of two.

    Args:
        num_devices: of the machine, at least 1.
        possible_ranks: among how many ranks the model can be divided.
    """
    powers = [2**n for n in range(num_devices.bit_length()) if 2**n <= num_devices]
    ranks = [n for n in powers if n in possible_ranks and 1 < n <= 4]
    layouts = [Layout(n, 1) for n in powers] + [Layout(1, n) for n in ranks]
    if 2 in ranks and powers[-1] >= 4:
        layouts.append(Layout(powers[-1] // 2, 2))
    return layouts


def in_turns(layouts: Sequence[Layout], num_devices: int) -> list[list[Layout]]:
    """Layouts that stand side by side, each measured while the others are idle.

    Starting engines is most of what a run takes, and engines that start at once take no longer than
    one. The largest layouts choose first, each takes the first turn with room (first-fit
    decreasing); the turn that has the smallest layout comes first.

    Args:
        layouts: none of them needs more than ``num_devices``.
    """
    turns: list[list[Layout]] = []
    for layout in sorted(set(layouts), key=lambda each: (-each.num_devices, each)):
        for turn in turns:
            if sum(each.num_devices for each in turn) + layout.num_devices <= num_devices:
                turn.append(layout)
                break
        else:
            turns.append([layout])
    return sorted((sorted(turn) for turn in turns), key=lambda turn: turn[0])
