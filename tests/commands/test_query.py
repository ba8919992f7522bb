"""Query-based detectors from proposals to predictions, and out to transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import aligndet
from aligndet.data.images import read_image
from aligndet.detectors.build import DETECTORS, build_detector, weights_format
from aligndet.detectors.weights import save_detector
from aligndet.proposals.clusters import clusters_file, read_manifest, with_clusters
from aligndet.proposals.storage import read_proposals

OPTIONS = {"num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "decoder_ffn_dim": 64}
TRUNK: dict[str, Any] = {"trunk": "resnet18", "trunk_weights": "none"}
SMALL: dict[str, Any] = {
    **TRUNK,
    "fpn_channels": 32,
    "min_size": (64, 96),
    "max_size": 128,
    "batch_size": 2,
    "steps": 3,
    "workers": 0,
    "warmup_steps": 1,
    "log_every": 1,
    "accelerator": "cpu",
}
QUERY = sorted(name for name in DETECTORS if weights_format(name) == "transformers")
ALONE = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

model = AutoModelForObjectDetection.from_pretrained(sys.argv[1]).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
image = Image.open(sys.argv[2]).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(found,) = processor.post_process_object_detection(
    outputs, threshold=0.0, target_sizes=[(image.height, image.width)]
)
assert not [name for name in sys.modules if name.startswith("aligndet")]
print(json.dumps({key: value.tolist() for key, value in found.items()} | {"names": model.config.id2label}))
"""


@pytest.fixture(scope="module")
def clustered(sample: Path, proposals: Path) -> Path:
    if not clusters_file(proposals).is_file():
        aligndet.cluster(sample / "train", proposals=proposals, **TRUNK, min_size=64, max_size=96, clusters=4)
    return proposals


@pytest.fixture(scope="module")
def run(sample: Path, clustered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("query") / "pretrained"
    settings = {**SMALL, "detector": "detr", "options": {**OPTIONS, "num_clusters": 8, "embedding_dim": 16}}
    return aligndet.pretrain(sample / "train", proposals=clustered, output=output, **settings)


@pytest.fixture(scope="module")
def tuned(run: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("query") / "tuned"
    labels: dict[str, Any] = {"val_annotations": sample / "val.json"}
    return aligndet.finetune(sample / "train.json", output=output, init_from=run, **labels, **SMALL)


def alone(folder: Path, image: Path) -> dict[str, Any]:
    """What transformers predicts without this project."""
    command = [sys.executable, "-c", ALONE, str(folder), str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_clusters_lie_beside_their_proposals(sample: Path, clustered: Path) -> None:
    table = with_clusters(read_proposals(clustered), clustered)
    manifest = read_manifest(clusters_file(clustered))
    assert table.clusters is not None
    assert len(table.clusters) == len(table.boxes)
    assert set(table.clusters.tolist()) <= set(range(manifest["clusters"]))
    assert manifest["settings"]["min_size"] == 64
    settings: dict[str, Any] = {**TRUNK, "proposals": clustered, "min_size": 64, "max_size": 96}
    with pytest.raises(ValueError, match=r"clusters\.parquet: is there already"):
        aligndet.cluster(sample / "train", **settings)
    before = clusters_file(clustered).read_bytes()
    aligndet.cluster(sample / "train", **settings, clusters=4, overwrite=True)
    again = with_clusters(read_proposals(clustered), clustered)
    assert again.clusters is not None
    assert again.clusters.tolist() == table.clusters.tolist()  # the seed decides
    clusters_file(clustered).write_bytes(before)


def test_what_pretraining_does_without_clusters(sample: Path, proposals: Path, tmp_path: Path) -> None:
    copied = tmp_path / "proposals"
    copied.mkdir()
    for shard in proposals.glob("part-*.parquet"):
        (copied / shard.name).write_bytes(shard.read_bytes())
    settings: dict[str, Any] = {**SMALL, "proposals": copied, "detector": "detr", "steps": 1}
    with pytest.raises(ValueError, match=r"run `aligndet cluster IMAGES --proposals .*proposals` first"):
        aligndet.pretrain(sample / "train", output=tmp_path / "run", options=OPTIONS, **settings)
    options = {**OPTIONS, "objectness": True}
    aligndet.pretrain(sample / "train", output=tmp_path / "plain", options=options, **settings)
    assert (tmp_path / "plain" / "pretrained" / "model.safetensors").is_file()


def test_more_clusters_than_classes(sample: Path, clustered: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "detector": "detr", "options": {**OPTIONS, "num_clusters": 1}}
    with pytest.raises(ValueError, match=r"holds \d clusters, .* give --options.num_clusters \d"):
        aligndet.pretrain(sample / "train", proposals=clustered, output=tmp_path / "run", **settings)


def test_the_tuned_detector_is_measured_used_and_transformers_own(
    tuned: Path, sample: Path, tmp_path: Path
) -> None:
    manifest = json.loads((tuned / "model" / "manifest.json").read_text())
    assert manifest["format"] == "transformers"
    assert manifest["architecture"]["options"] == OPTIONS
    origins = manifest["initialised_from"]["modules"]
    assert origins["model.encoder.layers.0.self_attn.q_proj"] == "pre-trained"
    assert [module for module, origin in origins.items() if origin == "new"] == ["class_labels_classifier"]
    assert aligndet.evaluate(tuned, sample / "val.json").images == 4
    output = aligndet.predict(tuned, sample / "val", output=tmp_path / "predictions", score=0.0)
    assert len(json.loads((output / "predictions.json").read_text())["annotations"]) == 4 * 20
    found = alone(tuned / "model", next((sample / "val").glob("*.jpg")))
    assert list(found["names"].values()) == manifest["class_names"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("detr", "rt_detr_v2") else pytest.mark.slow) for n in QUERY]
)
def test_transformers_alone_predicts_the_same(name: str, sample: Path, tmp_path: Path) -> None:
    architecture: dict[str, Any] = {
        **{"detector": name, "trunk": "efficientnet_lite0", "fpn_channels": 64, "options": OPTIONS},
        **{"num_classes": 3, "min_size": 96, "max_size": 160},
    }
    detector = build_detector(**architecture).eval()
    names = ["apple", "pear", "plum"]
    save_detector(tmp_path, detector, {"architecture": architecture, "class_names": names})
    picture = tmp_path / "image.png"
    Image.open(next((sample / "val").glob("*.jpg"))).crop((0, 0, 128, 112)).save(picture)
    found = alone(tmp_path, picture)
    with torch.inference_mode():
        (ours,) = detector([read_image(picture).float() / 255])
    assert list(found["names"].values()) == names
    order = sorted(range(len(found["scores"])), key=lambda i: -found["scores"][i])
    scores = torch.tensor(found["scores"])[order]
    torch.testing.assert_close(ours["scores"], scores, rtol=0.0, atol=0.02)
    theirs = torch.tensor(found["boxes"])[order].clamp(min=0)
    theirs = torch.minimum(theirs, torch.tensor([128.0, 112.0, 128.0, 112.0]))
    close = (ours["boxes"][:, None] - theirs).abs().amax(2).amin(1)  # equal scores may change places
    assert close.median() < 1.0
