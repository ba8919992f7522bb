"""Files as other projects write them, made from a known state dict by renaming it their way."""

from __future__ import annotations

import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ConvNeXt, VisionTransformer, get_model
from torchvision.models.convnext import CNBlockConfig

from aligndet.detectors.layouts import LAYOUTS, match_trunk
from aligndet.detectors.reading import read_tensors
from aligndet.detectors.trunks import build_trunk, trunk_features

State = dict[str, Tensor]
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


def renamed(state: State, *rules: tuple[str, Any], prefix: str = "") -> State:
    result = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[prefix + name] = value
    return result


def copy(state: State, prefix: str) -> State:
    """A moving average: the same names, other values."""
    return {prefix + name: value + 1 for name, value in state.items()}


def extra(*names: str) -> State:
    return {name: torch.zeros(4, 2) for name in names}


def fits(state: State, **settings: Any) -> dict[str, Any]:
    """A checkpoint with what surrounds the weights in a training script."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    return {"epoch": 200, "arch": "x", "state_dict": state, "optimizer": optimizer, **settings}


def detectron2(state: State) -> dict[str, Any]:
    d2 = renamed(
        {k: v for k, v in state.items() if not k.startswith("fc") and "num_batches" not in k},
        (r"^(?!layer)", "stem."),
        (r"layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
        (r"bn(\d)", r"conv\1.norm"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
    )
    arrays = {name: value.numpy() for name, value in d2.items()}
    return {"model": arrays, "__author__": "third_party", "matching_heuristics": True}


def microsoft(state: State, window: int = 7) -> State:
    result = renamed(state, (r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"))
    for name in list(result):
        if name.endswith("relative_position_bias_table"):
            result[name] = result[name][: (2 * window - 1) ** 2]
            result[name.replace("bias_table", "index")] = torch.zeros(window**2, window**2, dtype=torch.int64)
    return {**result, "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


def openmmlab_swin(state: State) -> State:
    def folded(value: Tensor) -> Tensor:  # columns of four pixels, channel by channel
        return value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)

    result = renamed(
        microsoft(state),
        (r"^layers", "stages"),
        (r"attn\.(?!w_msa)", "attn.w_msa."),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
        (r"patch_embed\.proj\.", "patch_embed.projection."),
        prefix="backbone.",
    )
    return {name: folded(value) if ".downsample." in name else value for name, value in result.items()}


def openmmlab_vit(state: State) -> State:
    return renamed(
        state,
        (r"^blocks", "layers"),
        (r"\.norm(\d)", r".ln\1"),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
        (r"patch_embed\.proj\.", "patch_embed.projection."),
        prefix="backbone.",
    )


def authors_convnext(state: State) -> State:
    return renamed(
        state,
        (r"^stem", "downsample_layers.0"),
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks\.", "."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
    )


def numbered(state: State) -> State:
    order = {"conv1": 0, "bn1": 1, **{f"layer{i}": i + 3 for i in range(1, 5)}}
    return {
        f"{order[name.split('.')[0]]}.{name.partition('.')[2]}": value
        for name, value in state.items()
        if not name.startswith("fc")
    }


def yacs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A settings object as Swin's checkpoints carry it, of a package that is not installed."""
    module: Any = ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return module.CfgNode(BATCH_SIZE=2048)


