"""RF-DETR's trunk is timm's ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from aligndet.detectors.windowed import build_windowed_vit


def vit(name: str, **settings: Any) -> Any:
    """With other numbers than those of the start, of which many are 0 or 1."""
    model: Any = timm.create_model(name, num_classes=0, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("settings", [{}, {"init_values": 1.0}])
def test_maps_are_those_of_timms_vit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = vit("test_vit", **settings)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **others: create(*names, **others, **settings))
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    name, ours, channels = build_windowed_vit("timm/test_vit", str(tmp_path / "vit.safetensors"))
    trunk: Any = ours.eval()
    assert (name, channels) == ("test_vit", [64] * 4)
    assert trunk.config.num_windows == 4
    trunk.config.num_windows = 1
    for layer in trunk.encoder.layer:
        layer.num_windows = 1
    image = torch.rand(2, 3, 160, 160)  # of the size of its positions
    with torch.inference_mode():
        states = states_of(theirs, image)
        levels = dict(zip(trunk.config.out_indices, trunk(image).feature_maps, strict=True))
        assert sorted(levels) == [0, 2, 3, 5]
        for place, level in levels.items():
            tokens = theirs.norm(states[place])[:, 1:]
            torch.testing.assert_close(level.flatten(2).mT, tokens, rtol=1e-3, atol=1e-3)


def test_the_last_norm_may_be_missing(tmp_path: Path) -> None:
    """As in what `aligndet pretrain-backbone` writes."""
    state = {f"model.{name}": value for name, value in vit("test_vit").state_dict().items()}
    for name in ("model.norm.weight", "model.norm.bias"):
        del state[name]
    save_file(state, tmp_path / "vit.safetensors")
    _, trunk, _ = build_windowed_vit("test_vit", str(tmp_path / "vit.safetensors"))
    found: Any = trunk
    assert torch.equal(found.embeddings.cls_token, state["model.cls_token"])
    assert (found.layernorm.weight == 1).all()


def test_nothing_is_computed_in_vain() -> None:
    """Several processes wait for a gradient of every weight."""
    _, body, _ = build_windowed_vit("test_vit", "none")
    trunk: Any = body.train()
    sum(level.square().sum() for level in trunk(torch.rand(1, 3, 128, 128)).feature_maps).backward()
    assert [name for name, p in trunk.named_parameters() if p.grad is None] == []


def states_of(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """The input of each block."""
    states: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: states.append(inputs[0]))
    model(image)
    return states


def test_windows_are_joined_again() -> None:
    """A pixel that changes within one window changes the map there alone, until attention is global."""
    _, body, _ = build_windowed_vit("test_vit", "none")
    trunk: Any = body.eval()
    image = torch.rand(1, 3, 128, 128)
    other = image.clone()
    other[..., :16, 96:112] += 1.0  # the first row of patches, the seventh column
    with torch.inference_mode():
        before, after = (trunk(i).feature_maps[0][0] for i in (image, other))
    changed = (before - after).abs().amax(0) > 1e-6
    assert changed.nonzero().tolist() == [[0, 6]]
