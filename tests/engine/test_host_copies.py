"""Memory that copies use again never changes what an earlier one brought."""

import numpy as np
import pytest
import torch

from focus_ray.engine.block_state import Message
from focus_ray.engine.host_copies import FEW, HostCopies


@pytest.mark.parametrize(
    "size", [pytest.param(2, id="few values"), pytest.param(FEW + 1, id="in memory of their own")]
)
def test_copies_bring_what_stood_there_when_they_were_started(device, size):
    copies = HostCopies(torch.device(device))
    values = torch.arange(size, device=device)
    early, late = copies.start(values), copies.start(values.add_(1))
    values.add_(1)
    first = copies.wait(early)
    third = copies.start(values)
    brought = [first, copies.wait(late), copies.wait(third)]
    last = copies.wait(copies.start(values.zero_()))
    expected = [[n + add for n in range(size)] for add in range(3)]
    assert [each.tolist() for each in brought] == expected
    assert last.tolist() == [0] * size


def test_messages_of_any_size_follow_each_other(device):
    message = Message(torch.device(device))
    for size in (3, 1, 40, 7, 200, 2):
        parts = np.arange(size, dtype=np.int32), np.full(size, size, np.int32)
        assert message.send(*parts).tolist() == [*range(size), *[size] * size]
