from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aligndet.momentum import cosine_decay, decay_for, momentum_copy, update_momentum


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.query = nn.Parameter(torch.ones(2))


def test_the_copy_shares_the_trunk_and_nothing_else() -> None:
    online = Small()
    momentum = momentum_copy(online, online.trunk)
    assert momentum.trunk is online.trunk
    assert online.trunk.weight.requires_grad
    assert not any(p.requires_grad for p in momentum.head.parameters())
    assert momentum.head.weight.data_ptr() != online.head.weight.data_ptr()
    assert momentum.training


def test_update_equals_the_formula_parameter_by_parameter() -> None:
    online = Small()
    momentum = momentum_copy(online, online.trunk)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(torch.randn_like(p))
        online.get_buffer("norm.running_mean").add_(1.0)
    before = {name: p.clone() for name, p in momentum.named_parameters()}
    update_momentum(online, momentum, 0.9, copied={"query"})
    for (name, new), source in zip(momentum.named_parameters(), online.parameters(), strict=True):
        if name == "query" or name.startswith("trunk"):
            torch.testing.assert_close(new, source)
        else:
            torch.testing.assert_close(new, 0.9 * before[name] + 0.1 * source)
    # buffers are the momentum detector's own
    assert torch.equal(momentum.get_buffer("norm.running_mean"), torch.zeros(2))


@pytest.mark.parametrize("steps", [1, 20, 150, 1000, 90_000])
def test_the_momentum_detector_forgets_its_start(steps: int) -> None:
    start = decay_for(steps)
    assert 0.0 <= start <= 0.996
    assert start == 0.996 or steps < 3750
    share = math.prod(cosine_decay(step, steps, start) for step in range(steps))
    assert share < math.exp(-7)


def test_decay_goes_from_start_to_one() -> None:
    values = [cosine_decay(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.996)
    assert values[50] == pytest.approx(0.998)
    assert values[-1] == 1.0
    assert values == sorted(values)
