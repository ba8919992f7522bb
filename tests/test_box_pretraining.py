from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aligndet.box_pretraining import BoxPretraining, _statistics
from aligndet.boxes import BACKGROUND, BoxPredictions, PretrainOutput
from aligndet.data.labelled import HostBatch
from aligndet.data.views import TwoViewDataset, TwoViews
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.finetuning import Finetuning
from aligndet.losses import box_contrastive_loss
from aligndet.momentum import cosine_decay
from aligndet.proposals.storage import read_proposals
from tests.test_losses import naive_loss


@pytest.fixture
def batch(sample: Path, proposals: Path) -> list[TwoViews]:
    table = read_proposals(proposals)
    dataset = TwoViewDataset(sample / "train", table, min_size=(64, 96), max_size=128, max_proposals=10)
    return [dataset[index, index] for index in range(2)]


def module(**settings: Any) -> BoxPretraining:
    return BoxPretraining(build_pretrainable("fcos", trunk="resnet18", fpn_channels=64), steps=10, **settings)


def test_the_trunk_is_frozen_and_in_eval_mode_from_the_start() -> None:
    ours = module()
    for _ in range(2):
        assert not any(m.training for m in ours.trunk.modules())
        assert not any(p.requires_grad for p in ours.trunk.parameters())
        assert ours.online.detector.training
        assert ours.momentum.detector.training
        ours.train()
    assert ours.momentum.detector.backbone.body is ours.trunk


def test_a_frozen_trunk_runs_without_batch_norms(batch: list[TwoViews]) -> None:
    ours, state = module(), module().state_dict()
    ours.load_state_dict(state)
    before = ours.training_step(batch, 0)
    ours.on_train_start()
    called = []
    for norm in ours.trunk.modules():
        norm.register_forward_hook(lambda norm, *_: called.append(norm))
    torch.testing.assert_close(ours.training_step(batch, 0), before)
    assert set(called) == {ours.trunk}
    assert state.keys() == ours.state_dict().keys()
    assert all(
        torch.equal(value, state[name]) for name, value in ours.trunk.state_dict(prefix="trunk.").items()
    )


def test_a_trained_trunk_keeps_its_batch_norms(batch: list[TwoViews]) -> None:
    ours = module(train_trunk=True)
    ours.on_train_start()
    ours.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in ours.trunk.parameters())


def test_a_trainable_trunk_has_a_momentum_copy_of_its_own(batch: list[TwoViews]) -> None:
    ours = module(train_trunk=True)
    assert ours.momentum.detector.backbone.body is not ours.trunk
    ours.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in ours.trunk.parameters())
    assert not any(p.requires_grad for p in ours.momentum.parameters())


def test_a_step_changes_neck_and_heads_but_not_the_trunk(batch: list[TwoViews]) -> None:
    ours = module()
    before = {name: value.clone() for name, value in ours.online.state_dict().items()}
    optimizer = ours.configure_optimizers()["optimizer"]
    ours.training_step(batch, 0).backward()
    optimizer.step()
    changed = {name for name, value in ours.online.named_parameters() if not torch.equal(value, before[name])}
    assert not any(name.startswith("detector.backbone.body") for name in changed)
    head = "detector.head"
    assert {f"{head}.classification_head.conv.0.weight", f"{head}.regression_head.bbox_reg.weight"} <= changed
    assert {
        f"{head}.projection_head.output.weight",
        "detector.backbone.fpn.inner_blocks.0.0.weight",
    } <= changed
    for name, value in ours.trunk.named_buffers():
        assert torch.equal(value, before[f"detector.backbone.body.{name}"]), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(batch: list[TwoViews]) -> None:
    ours = module()
    with torch.no_grad():
        ours.online.detector.head.regression_head.bbox_reg.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0.*00000\.jpg"):
        ours.training_step([item._replace(file_name="00000.jpg") for item in batch], 0)


