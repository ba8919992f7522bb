from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import aligndet
from aligndet.box_pretraining import BoxPretraining
from aligndet.data.labelled import Labelled
from aligndet.data.views import TwoViews, View
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.composite import CompositeBackbone, build_composite_backbone
from aligndet.detectors.trunks import build_trunk, trunk_features
from aligndet.finetuning import Finetuning

SMALL: dict[str, Any] = {"trunk": "resnet18", "fpn_channels": 64}
TRUNKS = (
    *("resnet18", "timm/resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"),
    *("tf_efficientnet_lite0", "mobilenetv2_050", "mobilenetv3_small_050"),
)
NAMES = ("cbnet_cascade_rcnn", "cbnet_htc")
OBJECTS = torch.tensor([[4.0, 8.0, 40.0, 52.0]])
LABELS = torch.tensor([2])
MASKS = torch.zeros(1, 64, 96, dtype=torch.uint8)
MASKS[0, 8:52, 4:40] = 1
PSEUDO_MASKS = torch.ones(1, 8, 8, dtype=torch.uint8).tril()  # over the box


def connect(backbone: CompositeBackbone) -> CompositeBackbone:
    """Gives the connections something to say, as training does."""
    for module in backbone.connections.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return backbone


def trained(adapter: Any) -> BoxPretraining:
    torch.manual_seed(0)
    module = BoxPretraining(adapter, steps=4)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return module


def views() -> list[TwoViews]:
    pictures = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    online, momentum = (View(picture, OBJECTS, PSEUDO_MASKS) for picture in pictures)
    return [TwoViews(online, momentum, "a.jpg", ())]