# trunk, content of the file, layout, prefix, number of unused tensors (index tables and counters left out)
FILES: dict[str, tuple[str, Callable[[State], Any], str, str, int]] = {
    "torchvision.pth": ("resnet18", lambda s: s, "torchvision's", "", 2),
    "timm.safetensors": ("timm/resnet18", lambda s: s, "torchvision's", "", 2),
    "timm convnext.safetensors": ("convnext_atto", lambda s: s, "torchvision's", "", 4),
    "timm swin.safetensors": (SWIN, lambda s: s, "torchvision's", "", 4),
    "timm with its average.pth.tar": (
        "resnet18",
        lambda s: {"state_dict_ema": copy(s, ""), "state_dict": dict(s)},
        "torchvision's",
        "state_dict",
        2 + 102,
    ),
    "moco_v1.pth.tar": (
        "resnet18",
        lambda s: fits(
            {
                **{f"module.encoder_q.{k}": v for k, v in s.items()},
                **copy(s, "module.encoder_k."),
                **extra("module.queue", "module.queue_ptr"),
            }
        ),
        "torchvision's",
        "state_dict.module.encoder_q",
        2 + 102 + 2,
    ),
    "moco_v2, the copy first.pth.tar": (
        "resnet18",
        lambda s: fits(
            {**copy(s, "module.encoder_k."), **{f"module.encoder_q.{k}": v for k, v in s.items()}}
        ),
        "torchvision's",
        "state_dict.module.encoder_q",
        2 + 102,
    ),
    "moco_v3.pth.tar": (
        VIT,
        lambda s: fits(
            {**copy(s, "module.momentum_encoder."), **{f"module.base_encoder.{k}": v for k, v in s.items()}}
        ),
        "torchvision's",
        "state_dict.module.base_encoder",
        4 + 152,
    ),
    "swav.pth.tar": (
        "resnet18",
        lambda s: {
            **{f"module.{k}": v for k, v in s.items()},
            **extra("module.projection_head.0.weight", "module.prototypes.weight"),
        },
        "torchvision's",
        "module",
        2 + 2,
    ),
    "simsiam.pth.tar": (
        "resnet18",
        lambda s: fits({f"module.encoder.{k}": v for k, v in s.items()} | extra("module.predictor.0.weight")),
        "torchvision's",
        "state_dict.module.encoder",
        3,
    ),
    "byol, layers by number.pth": (
        "resnet18",
        lambda s: {
            "target_network_state_dict": copy(numbered(s), "encoder."),
            "online_network_state_dict": {f"encoder.{k}": v for k, v in numbered(s).items()},
        },
        "a ResNet's layers by number",
        "online_network_state_dict.encoder",
        100,
    ),
    "byol.pth": (
        "resnet18",
        lambda s: {**copy(s, "target_encoder.net."), **{f"online_encoder.net.{k}": v for k, v in s.items()}},
        "torchvision's",
        "online_encoder.net",
        2 + 102,
    ),
    "densecl (openselfsup).pth": (
        "resnet18",
        lambda s: {
            "meta": {"epoch": 200},
            "state_dict": {**copy(s, "encoder_k.0."), **{f"encoder_q.0.{k}": v for k, v in s.items()}},
        },
        "torchvision's",
        "state_dict.encoder_q.0",
        2 + 102,
    ),
    "pixpro.pth": (
        "resnet18",
        lambda s: {
            "opt": Namespace(epochs=400),
            "model": {f"module.encoder.{k}": v for k, v in s.items()} | copy(s, "module.encoder_k."),
        },
        "torchvision's",
        "model.module.encoder",
        2 + 102,
    ),
    "detco.pth": (
        "resnet18",
        lambda s: fits({f"module.encoder_q.{k}": v for k, v in s.items()} | extra("module.queue_local")),
        "torchvision's",
        "state_dict.module.encoder_q",
        3,
    ),
    "dino.pth": (
        VIT,
        lambda s: {
            "student": copy(s, "module.backbone."),
            "teacher": {f"backbone.{k}": v for k, v in s.items()},
            "args": Namespace(arch="vit_tiny"),
            "best": np.float64(0.5),
        },
        "torchvision's",
        "teacher.backbone",
        4 + 152,
    ),
    "swin.pth": (SWIN, lambda s: {"model": microsoft(s)}, "Microsoft's Swin", "model", 4),
    "mmcls resnet.pth": (
        "resnet18",
        lambda s: {"meta": {}, "state_dict": {f"backbone.{k}": v for k, v in s.items()}},
        "torchvision's",
        "state_dict.backbone",
        2,
    ),
    "mmdet swin.pth": (
        SWIN,
        lambda s: {"state_dict": {**openmmlab_swin(s), **extra("neck.lateral_convs.0.conv.weight")}},
        "OpenMMLab's Swin",
        "state_dict.backbone",
        5,
    ),
    "mmselfsup vit.pth": (
        VIT,
        lambda s: {"state_dict": openmmlab_vit(s)},
        "OpenMMLab's ViT",
        "state_dict.backbone",
        4,
    ),
    "detectron2.pkl": ("resnet18", detectron2, "detectron2's ResNet", "model", 0),
    "convnext.pth": (
        "convnext_atto",
        lambda s: {"model": authors_convnext(s)},
        "the authors' ConvNeXt",
        "model",
        4,
    ),
}


