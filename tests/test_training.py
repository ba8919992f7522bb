"""The order of the data, the optimizer and its schedule."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from aligndet.training import (
    ScheduleName,
    StepSampler,
    build_optimizer,
    build_schedule,
    clip_gradients,
)


def drawn(
    *, seed: int = 0, first: int = 0, rank: int = 0, world: int = 1, batch_size: int = 2
) -> list[list[tuple[int, int]]]:
    return list(
        StepSampler(7, batch_size=batch_size, batches=14, seed=seed, first=first, rank=rank, world=world)
    )


def test_every_pass_is_another_order_of_all_images() -> None:
    items = [item for batch in drawn() for item in batch]
    passes = [[index for index, _ in items[start : start + 7]] for start in range(0, 28, 7)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len(set(map(tuple, passes))) == 4
    assert list(range(7)) not in passes
    assert len({seed for _, seed in items}) == 28


def test_seeds_share_no_pass_and_no_augmentation() -> None:
    ours, theirs = ([item for batch in drawn(seed=seed) for item in batch] for seed in (0, 1))
    assert {seed for _, seed in ours}.isdisjoint(seed for _, seed in theirs)
    orders = [
        {tuple(i for i, _ in items[start : start + 7]) for start in range(0, 28, 7)}
        for items in (ours, theirs)
    ]
    assert orders[0].isdisjoint(orders[1])


def test_a_resumed_run_and_several_processes_see_what_one_sees() -> None:
    whole = drawn()
    assert drawn(first=5) == whole[5:]
    ranks = [drawn(rank=rank, world=2, batch_size=1) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_has_images_of_one_shape(seed: int) -> None:
    """But where one ends the tall ones of an epoch, or the epoch; in every division into processes alike."""
    length, tall = 103, torch.rand(103, generator=torch.Generator().manual_seed(0)) < 0.3

    def steps(first: int = 0, **division: int) -> list[list[int]]:
        sampler = StepSampler(length, batches=60, seed=seed, first=first, tall=tall, **division)
        return [[index for index, _ in batch] for batch in sampler]

    whole = steps(batch_size=4)
    seen = [index for step in whole for index in step]
    passes = [seen[start : start + length] for start in (0, length)]
    assert all(sorted(order) == list(range(length)) for order in passes)
    assert passes[0] != passes[1]
    mixed = [step for step in whole if len({bool(tall[index]) for index in step}) > 1]
    assert len(mixed) <= 2 * 60 * 4 / length + 1
    kinds = [bool(tall[step[0]]) for step in whole[:25]]
    assert 0 < sum(kinds) < 25
    assert sorted(kinds) != kinds != sorted(kinds, reverse=True)  # one kind does not come after the other
    assert steps(batch_size=4, first=7) == whole[7:]
    ranks = [steps(batch_size=2, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    halves = steps(batch_size=2, accumulate=2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole[:30]


def test_images_of_one_shape_come_as_they_were_drawn() -> None:
    plain, tall = (list(StepSampler(7, batch_size=2, batches=9, tall=t)) for t in (None, torch.ones(7) > 0))
    assert plain == tall


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {2: 1.0, 3: 1.0, 17: 1.0}),
        ("cosine", {2: 1.0, 11: 0.5, 20: 0.0}),
        ("step", {2: 1.0, 13: 1.0, 14: 0.1, 18: 0.1, 19: 0.01}),
    ],
)
def test_schedules_after_a_linear_warm_up(name: ScheduleName, expected: dict[int, float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, name, 20, 2)
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3])
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


def test_a_rate_falls_where_it_is_told_to() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    [factor] = build_schedule(optimizer, "step", 20, 2, (0.8,)).lr_lambdas
    assert [factor(step) for step in (2, 15, 16, 19)] == pytest.approx([1.0, 1.0, 0.1, 0.1])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups_of_parameters(name: str) -> None:
    trunk, head, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = build_optimizer(
        [(trunk.named_parameters(), 0.1), ([*head.named_parameters(), *frozen.named_parameters()], 1.0)],
        name,  # type: ignore[arg-type]
        1e-2,
        0.05,
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {
        id(trunk.weight): (1e-3, 0.05),
        id(trunk.bias): (1e-3, 0.0),
        id(head.weight): (1e-2, 0.05),
        id(head.bias): (1e-2, 0.0),
    }
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value) for key, value in expected.items())
    assert optimizer.defaults.get("momentum") == (0.9 if name == "sgd" else None)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer([(frozen.named_parameters(), 1.0)], "adamw", 1e-2, 0.05)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_embeddings_of_positions_do_not_decay(name: str) -> None:
    """As timm says of its models."""
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = build_optimizer([(model.named_parameters(), 1.0)], "adamw", 1e-3, 0.05).param_groups
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    found = {key for key, p in model.named_parameters() if id(p) in spared and p.ndim > 1}
    assert found == {key for key in model.no_weight_decay() if key in dict(model.named_parameters())} != set()


def test_a_gpu_has_torchs_default_of_adamw() -> None:
    for device, fused in (("cpu", True), ("meta", None)):
        weight = nn.Parameter(torch.zeros(2, 2, device=device))
        assert build_optimizer([([("weight", weight)], 1.0)], "adamw", 1e-3, 0.05).defaults["fused"] is fused


@pytest.mark.parametrize("bound", [1.0, 100.0])
def test_gradients_are_clipped_where_they_are_too_long(bound: float) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(5))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    others = copy.deepcopy(parameters)
    for other, parameter in zip(others, parameters, strict=True):
        other.grad = None if parameter.grad is None else parameter.grad.clone()
    torch.nn.utils.clip_grad_norm_(others, bound)
    grad = parameters[0].grad
    assert grad is not None
    version = grad._version
    clip_gradients(iter(parameters), bound)
    assert (grad._version == version) == (bound == 100.0)
    for other, parameter in zip(others, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0.0, atol=0.0)  # also of none
