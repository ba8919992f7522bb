from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aligndet.data.crops import TwoCrops
from aligndet.detectors.trunks import build_trunk
from aligndet.image_pretraining import COLLAPSED, METHODS, MoCo, SimSiam, knn_accuracy
from tests.test_box_pretraining import Replay


class Colours(nn.Module):
    """A trunk that is one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.layer(images)]


def module(method: str, **settings: Any) -> Any:
    return METHODS[method](Colours(), 8, steps=10, learning_rate=0.1, **settings)


def crops(count: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 1, 1).expand(count, 3, 32, 32)
    return images + 0.01 * torch.rand_like(images), images + 0.01 * torch.rand_like(images)


def batch(first: Tensor, second: Tensor) -> list[TwoCrops]:
    return [TwoCrops(a, b, f"{i}.jpg", ()) for i, (a, b) in enumerate(zip(first, second, strict=True))]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_everything_that_is_kept(method: str) -> None:
    ours = module(method)
    loss = ours.training_step(batch(*crops()), 0)
    loss.backward()
    assert loss.isfinite()
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == trained
    assert any(n.startswith("encoder.trunk.") for n in trained)
    assert not any(n.startswith("momentum.") for n in trained)


def test_simsiam_by_hand() -> None:
    ours: SimSiam = module("simsiam")
    first, second = crops()
    loss, embeddings = ours.loss_and_embeddings(first, second)
    expected = torch.zeros(())
    for a, b in ((first, second), (second, first)):
        guess, target = ours.predictor(ours.encoder(a)), ours.encoder(b)
        cosine = (guess * target).sum(1) / guess.norm(dim=1) / target.norm(dim=1)
        expected = expected - cosine.mean() / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(embeddings, ours.encoder(first))


def test_simsiam_passes_no_gradient_through_the_target() -> None:
    ours: SimSiam = module("simsiam")
    nn.init.zeros_(ours.predictor.layers[-1].weight)  # a constant guess: no gradient comes back through it
    loss, _ = ours.loss_and_embeddings(*crops())
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in ours.encoder.parameters())


def test_moco_by_hand() -> None:
    ours: MoCo = module("moco", queue=16, temperature=0.2)
    negatives = ours.contrast.memory_bank.bank.clone()  # (16, 128)
    first, second = crops(4)
    loss, queries = ours.loss_and_embeddings(first, second)
    keys = nn.functional.normalize(ours.momentum(second), dim=1)
    normalised = nn.functional.normalize(queries, dim=1)
    logits = torch.cat([(normalised * keys).sum(1, keepdim=True), normalised @ negatives.T], 1) / 0.2
    torch.testing.assert_close(loss, -logits.log_softmax(1)[:, 0].mean())
    bank = ours.contrast.memory_bank.bank
    torch.testing.assert_close(bank[:4], keys)  # the keys join the queue ...
    assert torch.equal(bank[4:], negatives[4:])
    ours.loss_and_embeddings(first, second)
    torch.testing.assert_close(bank[4:8], keys)  # ... behind those of the batch before


def test_the_queue_is_part_of_a_checkpoint() -> None:
    ours, other = module("moco", queue=16), module("moco", queue=16)
    ours.loss_and_embeddings(*crops(4))
    checkpoint: dict[str, Any] = {}
    ours.on_save_checkpoint(checkpoint)
    checkpoint = copy.deepcopy(checkpoint)
    other.on_load_checkpoint(checkpoint)
    for name in ("bank", "bank_ptr"):
        ours_, theirs = (getattr(m.contrast.memory_bank, name) for m in (ours, other))
        assert torch.equal(ours_, theirs)
    assert int(other.contrast.memory_bank.bank_ptr) == 4


@pytest.mark.parametrize("method", METHODS)
def test_collapse_is_warned_of_once(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = module(method, patience=3)
    # alike to the last bit: of equal images they are not, once batch norms have blown up rounding errors
    ours.encoder.projection.register_forward_hook(lambda _, __, output: output * 0 + 1)
    for step in range(8):
        ours.training_step(batch(*crops()), step)
        assert ("the trunk collapses" in capsys.readouterr().out) == (step == 2)


def test_a_low_spread_that_recovers_is_no_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    ours = module("moco", patience=3)
    for share in (0.05, 0.05, COLLAPSED + 0.1, 0.05, 0.05):
        ours._watch(share)
    assert not capsys.readouterr().out
    ours._watch(0.05)
    assert "spread 0.050 of a healthy 1" in capsys.readouterr().out


def test_neighbours_of_the_same_class() -> None:
    labels = torch.arange(4).repeat_interleave(50)
    centres = torch.eye(4)[labels]
    near = nn.functional.normalize(centres + 0.1 * torch.randn(200, 4), dim=1)
    assert knn_accuracy(near, labels) > 0.95
    far = nn.functional.normalize(torch.randn(200, 4), dim=1)
    assert knn_accuracy(far, labels) < 0.5
    assert knn_accuracy(near[::50], labels[::50]) == 0  # four images, no two of a class


def test_the_last_map_is_averaged_whatever_the_family() -> None:
    for trunk in ("resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"):
        body, channels = build_trunk(trunk)
        encoder = SimSiam(body, channels[-1], steps=1).encoder
        assert encoder.pooled(torch.rand(2, 3, 40, 70)).shape == (2, channels[-1])


def test_mocos_momentum_encoder_follows_every_step(tmp_path: Path) -> None:
    ours: MoCo = module("moco", queue=16, decay=0.5)
    start = {name: p.clone() for name, p in ours.momentum.named_parameters()}
    trainer = Trainer(
        max_steps=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[replay := Replay(ours.encoder, ours.momentum)],
    )
    trainer.fit(ours, DataLoader([batch(*crops(4))] * 2, batch_size=None, collate_fn=list))  # type: ignore[arg-type]
    for name, value in ours.momentum.named_parameters():
        torch.testing.assert_close(value, replay.expected[name])
    assert any(not torch.equal(value, start[name]) for name, value in ours.momentum.named_parameters())