@pytest.mark.parametrize("trunk", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_the_composition_is_that_of_the_formula(trunk: str) -> None:
    # lead: x_l = F_l(x_(l-1) + sum over i >= l of upsampled norm(conv(assistant's map i)))
    backbone = connect(build_composite_backbone(trunk, fpn_channels=64).eval())
    last = trunk.startswith("swin")  # which works on (B, H, W, C)
    inside, outside = ((0, 2, 3, 1), (0, 3, 1, 2)) if last else ((0, 1, 2, 3), (0, 1, 2, 3))
    body: Any = backbone.body
    layers: Any = backbone.connections

    def run(stage: Any, x: Tensor) -> Tensor:
        return stage(x.permute(inside)).permute(outside)

    def normalised(x: Tensor) -> Tensor:
        deviation = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return (x - x.mean(1, keepdim=True)) / deviation if last else x

    def sent(found: Tensor, level: int, k: int) -> Tensor:
        found = normalised(found)
        convolution, norm = layers[level][k]
        y = torch.einsum("bchw,dc->bhwd", found, convolution.weight[:, :, 0, 0])
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
        y = (y * norm.weight + norm.bias).permute(0, 3, 1, 2)
        times = 2 ** (k if level == 0 else k + 1)  # stem and first map are of one size
        return y.repeat_interleave(times, 2).repeat_interleave(times, 3)

    image = torch.rand(1, 3, 64, 96)
    stem = body["stem"](image).permute(outside)
    first, second, third, fourth = body["assistant"].values()
    a1 = run(first, stem)
    a2 = run(second, a1)
    a3 = run(third, a2)
    a4 = run(fourth, a3)
    first, second, third, fourth = body["lead"].values()
    x1 = run(first, stem + sent(a1, 0, 0) + sent(a2, 0, 1) + sent(a3, 0, 2) + sent(a4, 0, 3))
    x2 = run(second, x1 + sent(a2, 1, 0) + sent(a3, 1, 1) + sent(a4, 1, 2))
    x3 = run(third, x2 + sent(a3, 2, 0) + sent(a4, 2, 1))
    x4 = run(fourth, x3 + sent(a4, 3, 0))
    for found, wanted in zip(backbone.maps(image), ([a1, a2, a3, a4], [x1, x2, x3, x4]), strict=True):
        torch.testing.assert_close(found, [*map(normalised, wanted)], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(x4, a4, atol=1e-2)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_lead_starts_as_the_plain_trunk(trunk: str, tmp_path: Path) -> None:
    plain, _ = build_trunk(trunk)
    save_file(plain.state_dict(), tmp_path / "trunk.safetensors")
    backbone = build_composite_backbone(trunk, str(tmp_path / "trunk.safetensors"), 64).eval()
    image = torch.rand(1, 3, 75, 101)  # no multiple of a patch or window
    assistant, lead = backbone.maps(image)
    for ours, other, theirs in zip(lead, assistant, trunk_features(plain.eval(), image), strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(other, theirs)
    changed = connect(backbone).maps(image)
    torch.testing.assert_close(changed[0], assistant)  # nothing leads back
    assert all(not torch.allclose(now, before) for now, before in zip(changed[1], lead, strict=True))


@pytest.mark.parametrize("trunk", ["vit_tiny_patch16_224", "hrnet_w18_small"])
def test_a_trunk_without_stages_is_refused(trunk: str) -> None:
    with pytest.raises(ValueError, match=rf"trunk '{trunk}' cannot be doubled for CBNet v2"):
        build_pretrainable("cbnet_htc", trunk=trunk)


@pytest.mark.parametrize("name", NAMES)
def test_six_stages_with_half_the_weight_on_the_assistant(name: str) -> None:
    by_chance_nothing = {"rpn_positives": True}
    adapter: Any = build_pretrainable(name, **SMALL, options=by_chance_nothing)
    adapter.detector.backbone.body.eval()
    known = {"masks": [PSEUDO_MASKS]} if adapter.needs else {}
    output = adapter([torch.rand(3, 64, 96)], [OBJECTS], **known)
    assert [stage.weight for stage in output.stages] == [0.5, 0.25, 0.125, 1.0, 0.5, 0.25]
    # at the start both trunks find the same: what differs is the weight alone
    for assistant, lead in zip(output.stages[:3], output.stages[3:], strict=True):
        torch.testing.assert_close(assistant.embeddings, lead.embeddings)
    lead_losses = {key: loss for key, loss in output.losses.items() if not key.startswith("assistant_")}
    assert len(lead_losses) == len(output.losses) / 2 == (8 if adapter.needs else 5)
    for key, loss in lead_losses.items():
        torch.testing.assert_close(output.losses[f"assistant_{key}"], 0.5 * loss)


@pytest.mark.parametrize("name", NAMES)
def test_finetuning_counts_the_assistant_half(name: str) -> None:
    by_chance_nothing = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    by_chance_nothing |= {"rpn_post_nms_top_n_train": 100}
    model: Any = build_detector(name, num_classes=3, min_size=64, **SMALL, options=by_chance_nothing)
    model.train().backbone.body.eval()
    losses = model([torch.rand(3, 64, 96)], [{"boxes": OBJECTS, "labels": LABELS, "masks": MASKS}])
    lead_losses = {key: loss for key, loss in losses.items() if not key.startswith("assistant_")}
    assert len(lead_losses) == len(losses) / 2 == (11 if name == "cbnet_htc" else 8)
    for key, loss in lead_losses.items():
        torch.testing.assert_close(losses[f"assistant_{key}"], 0.5 * loss, rtol=1e-3, atol=1e-5)


def test_the_lead_alone_predicts() -> None:
    options = {"box_score_thresh": 0.0, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20}
    settings: dict[str, Any] = {"num_classes": 3, "min_size": 64, **SMALL, "options": options}
    composite: Any = build_detector("cbnet_htc", **settings).eval()
    single: Any = build_detector("htc", **settings).eval()
    state = {
        key.replace(".body.stem.", ".body.").replace(".body.lead.", ".body."): value
        for key, value in composite.state_dict().items()
        if ".assistant." not in key and ".connections." not in key
    }
    single.load_state_dict(state)
    seen: list[None] = []
    composite.backbone.fpn.register_forward_hook(lambda *_: seen.append(None))
    with torch.inference_mode():
        image = torch.rand(3, 64, 96)
        (ours,), (theirs,) = composite([image]), single([image])
    assert len(seen) == 1
    assert len(ours["boxes"]) > 0
    torch.testing.assert_close(ours, theirs)


def test_pretraining_trains_the_connections_through_frozen_trunks() -> None:
    module = trained(build_pretrainable("cbnet_cascade_rcnn", **SMALL, options={"max_boxes": 32}))
    backbone: Any = module.online.detector.backbone
    momentum: Any = module.momentum.detector.backbone
    assert momentum.body is backbone.body is module.trunk
    before = {key: value.clone() for key, value in module.trunk.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    for step in range(2):
        optimizer.zero_grad()
        module.training_step(views(), step).backward()
        assert all(parameter.grad is None for parameter in module.trunk.parameters())
        for source in (c for level in backbone.connections for c in level):
            assert source[1].weight.grad.abs().max() > 0
            assert (source[0].weight.grad.abs().max() > 0) == (step > 0)  # its norm starts at zero
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in module.trunk.state_dict().items())
    assert not any(parameter.requires_grad for parameter in momentum.connections.parameters())
    assert all(parameter.grad is None for parameter in momentum.connections.parameters())


def test_a_step_of_finetuning_reaches_every_parameter() -> None:
    settings: dict[str, Any] = {"trunk": "swin_tiny_patch4_window7_224", "fpn_channels": 64}
    model: Any = build_detector("cbnet_cascade_rcnn", num_classes=3, resize_in_training=False, **settings)
    connect(model.backbone)
    module = Finetuning(model, steps=2)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    picture = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    loss = module.training_step([Labelled(picture, OBJECTS, LABELS, "a.jpg", ())], 0)
    loss.backward()
    assert loss.isfinite()
    assert not [key for key, parameter in module.named_parameters() if parameter.grad is None]
    smaller = module.configure_optimizers()["optimizer"].param_groups[-2:]
    trunks = {id(p) for part in ("stem", "assistant", "lead") for p in model.backbone.body[part].parameters()}
    assert trunks == {id(p) for group in smaller for p in group["params"]}


@pytest.mark.slow
def test_from_images_to_predictions(sample: Path, proposals: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **SMALL,
        "trunk_weights": "none",
        **{"min_size": (64, 96), "max_size": 128, "batch_size": 2, "steps": 2, "warmup_steps": 1},
        **{"workers": 0, "accelerator": "cpu"},
    }
    run = aligndet.pretrain(
        sample / "train",
        proposals=proposals,
        output=tmp_path / "run",
        detector="cbnet_cascade_rcnn",
        **settings,
    )
    exported = aligndet.export(run, output=tmp_path / "exported", num_classes=5)
    detector, manifest = aligndet.load_detector(exported)
    new = {module for module, origin in manifest["modules"].items() if origin == "new"}
    assert new == {f"roi_heads.stages.{stage}.box_predictor.cls_score" for stage in range(3)}
    assert len(detector([torch.rand(3, 64, 64)])) == 1
    tuned = aligndet.finetune(sample / "train.json", output=tmp_path / "tuned", init_from=run, **settings)
    output = aligndet.predict(tuned, sample / "val", output=tmp_path / "predictions", score=0.0)
    assert len(list((output / "pictures").glob("*.jpg"))) == 4


def test_the_pyramids_statistics_are_the_leads() -> None:
    backbone = connect(build_composite_backbone("resnet18", fpn_channels=64, fpn_norm="batch")).train()
    norms = [m for m in backbone.fpn.modules() if isinstance(m, nn.BatchNorm2d)]
    seen: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, inputs: seen[norm].append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        backbone.branches(torch.rand(2, 3, 64, 96))
    assert norms
    for norm in norms:
        assistant, lead = seen[norm]
        torch.testing.assert_close(norm.running_mean, 0.1 * lead)
        assert not torch.equal(assistant, lead)
