"""What moving tensors between devices takes, inside of a machine and between machines.

Nothing here was measured by us: rates are of data sheets, times of a hop NCCL's own model of itself
(src/graph/tuning.cc, ring and simple protocol), and placements are torchrun's: neighbours in rank
are in one machine.
"""

from __future__ import annotations

import math

from editr2.check.devices import PEER_EFFICIENCY, Device

MACHINE = 8
"""Devices of a machine."""
BETWEEN = 50e9 * PEER_EFFICIENCY
"""Bytes a second of a device to other machines: a card of 400 Gb/s each (the data sheet of DGX
H100), of which as much is assumed to be reached as of NVLink."""
HOP_INSIDE, HOP_BETWEEN = 3.4e-6, 14e-6
"""Seconds of one step of a ring, over NVLink and over the network (NCCL's model)."""
HOP_HOST = 100e-6
"""Assumed seconds of one step between hosts (gloo, by which processes agree): half of the 0.2 ms
that two processes of one machine took here (docs/design.md)."""


def machines(count: int) -> int:
    return -(-count // MACHINE)


def gather_seconds(size: float, pieces: float, sharers: int, device: Device) -> float:
    """Until each of `sharers` devices has the `size` bytes of which each holds its part, in
    `pieces` gathers. A machine receives what it does not hold through all its cards at once, while
    its devices pass it on."""
    inside = size * (1 - 1 / sharers) / device.peers
    if (of := machines(sharers)) == 1:
        return inside
    between = size * (1 - 1 / of) / (MACHINE * BETWEEN)
    hops = of * HOP_BETWEEN + (sharers - of) * HOP_INSIDE
    return max(inside, between) + pieces * hops


def sum_seconds(size: float, processes: int, device: Device) -> float:
    """Until each device has the sum of `size` bytes of all: twice the way of a gather, and the
    steps of a tree between machines."""
    there_and_back = 2 * gather_seconds(size, 0, processes, device)
    return there_and_back + 2 * math.ceil(math.log2(machines(processes))) * HOP_BETWEEN


def agree_seconds(processes: int) -> float:
    """Until the hosts of `processes` have agreed on one number."""
    return 2 * math.ceil(math.log2(processes)) * HOP_HOST
