"""Query-based detectors from proposals to predictions, and out to transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import clip_boxes_to_image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import aligndet
from aligndet.data.images import read_image
from aligndet.detectors.build import DETECTORS, build_detector, build_pretrainable, family_of
from aligndet.detectors.trunks import build_timm_trunk
from aligndet.detectors.weights import save_detector
from aligndet.proposals.clusters import clusters_file, read_manifest, with_clusters
from aligndet.proposals.storage import read_proposals
from tests.commands.test_flow import SMALL as FLOW

OPTIONS = {"num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "decoder_ffn_dim": 64}
TRUNK: dict[str, Any] = {"trunk": "resnet18", "trunk_weights": "none"}
SMALL: dict[str, Any] = {**FLOW, "fpn_channels": 32}
QUERY = sorted(name for name in DETECTORS if family_of(name).weights_format == "transformers")
ALONE = """
import sys
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

model = AutoModelForObjectDetection.from_pretrained(sys.argv[1])
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
find = pipeline("object-detection", model=model, image_processor=processor)
found = find(sys.argv[2], threshold=0.0)
assert not [name for name in sys.modules if name.startswith("aligndet")]
print(len(found), *sorted({one["label"] for one in found}))
"""


@pytest.fixture(scope="module")
def clustered(sample: Path, proposals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.mktemp("clustered") / "proposals"  # other tests have none
    shutil.copytree(proposals, own)
    aligndet.cluster(sample / "train", proposals=own, **TRUNK, min_size=64, max_size=96, clusters=4)
    return own


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
    command = [sys.executable, "-c", ALONE, str(tuned / "model"), str(next((sample / "val").glob("*.jpg")))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *labels = done.stdout.splitlines()[-1].split()
    assert int(count) == OPTIONS["num_queries"]
    assert set(labels) <= set(manifest["class_names"])


def test_an_export_says_what_is_new(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="detr is a detector of transformers, there is no torchvision"):
        aligndet.export(run, output=tmp_path, num_classes=5, format="torchvision")
    output = aligndet.export(run, output=tmp_path / "exported", num_classes=5, min_size=96, max_size=128)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["format"] == "transformers"
    assert [m for m, origin in manifest["modules"].items() if origin == "new"] == ["class_labels_classifier"]
    model = AutoModelForObjectDetection.from_pretrained(output)
    assert model.config.num_labels == 5
    pretrained = load_file(run / "pretrained" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in pretrained.items())
    detector, _ = aligndet.load_detector(output)
    assert len(detector([torch.rand(3, 64, 64)])) == 1


def small_of(name: str) -> dict[str, Any]:
    """A trunk without weights, and few of all that there is a choice of."""
    few = {**OPTIONS, "group_detr": 2}
    options = {key: value for key, value in few.items() if key in family_of(name).shared_options()}
    return {"trunk": "test_vit" if name == "rf_detr" else "resnet18", "options": options}


def slow_but(*names: str) -> list[Any]:
    """All query-based detectors, a few of them in the fast tests."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in QUERY]