def whole(trunk: str) -> nn.Module:
    torch.manual_seed(1)
    return get_model(trunk) if trunk == "resnet18" else timm.create_model(trunk.removeprefix("timm/"))


def own(body: nn.Module, state: State) -> State:
    """The values that a trunk should have, by its own names."""
    flat = {re.sub(r"[._]", "", name): value for name, value in state.items()}
    return {name: flat[re.sub(r"[._]", "", name.removeprefix("model."))] for name in body.state_dict()}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("file", FILES)
def test_a_published_layout(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk, content, layout, prefix, unused = FILES[file]
    state = whole(trunk).state_dict()
    path = write(tmp_path / file, content(state))
    body, _ = build_trunk(trunk, weights=str(path))
    for name, value in own(body, state).items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(body.state_dict()[name], value), name
    match = match_trunk(read_tensors(path), body.state_dict())
    assert match.layout.startswith(layout)
    assert (match.prefix, match.missing, len(match.unused)) == (prefix, (), unused)
    assert f"{match}" in capsys.readouterr().out


ATTO = ((40, 80, 2), (80, 160, 2), (160, 320, 6), (320, None, 2))
# timm's name, torchvision's network, the layer that follows the last map, and the map out of its input
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Tensor], Tensor]]] = {
    "mobilenetv2_100": (partial(get_model, "mobilenet_v2"), "features.18", lambda x: x),
    "efficientnet_b0": (partial(get_model, "efficientnet_b0"), "features.8", lambda x: x),
    "convnext_atto": (lambda: ConvNeXt([CNBlockConfig(*s) for s in ATTO]), "avgpool", lambda x: x),
    SWIN: (
        partial(get_model, "swin_t"),
        "norm",
        lambda x: nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2),
    ),
    VIT: (
        lambda: VisionTransformer(224, 16, 12, 3, hidden_dim=192, mlp_dim=768),
        "encoder.ln",
        lambda x: x[:, 1:].mT.unflatten(2, (14, 14)),
    ),
}


@pytest.mark.parametrize("trunk", TORCHVISION)
def test_torchvisions_networks_compute_the_same_under_timms_names(trunk: str, tmp_path: Path) -> None:
    build, layer, as_map = TORCHVISION[trunk]
    network = build().eval()
    body, _ = build_trunk(trunk, weights=str(write(tmp_path / "weights.pth", network.state_dict())))
    seen: list[Tensor] = []
    network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    side = 448 if trunk == SWIN else 224  # torchvision's Swin does not shift a map of one window
    image = torch.rand(1, 3, side, side)
    with torch.inference_mode():
        network(image)
        features = trunk_features(body.eval(), image)[-1]
    torch.testing.assert_close(features, as_map(seen[0]), rtol=1e-3, atol=1e-3)


def test_what_pretrain_backbone_writes(tmp_path: Path) -> None:
    written, _ = build_trunk("swin_tiny_patch4_window7_224")  # its first level of names is flat
    path = write(tmp_path / "model.safetensors", written.state_dict())
    read, _ = build_trunk("swin_tiny_patch4_window7_224", weights=str(path))
    assert all(torch.equal(value, written.state_dict()[name]) for name, value in read.state_dict().items())


def test_openmmlab_merges_pixels_in_another_order() -> None:
    merging: Any = build_trunk(SWIN)[0].get_submodule("layers_1.downsample")
    pixels = torch.rand(1, 6, 8, 96)
    theirs = openmmlab_swin({f"layers.1.downsample.{k}": v for k, v in merging.state_dict().items()})
    norm_weight, norm_bias, reduction = (
        theirs[f"backbone.stages.0.downsample.{name}"]
        for name in ("norm.weight", "norm.bias", "reduction.weight")
    )
    columns = nn.functional.unfold(pixels.permute(0, 3, 1, 2), 2, stride=2).mT  # (1, 12, 4 * 96)
    expected = nn.functional.layer_norm(columns, (384,), norm_weight, norm_bias) @ reduction.T
    torch.testing.assert_close(merging(pixels).flatten(1, 2), expected)


