from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligndet.boxes import BACKGROUND, BoxPredictions, rows_of
from aligndet.losses import MOST_SIMILARITIES, box_contrastive_loss


def naive_loss(z1: Tensor, l1: list[int], z2: Tensor, l2: list[int], tau: float) -> Tensor:
    """Equation 4 as it stands, one pair after the other."""

    def sim(a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a, b) / (a.norm() * b.norm()) / tau

    proposals = []
    for i in sorted({label for label in l1 if label != BACKGROUND} & set(l2)):
        pairs = []
        for q in (q for q, label in enumerate(l1) if label == i):
            others = [z2[k] for k, label in enumerate(l2) if label != i]
            others += [z1[k].detach() for k, label in enumerate(l1) if label != i]
            below = sum((sim(z1[q], z).exp() for z in others), torch.zeros((), dtype=z1.dtype))
            for k in (k for k, label in enumerate(l2) if label == i):
                above = sim(z1[q], z2[k]).exp()
                pairs.append(-(above / (above + below)).log())
        proposals.append(torch.stack(pairs).mean())
    return torch.stack(proposals).mean() if proposals else z1.sum() * 0


def compare(l1: list[int], l2: list[int], tau: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(len(ids), 5, generator=generator) for ids in (l1, l2))
    fast, slow = z1.clone().requires_grad_(), z1.double().requires_grad_()
    keys = z2.clone().requires_grad_()
    ours = box_contrastive_loss(
        BoxPredictions(fast, torch.tensor(l1, dtype=torch.int64)),
        BoxPredictions(keys, torch.tensor(l2, dtype=torch.int64)),
        tau,
    )
    theirs = naive_loss(slow, l1, z2.double(), l2, tau)
    ours.backward()
    theirs.backward()
    assert fast.grad is not None
    assert slow.grad is not None
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    assert keys.grad is None


def test_many_boxes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be too many similarities at a time gives the same loss and the same gradient."""
    z1, z2 = torch.randn(40, 8), torch.randn(50, 8)
    l1, l2 = torch.randint(BACKGROUND, 6, (40,)), torch.randint(BACKGROUND, 6, (50,))
    results = []
    for limit in (2**25, 300, 1):
        monkeypatch.setattr("aligndet.losses.MOST_SIMILARITIES", limit)
        online = z1.clone().requires_grad_()
        loss = box_contrastive_loss(BoxPredictions(online, l1), BoxPredictions(z2, l2))
        loss.backward()
        results.append((loss, online.grad))
    for part in results[1:]:
        torch.testing.assert_close(part, results[0])


def test_the_gradient_is_the_same_each_time() -> None:
    """Also with several threads, though a box has many partners: sums in another order are other numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    z1, z2, ids = torch.randn(2000, 64), torch.randn(2000, 64), torch.randint(0, 50, (2000,))
    index = torch.randint(0, 500, (4096,))
    gradients: set[bytes] = set()
    for _ in range(5):
        online = z1.clone().requires_grad_()
        box_contrastive_loss(BoxPredictions(online, ids), BoxPredictions(z2, ids)).backward()
        (rows_of(online, index) * rows_of(z2, index.flip(0))).sum().backward()
        gradients.add(online.grad.numpy().tobytes())  # type: ignore[union-attr]
    torch.set_num_threads(threads)
    assert len(gradients) == 1
    assert torch.equal(rows_of(z1, index), z1[index])


def test_what_is_kept_for_the_way_back_does_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two proposals nearly half of all (query, key) are pairs."""
    kept: dict[int, int] = {}  # bytes of memory that is not known from elsewhere

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(200) % 2
    online, momentum = (BoxPredictions(torch.randn(200, 64, requires_grad=True), ids) for _ in range(2))
    assert MOST_SIMILARITIES * 4 == 128 * 2**20
    for limit in (MOST_SIMILARITIES, 200 * 64):
        monkeypatch.setattr("aligndet.losses.MOST_SIMILARITIES", limit)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = box_contrastive_loss(online, momentum)
        assert loss.requires_grad
        few = sum(kept.values()) < 8 * 4 * 200 * 200  # eight matrices of queries by keys; pairs by 64 were 20
        assert few == (limit < MOST_SIMILARITIES)


ids = st.lists(st.integers(BACKGROUND, 4), max_size=9)


@settings(max_examples=60, deadline=None)
@example(l1=[], l2=[], tau=0.5, seed=0)  # no boxes
@example(l1=[0, 1], l2=[], tau=0.5, seed=0)  # no keys
@example(l1=[], l2=[0, 1], tau=0.5, seed=0)  # no queries
@example(l1=[-1, -1], l2=[-1], tau=0.5, seed=0)  # background alone
@example(l1=[0], l2=[0], tau=0.5, seed=0)  # one pair
@example(l1=[0, 0], l2=[0, 0, 0], tau=0.5, seed=0)  # one proposal
@example(l1=[0, 1], l2=[2, 3], tau=0.5, seed=0)  # none in both
@example(l1=[0, -1], l2=[0, 1], tau=0.5, seed=0)  # one in both
@example(l1=[0, 1, 2] + 6 * [-1], l2=[0, 1, 2] + 6 * [-1], tau=0.01, seed=0)  # exp(1 / tau) is infinite
@given(l1=ids, l2=ids, tau=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 1000))
def test_equals_the_formula(l1: list[int], l2: list[int], tau: float, seed: int) -> None:
    compare(l1, l2, tau, seed)


def test_a_known_value() -> None:
    # the query meets its like (similarity 1), one opposite key and one opposite box of its own view
    online = BoxPredictions(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, BACKGROUND]))
    momentum = BoxPredictions(torch.tensor([[3.0, 0.0], [-2.0, 0.0]]), torch.tensor([0, 1]))
    expected = -math.log(math.exp(2) / (math.exp(2) + 2 * math.exp(-2)))
    assert box_contrastive_loss(online, momentum, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_boxes_from_elsewhere_are_negatives_of_every_query() -> None:
    z, ids = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, BACKGROUND])
    others, nobody = torch.randn(5, 8), torch.full((5,), BACKGROUND)
    online, momentum = BoxPredictions(z.clone().requires_grad_(), ids), BoxPredictions(z.flip(1), ids)
    others.requires_grad_()
    loss = box_contrastive_loss(online, momentum, 0.5, BoxPredictions(others, nobody))
    more = [*ids.tolist(), *nobody.tolist()]
    wanted = naive_loss(z, ids.tolist(), torch.cat([z.flip(1), others.detach()]), more, 0.5)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert others.grad is None
    none = BoxPredictions(others[:0], nobody[:0])
    without = box_contrastive_loss(online, momentum, 0.5)
    assert box_contrastive_loss(online, momentum, 0.5, none) == without < loss


def test_half_precision_is_computed_in_float32() -> None:
    z, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, -1])
    exact = box_contrastive_loss(BoxPredictions(z, labels), BoxPredictions(z.flip(1), labels))
    with torch.autocast("cpu", torch.bfloat16):
        half = box_contrastive_loss(BoxPredictions(z, labels), BoxPredictions(z.flip(1), labels))
    assert half.dtype == torch.float32
    assert half == exact
