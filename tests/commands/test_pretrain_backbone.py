"""A trunk without labels: from images to the trunk that a detector starts from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import get_model

import aligndet
from aligndet import cli
from aligndet.detectors.trunks import build_trunk
from aligndet.reporting.runs import read_curves
from tests.commands.test_flow import SMALL as FLOW
from tests.commands.test_flow import asked_of, recipe_of

SMALL: dict[str, Any] = {
    "trunk": "resnet18",
    "crop_size": 32,
    "batch_size": 4,
    "steps": 3,
    "workers": 0,
    "log_every": 1,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def run(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "backbone"
    return aligndet.pretrain_backbone(
        sample / "train", output=output, labels=str(sample / "train.json"), **SMALL
    )


def test_what_a_run_leaves(run: Path) -> None:
    figures = {"loss/contrast", "embeddings/std", "embeddings/std_of_healthy", "knn/accuracy"}
    assert figures <= set(read_curves(run / "logs"))
    manifest = json.loads((run / "trunk" / "manifest.json").read_text())
    assert (manifest["architecture"]["trunk"], manifest["images"]) == ("resnet18", 12)
    network = get_model("resnet18")
    missing, alien = network.load_state_dict(load_file(run / "trunk" / "model.safetensors"), strict=False)
    assert (missing, alien) == (["fc.weight", "fc.bias"], [])  # torchvision's own names


@pytest.mark.parametrize("place", [".", "trunk", "trunk/model.safetensors", "checkpoints/last.ckpt"])
def test_a_detector_starts_from_it(place: str, run: Path) -> None:
    state = load_file(run / "trunk" / "model.safetensors")
    body, _ = build_trunk("resnet18", weights=str(run / place), strides=(8, 16, 32))
    for name, value in body.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_box_pretraining_of_a_trunk_without_labels(
    run: Path, sample: Path, proposals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = aligndet.pretrain(
        sample / "train",
        proposals=proposals,
        output=tmp_path / "pretrained",
        fpn_norm="batch",
        **{**FLOW, "trunk_weights": str(run)},
    )
    assert "matched 120 tensors, 100.0 % of the trunk, missing 0, unused 0" in capsys.readouterr().out
    exported = aligndet.export(output, output=tmp_path / "exported", num_classes=3)
    ours, trunk = (load_file(p / "model.safetensors") for p in (exported, run / "trunk"))
    assert all(torch.equal(ours[f"backbone.body.{name}"], value) for name, value in trunk.items())
    assert aligndet.load_detector(exported)[1]["architecture"]["fpn_norm"] == "batch"
    with pytest.raises(ValueError, match=r"manifest\.json: is of no detector"):
        aligndet.export(run / "trunk", output=tmp_path / "of_a_trunk", num_classes=2)
    tuned = aligndet.finetune(
        sample / "train.json",
        init_from=output,
        output=tmp_path / "tuned",
        batch_norm="trained",
        **FLOW,
    )
    assert aligndet.load_detector(tuned)[1]["architecture"]["fpn_norm"] == "batch"  # taken over


def test_broken_images_do_not_end_a_run(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for label in ("one", "two"):
        (images / label).mkdir(parents=True)
        for path in sorted((sample / "train").glob("*.jpg"))[:4]:
            (images / label / path.name).write_bytes(path.read_bytes())
    (images / "one" / "00001.jpg").write_bytes(b"")
    settings = {**SMALL, "method": "moco", "queue": 8, "labels": "folders"}
    aligndet.pretrain_backbone(images, output=tmp_path / "run", **settings)
    printed = capsys.readouterr().out
    assert "skipped: " in printed
    assert "skipped in validation" in printed
    assert "one/00001.jpg: is empty" in printed
    with pytest.raises(ValueError, match="is empty"):
        aligndet.pretrain_backbone(images, output=tmp_path / "strict", strict=True, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": "resnet5000"}, "unknown trunk 'resnet5000'"),
        ({"trunk_weights": "nothing.pth"}, r"nothing\.pth: no such file"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"labels": "folders"}, "0 of the 12 images have a class"),
        ({"labels": "nothing.json"}, "nothing.json"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_values_that_make_no_sense(
    changes: dict[str, Any], message: str, sample: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        aligndet.pretrain_backbone(sample / "train", output=tmp_path / "run", **{**SMALL, **changes})


def test_without_lightly_there_is_help_and_a_clear_word(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("lightly")] + ["lightly"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "aligndet.image_pretraining", raising=False)
    with pytest.raises(SystemExit):
        cli.main(["pretrain-backbone", "--help"])
    assert "--method" in capsys.readouterr().out
    assert cli.main(["pretrain-backbone", str(sample / "train"), f"--output={tmp_path / 'x'}"]) == 2
    assert 'pip install "aligndet[backbone]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 0.05 / 2),
        ({"method": "moco"}, 0.03 / 2),
        ({"optimizer": "adamw"}, 5e-4 / 2),
        ({"learning_rate": 0.7}, 0.7),
    ],
)
def test_the_learning_rate_is_that_of_256_images_in_proportion(
    settings: Any, rate: float, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"output": tmp_path / "run", "batch_size": 64, "accumulate": 2, "epochs": 32, **settings}
    module, _, asked = asked_of(aligndet.pretrain_backbone, monkeypatch, sample / "train", **given)
    assert recipe_of(module)[1:] == pytest.approx((rate, 1e-4))
    assert asked["steps"] == 3  # 32 passes over twelve images