def test_windows_of_another_size_are_resampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = whole(SWIN).state_dict()
    small = {f"encoder.{name}": value for name, value in microsoft(state, window=6).items()}
    content = {"model": small | extra("encoder.mask_token", "decoder.0.weight"), "config": yacs(monkeypatch)}
    path = write(tmp_path / "simmim.pth", content)
    match = match_trunk(read_tensors(path), build_trunk(SWIN)[0].state_dict())
    assert match.fits
    assert (match.layout, match.prefix, match.missing) == ("Microsoft's Swin", "model.encoder", ())
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    ours = match.state[table.replace("layers.0", "layers_0")].unflatten(0, (13, 13))
    source = small[f"encoder.{table}"].unflatten(0, (11, 11))
    torch.testing.assert_close(ours[6, 6], source[5, 5], atol=2e-2, rtol=0)  # no offset stays no offset


def test_positions_of_another_image_size_are_resampled() -> None:
    state = dict(whole(VIT).state_dict())
    state["pos_embed"] = torch.cat([torch.full((1, 1, 192), 5.0), torch.full((1, 24 * 24, 192), 2.0)], 1)
    match = match_trunk(state, build_trunk(VIT)[0].state_dict())
    assert match.state["model.pos_embed"].shape == (1, 197, 192)
    torch.testing.assert_close(match.state["model.pos_embed"][:, 1:], torch.full((1, 196, 192), 2.0))
    assert (match.state["model.pos_embed"][:, 0] == 5).all()


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r18.pth", whole("resnet18").state_dict())
    with pytest.raises(ValueError, match=r"r18\.pth' do not fit trunk 'resnet50'.*missing \d+ \(.*unused"):
        build_trunk("resnet50", weights=str(path))
    caffe2 = {"conv1_w": np.zeros((64, 3, 7, 7), np.float32), "res2_0_branch1_w": np.zeros((64, 64, 1, 1))}
    path = write(tmp_path / "R-50.pkl", {"blobs": caffe2})
    with pytest.raises(ValueError, match=r"R-50\.pkl' do not fit trunk"):
        build_trunk("resnet50", weights=str(path))


def test_a_trunk_that_lacks_its_statistics_is_refused(tmp_path: Path) -> None:
    # they are less than a hundredth of the numbers, and nothing works without them
    state = {k: v for k, v in whole("resnet18").state_dict().items() if "running" not in k}
    path = write(tmp_path / "bare.pth", state)
    with pytest.raises(ValueError, match=r"do not fit.*99\.9 % of the trunk, missing 40"):
        build_trunk("resnet18", weights=str(path))


def test_a_single_lack_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = dict(whole(VIT).state_dict())
    del state["cls_token"]
    build_trunk(VIT, weights=str(write(tmp_path / "vit.pth", state)))
    assert "missing 1 (model.cls_token)" in capsys.readouterr().out


def test_every_rule_is_of_use() -> None:
    names = [
        *("stem.conv1.norm.bias", "stem.conv1.weight", "res2.0.conv1.norm.bias", "res2.0.shortcut.norm.bias"),
        *("res2.0.shortcut.weight", "4.0.conv1.weight", "0.weight", "1.bias", "stages.0.0.gamma"),
        *("layers.0.downsample.norm.bias", "stages.0.blocks.0.attn.w_msa.qkv.bias"),
        "stages.0.blocks.0.ffn.layers.0.0.bias",
        *("x.ffn.layers.1.bias", "patch_embed.projection.bias", "features.0.0.bias", "features.0.2.bias"),
        *("features.0.1.bias", "features.1.0.mlp.0.bias", "features.1.0.mlp.3.bias", "features.2.norm.bias"),
        *("downsample_layers.0.0.bias", "downsample_layers.1.0.bias", "stages.0.0.dwconv.bias"),
        *("stages.0.0.pwconv1.bias", "features.1.0.block.0.bias", "features.1.0.block.2.bias"),
        *("features.1.0.block.3.bias", "features.1.0.block.5.bias", "features.1.0.layer_scale"),
        *(
            "layers.0.ln1.bias",
            "backbone.ln1.bias",
            "encoder.ln.bias",
            "class_token",
            "encoder.pos_embedding",
            "conv_proj.bias",
        ),
        "encoder.layers.encoder_layer_0.ln_1.bias",
        "encoder.layers.encoder_layer_0.self_attention.in_proj_bias",
        "encoder.layers.encoder_layer_0.self_attention.out_proj.bias",
    ]
    for layout, rules in LAYOUTS.items():
        for pattern, _ in rules:
            assert any(re.search(pattern, name) for name in names), (layout, pattern)