@pytest.mark.parametrize("name", slow_but("detr", "deformable_detr", "rt_detr_v2"))
def test_transformers_alone_predicts_the_same(name: str, sample: Path, tmp_path: Path) -> None:
    side = 128 if name == "rf_detr" else 96  # a multiple of what the detector needs
    architecture: dict[str, Any] = {
        **{"detector": name, **small_of(name), "fpn_channels": 64},
        **{"num_classes": 3, "min_size": side, "max_size": side},
    }
    weights = "none"
    if name != "rf_detr":
        architecture["trunk"], weights = "tf_efficientnet_lite0", "bundled"
    detector: Any = build_detector(**architecture, trunk_weights=weights).eval()
    names = ["apple", "pear", "plum"]
    save_detector(tmp_path, detector, {"architecture": architecture, "class_names": names})
    whole = read_image(next((sample / "val").glob("*.jpg")))
    picture = torch.cat([whole, whole], 2)[:, :112]  # not square, and larger
    pixels, _ = detector._batch([picture.float() / 255])
    prepared = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared, pixels, rtol=0.0, atol=0.01)  # theirs are whole numbers in between
    picture = torch.cat([whole, whole], 1)[:, :side, :side]  # resized by neither: nothing is rounded
    model = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        (ours,) = detector([picture.float() / 255])
        outputs = model(**processor(picture, return_tensors="pt"))
    sizes = [tuple(picture.shape[1:])]
    (theirs,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    assert list(model.config.id2label.values()) == names
    order = theirs["scores"].argsort(descending=True)
    torch.testing.assert_close(ours["scores"], theirs["scores"][order])
    boxes = clip_boxes_to_image(theirs["boxes"], sizes[0])
    nearest = (ours["boxes"][:, None] - boxes).abs().amax(2).amin(1)  # equal scores may change places
    assert nearest.max() < 0.01


@pytest.mark.parametrize("name", [p for p in slow_but("detr", "rt_detr") if p.values[0] != "rf_detr"])
def test_the_trunk_is_the_one_that_was_asked_for(name: str) -> None:
    """Batch norms are frozen, and the activations that timm has in them are still there."""
    trunk: dict[str, Any] = {"trunk": "tf_efficientnet_lite0", "trunk_weights": "bundled"}
    detector: Any = build_detector(name, num_classes=3, **trunk, fpn_channels=64, options=OPTIONS)
    _, body, _ = build_timm_trunk("tf_efficientnet_lite0", strides=(32,), weights="bundled")
    image = torch.rand(1, 3, 96, 128)
    with torch.inference_mode():
        ours, theirs = detector.backbone.body(image)[-1], body.eval()(image)[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("detr", {"colour": 1}, "detr has no option 'colour'; there are: .*num_queries"),
        ("detr", {"num_queries": "many"}, "transformers refuses Detr .*num_queries"),
        ("deformable_detr", {"decoder_attention_heads": 7}, "transformers refuses DeformableDetr"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    for build in (build_pretrainable, partial(build_detector, num_classes=2)):
        with pytest.raises(ValueError, match=message):
            build(name, trunk="resnet18", fpn_channels=64, options=options)


def test_a_whole_number_is_a_number() -> None:
    settings = {**small_of("rf_detr")["options"], "dropout": 0}
    detector: Any = build_detector("rf_detr", num_classes=2, trunk="test_vit", options=settings)
    assert detector.network.config.dropout == 0.0


def test_what_query_based_detectors_cannot_be_built_of() -> None:
    for settings, message in (
        ({"trunk": "vit_small_patch16_224"}, "images of one size"),
        ({"trunk": "resnet18", "fpn_norm": "batch"}, "no feature pyramid"),
        ({"detector": "rf_detr", "trunk": "resnet18"}, "RF-DETR has a plain ViT, such as vit_small_patch14"),
        ({"detector": "rf_detr", "trunk": "vit_small_patch14_reg4_dinov2"}, "is no plain ViT .*reg_token"),
        (
            {"detector": "rf_detr", "trunk": "vit_base_patch16_gap_224"},
            "is no plain ViT .*position_embeddings",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_detector(**{"detector": "deformable_detr", "num_classes": 2, **settings})  # type: ignore[arg-type]


def test_small_images_are_enlarged_until_there_are_places_for_all_queries() -> None:
    detector: Any = build_detector("rt_detr", num_classes=2, trunk="resnet18", fpn_channels=32, min_size=64)
    pixels, _ = detector.eval()._batch([torch.rand(3, 40, 640)])
    assert pixels.shape[2:] == (128, 128)  # 16 * 16 + 8 * 8 + 4 * 4 places for 300 queries; 96 have 189
    assert detector.processor.size == {"height": 128, "width": 128}


@pytest.mark.parametrize("name", slow_but("detr", "d_fine"))
def test_losses_by_kind_are_transformers_loss(name: str) -> None:
    small: dict[str, Any] = {**small_of(name), "fpn_channels": 64, "resize_in_training": False}
    detector: Any = build_detector(name, num_classes=3, **small)
    labels = [{"boxes": torch.tensor([[0.5, 0.4, 0.3, 0.3]]), "class_labels": torch.tensor([2])}]
    outputs = detector.train().run([torch.rand(3, 96, 128)], labels)
    losses = detector.losses(outputs, labels)
    assert len(losses) >= 3
    if name in ("conditional_detr", "deformable_detr"):  # whose authors weigh classes by 2, transformers by 1
        losses["ce"] = losses["ce"] / 2
    as_theirs = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(as_theirs, outputs.loss)


@pytest.mark.parametrize("name", slow_but("detr", "rt_detr_v2"))
def test_padding_changes_nothing(name: str) -> None:
    detector: Any = build_detector(
        name, num_classes=3, fpn_channels=64, min_size=96, max_size=160, **small_of(name)
    )
    wide, high = torch.rand(3, 96, 160), torch.rand(3, 128, 96)
    with torch.inference_mode():  # query by query: untrained scores are all alike, and no order
        alone, together = (detector.eval().run(images) for images in ([wide], [wide, high]))
    scores, boxes = ((getattr(alone, n)[0] - getattr(together, n)[0]).abs() for n in ("logits", "pred_boxes"))
    assert scores.max() < 0.2
    assert boxes.median() < 2 / 160


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "rt_detr_v2", "rf_detr"])
def test_transformers_own_trainer_goes_on(name: str, sample: Path, clustered: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "detector": name, **small_of(name)}
    settings["options"]["num_clusters"] = 8
    run = aligndet.pretrain(sample / "train", proposals=clustered, output=tmp_path / "run", **settings)
    folder = aligndet.export(run, output=tmp_path / "exported", num_classes=8, min_size=96, max_size=128)
    script = Path(__file__).with_name("finetune_with_transformers.py")
    command = [sys.executable, str(script), str(folder), str(sample), str(tmp_path / "trained")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = (float(loss) for loss in done.stdout.splitlines()[-1].split())
    assert last < first


@pytest.mark.parametrize(("name", "square"), [("rt_detr_v2", True), ("conditional_detr", False)])
def test_no_bound_of_the_long_side_shrinks_squares(
    name: str,
    square: bool,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trained on smaller squares than it predicts on, a detector would see all objects larger there."""
    seen: list[Any] = []
    for command in ("pretrain", "finetune"):
        module = sys.modules[f"aligndet.commands.{command}"]
        monkeypatch.setattr(module, "fit", lambda module, dataset, **_: seen.append(dataset))
    settings: dict[str, Any] = {**SMALL, "detector": name, "min_size": (96, 96), "max_size": 96}
    own: dict[str, Any] = {**settings, "options": {"objectness": True}}
    aligndet.pretrain(sample / "train", proposals=proposals, output=tmp_path / "a", **own)
    aligndet.finetune(sample / "train.json", output=tmp_path / "b", **settings)
    first, second = (dataset[0, 0] for dataset in seen)
    for image in (first.online.image, first.momentum.image, second.image):
        assert (min(image.shape[1:]) == 96) == square
        assert (max(image.shape[1:]) == 96) != square


def test_large_scale_jitter_is_for_images_that_keep_their_size(sample: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "detector": "rt_detr", "augmentation": "lsj"}
    with pytest.raises(ValueError, match="rt_detr stretches images to one size"):
        aligndet.finetune(sample / "train.json", output=tmp_path / "a", **settings)