def test_a_loss_that_is_not_finite_stops_all_processes(
    batch: list[TwoViews], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all name the images of the one where it is."""
    told: list[Any] = []

    def gather(own: list[Any]) -> list[Any]:
        told.extend(own)
        return [*own, ("contrast nan", ["theirs.jpg"])]

    monkeypatch.setattr("aligndet.training.all_reduce_mean", lambda value: value + float("inf"))
    monkeypatch.setattr("aligndet.training.all_gather_items", gather)
    with pytest.raises(FloatingPointError, match=r"not finite \(contrast nan\) on the images theirs\.jpg"):
        module().training_step(batch, 0)
    assert not told


class Known(nn.Module):
    """Two stages whose embeddings are made of the image's colour and the proposals, which they stand for."""

    prediction_layers = ()
    copied_parameters = ("detector.query",)

    def __init__(self) -> None:
        super().__init__()
        self.detector: Any = nn.Module()
        self.detector.backbone = nn.Module()
        self.detector.backbone.body = nn.Conv2d(3, 3, 1)
        self.detector.head = nn.Linear(7, 5)
        self.detector.query = nn.Parameter(torch.ones(5))
        self.seen: list[Tensor] = []
        self.learns = False

    def forward(self, images: list[Tensor], proposals: list[Tensor]) -> PretrainOutput:
        self.seen, self.learns = images, torch.is_grad_enabled()
        colours = [self.detector.backbone.body(image).mean((1, 2)) for image in images]
        rows = [
            torch.cat([colour.expand(len(b), 3), b / 100], 1)
            for colour, b in zip(colours, proposals, strict=True)
        ]
        first = self.detector.head(torch.cat(rows)) * self.detector.query
        ids = torch.arange(len(first))
        ids[3] = BACKGROUND
        stages = BoxPredictions(first, ids), BoxPredictions(first.square().roll(1, 0), ids, 0.25)
        return PretrainOutput(stages, {"box": first.square().mean(), "iou": first.abs().mean()})


def test_a_step_is_algorithm_1(batch: list[TwoViews], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    ours = BoxPretraining(Known(), steps=10, temperature=0.3, contrast_weight=2.0, box_weight=0.5)
    monkeypatch.setattr(ours, "log_dict", logged.update)
    with torch.no_grad():
        for parameter in ours.momentum.detector.head.parameters():
            parameter.add_(torch.randn_like(parameter))
    total = ours.training_step(batch, 0)
    assert (ours.online.learns, ours.momentum.learns) == (True, False)
    views = [[getattr(item, view) for item in batch] for view in ("online", "momentum")]
    outputs = []
    for adapter, side in zip((ours.online, ours.momentum), views, strict=True):
        for seen, view in zip(adapter.seen, side, strict=True):
            torch.testing.assert_close(seen, view.image / 255)
        outputs.append(adapter([view.image / 255 for view in side], [view.proposals for view in side]))
    online, momentum = outputs
    contrasts = [
        a.weight
        * naive_loss(a.embeddings, a.proposal_ids.tolist(), b.embeddings, b.proposal_ids.tolist(), 0.3)
        for a, b in zip(online.stages, momentum.stages, strict=True)
    ]
    torch.testing.assert_close(total, 2.0 * sum(contrasts) + 0.5 * sum(online.losses.values()))
    torch.testing.assert_close(logged, _statistics(batch, online.stages[-1], momentum.stages[-1]))
    usual = BoxPretraining(Known(), steps=10)
    assert (usual.temperature, usual.contrast_weight, usual.box_weight) == (0.5, 1.0, 1.0)


class Replay(Callback):
    """Moves a copy of a momentum network by hand."""

    def __init__(self, online: nn.Module, momentum: nn.Module) -> None:
        self.online = online
        self.expected = {name: p.clone() for name, p in momentum.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *batch: Any) -> None:
        decay = cosine_decay(trainer.global_step - 1, module.steps, module.decay)
        for name, source in self.online.named_parameters():
            copied = name == "detector.query" or name.startswith("detector.backbone.body")
            before = source if copied else self.expected[name]
            self.expected[name] = (decay * before + (1 - decay) * source).detach().clone()


def test_a_short_run_has_a_momentum_detector_that_follows() -> None:
    assert BoxPretraining(Known(), steps=150).decay == pytest.approx(0.9)
    assert BoxPretraining(Known(), steps=90_000).decay == 0.996


def test_the_momentum_detector_follows_every_step(batch: list[TwoViews], tmp_path: Path) -> None:
    ours = BoxPretraining(Known(), steps=5, decay=0.5, learning_rate=0.1)
    start = {name: p.clone() for name, p in ours.momentum.named_parameters()}
    trainer = Trainer(
        max_steps=3,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[replay := Replay(ours.online, ours.momentum)],
    )
    trainer.fit(ours, DataLoader([batch] * 3, batch_size=None, collate_fn=list))  # type: ignore[arg-type]
    followed = dict(ours.momentum.named_parameters())
    for name, value in followed.items():
        torch.testing.assert_close(value, replay.expected[name])
    for name in ("detector.head.weight", "detector.query"):
        assert (followed[name] - start[name]).abs().max() > 1e-3
    assert not torch.equal(followed["detector.head.weight"], ours.online.detector.head.weight)


def test_frozen_batch_norms_stay_so_in_fine_tuning() -> None:
    detector = build_detector("fcos", num_classes=2, trunk="resnet18", fpn_channels=64)
    ours = Finetuning(detector, steps=10)
    norms = [m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for _ in range(2):
        assert not any(norm.training for norm in norms)
        assert not any(p.requires_grad for norm in norms for p in norm.parameters())
        assert ours.detector.training
        ours.train()
    free = Finetuning(
        build_detector("fcos", num_classes=2, trunk="resnet18", fpn_channels=64),
        steps=10,
        freeze_batch_norm=False,
    )
    assert all(m.training for m in free.modules())


def test_a_factor_of_zero_freezes_the_trunk() -> None:
    detector: Any = build_detector("fcos", num_classes=2, trunk="resnet18", fpn_channels=64)
    ours = Finetuning(detector, steps=10, trunk_factor=0.0, freeze_batch_norm=False)
    trunk = detector.backbone.body
    assert not any(p.requires_grad for p in trunk.parameters())
    assert not any(m.training for m in trunk.modules())  # Swin drops paths in training
    groups = ours.configure_optimizers()["optimizer"].param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in detector.parameters()} - {id(p) for p in trunk.parameters()}


def test_boxes_of_other_processes_are_negatives_in_each_stage(
    batch: list[TwoViews], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = BoxPredictions(torch.randn(7, 5), torch.full((7,), BACKGROUND))
    asked: list[tuple[BoxPredictions, ...]] = []

    def elsewhere(*views: BoxPredictions) -> BoxPredictions:
        asked.append(views)
        return others

    monkeypatch.setattr("aligndet.box_pretraining.gather_other_boxes", elsewhere)
    ours = BoxPretraining(Known(), steps=10, box_weight=0.0)
    alone = ours.training_step(batch, 0)
    assert not asked
    ours.gather_keys = True
    gathered = ours.training_step(batch, 0)
    assert len(asked) == 2
    expected = [online.weight * box_contrastive_loss(online, keys, 0.5, others) for online, keys in asked]
    torch.testing.assert_close(gathered, torch.stack(expected).sum())
    assert gathered > alone


def test_steps_and_processes_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process draws in its second batch, the second process draws in its first."""
    ours, drawn = BoxPretraining(Known(), steps=10, seed=3), []
    for world, rank, step in ((1, 0, 0), (1, 0, 1), (2, 1, 0), (2, 0, 1)):
        monkeypatch.setattr(BoxPretraining, "trainer", SimpleNamespace(world_size=world))
        monkeypatch.setattr(BoxPretraining, "global_rank", rank)
        ours.on_train_batch_start(None, step)
        drawn.append(torch.rand(1).item())
    assert drawn[1] == drawn[2]
    assert len(set(drawn)) == 3


def test_what_is_logged_of_the_boxes(batch: list[TwoViews]) -> None:
    def view(embeddings: Tensor, *ids: int) -> BoxPredictions:
        return BoxPredictions(embeddings, torch.tensor(ids))

    found = _statistics(batch, view(torch.eye(4), 0, 0, 1, BACKGROUND), view(torch.eye(3), 1, 2, BACKGROUND))
    assert (found["boxes/assigned"], found["boxes/background"]) == (3, 1)
    proposals = sum(len(item.online.proposals) for item in batch)
    assert found["proposals/in_batch"] == proposals
    assert found["proposals/in_both_views"] == pytest.approx(1 / proposals)
    apart, one = view(torch.randn(1000, 64), *range(1000)), view(torch.rand(20, 1).expand(20, 8), *range(20))
    assert float(_statistics(batch, apart, apart)["embedding_spread"]) == pytest.approx(1, abs=0.01)
    assert float(_statistics(batch, one, one)["embedding_spread"]) == pytest.approx(0, abs=1e-3)


def test_the_trunk_has_a_part_of_the_learning_rate_and_the_pyramid_its_norms() -> None:
    detector: Any = build_detector("fcos", num_classes=2, trunk="resnet18", fpn_channels=64, fpn_norm="batch")
    ours = Finetuning(detector, steps=10, trunk_factor=0.1, learning_rate=0.5)
    groups = ours.configure_optimizers()["optimizer"].param_groups
    trunk = {id(p) for p in detector.backbone.body.parameters()}
    rates = {(id(p) in trunk, round(group["lr"], 6)) for group in groups for p in group["params"]}
    assert rates == {(True, 0.05), (False, 0.5)}
    norms = [m for m in detector.backbone.fpn.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training and norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize(("masks", "together"), [(False, [2]), (True, [1, 1])])
def test_masks_are_validated_image_by_image(masks: bool, together: list[int]) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.body = nn.Conv2d(3, 3, 1)
            self.seen: list[int] = []

        def forward(self, images: list[Tensor]) -> list[str]:
            self.seen.append(len(images))
            return [f"{image.max():g}" for image in images]

    measured: list[tuple[str, str]] = []

    def update(predictions: list[str], targets: list[str]) -> None:
        measured.extend(zip(predictions, targets, strict=True))

    evaluator: Any = SimpleNamespace(masks=masks, update=update)
    ours = Finetuning(detector := Detector(), steps=10, evaluator=evaluator)
    batch: Any = [(torch.full((3, 4, 4), 255 * value, dtype=torch.uint8), f"{value}") for value in (0, 1)]
    ours.validation_step(HostBatch([*batch, None]), 0)
    assert detector.seen == together
    assert measured == [("0", "0"), ("1", "1")]
