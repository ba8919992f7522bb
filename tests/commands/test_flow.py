"""From images without labels to pictures with boxes, and what stops on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import supervision as sv
import torch
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file

import aligndet
from aligndet.checkpoints import read_checkpoint
from aligndet.data.sources import ImageSource
from aligndet.evaluation.coco import CocoEvaluator, CocoResult
from aligndet.files import locked
from aligndet.proposals.storage import read_shard, write_shard
from aligndet.proposals.table import ProposalTable
from aligndet.reporting.runs import read_curves
from aligndet.trainer import fit

SMALL: dict[str, Any] = {
    "trunk": "resnet18",
    "trunk_weights": "none",
    "fpn_channels": 64,
    "min_size": (64, 96),
    "max_size": 128,
    "batch_size": 2,
    "steps": 3,
    "workers": 0,
    "warmup_steps": 1,
    "log_every": 1,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def run(sample: Path, proposals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "pretrained"
    return aligndet.pretrain(sample / "train", proposals=proposals, output=output, **SMALL)


@pytest.fixture(scope="module")
def tuned(run: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "tuned"
    return aligndet.finetune(
        sample / "train.json",
        val_annotations=sample / "val.json",
        output=output,
        init_from=run,
        ema=0.5,
        validate_every=2,
        **{**SMALL, "steps": 3, "workers": 1},
    )


def test_what_a_pretraining_run_leaves(run: Path) -> None:
    assert {"README.txt", "run.json", "checkpoints", "logs", "pretrained"} <= {p.name for p in run.iterdir()}
    wanted = {"loss/total", "loss/contrast", "boxes/assigned", "proposals/in_both_views", "embedding_spread"}
    assert wanted | {"speed/images_per_second", "speed/data_wait"} <= set(read_curves(run / "logs"))
    state = load_file(run / "pretrained" / "model.safetensors")
    assert not [name for name in state if "projection" in name or "cls_logits" in name]


def losses(run: Path) -> list[float]:
    return list(read_curves(run / "logs")["loss/total"].values())


def test_the_seed_decides(run: Path, sample: Path, proposals: Path, tmp_path: Path) -> None:
    # in half precision, too, a run clips its gradients
    settings_of: dict[str, dict[str, Any]] = {
        "again": {},
        "other": {"seed": 1},
        "last": {"channels_last": True},
        "half": {"channels_last": True, "precision": "bf16-mixed"},
    }
    again, other, last, half = (
        aligndet.pretrain(
            sample / "train", proposals=proposals, output=tmp_path / name, **{**SMALL, **settings}
        )
        for name, settings in settings_of.items()
    )
    weights = [load_file(folder / "pretrained" / "model.safetensors") for folder in (run, again, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    assert losses(run) == losses(again) != losses(other)
    assert losses(last) == pytest.approx(losses(run), rel=1e-3)
    assert losses(half) == pytest.approx(losses(run), rel=0.03)
    assert losses(half) != pytest.approx(losses(run), rel=1e-6)


def test_an_export_says_what_is_new(run: Path, tmp_path: Path) -> None:
    output = aligndet.export(run, output=tmp_path / "exported", num_classes=5)
    manifest = json.loads((output / "manifest.json").read_text())
    assert [m for m, origin in manifest["modules"].items() if origin == "new"] == [
        "head.classification_head.cls_logits"
    ]
    pretrained = load_file(run / "pretrained" / "model.safetensors")
    exported = load_file(output / "model.safetensors")
    for name, value in pretrained.items():
        assert torch.equal(exported[name], value)
    detector, _ = aligndet.load_detector(output)
    assert len(detector([torch.rand(3, 64, 64)])) == 1


def test_the_tuned_detector_is_measured_and_used(tuned: Path, sample: Path, tmp_path: Path) -> None:
    result = aligndet.evaluate(tuned, sample / "val.json", output=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 4
    assert figures["AP"] == pytest.approx(result.figures["AP"])
    assert set(figures["AP_by_class"]) == {
        "brick",
        "leaf",
        "stone",
        "fur",
        "tissue",
        "page",
        "retina",
        "coin",
    }
    output = aligndet.predict(tuned, sample / "val", output=tmp_path / "predictions", score=0.0)
    document = json.loads((output / "predictions.json").read_text())
    assert len(document["images"]) == 4
    assert len(list((output / "pictures").glob("*.jpg"))) == 4
    names = {category["id"] for category in document["categories"]}
    assert all(a["category_id"] in names and 0 <= a["score"] <= 1 for a in document["annotations"])
    with pytest.raises(ValueError, match=r"holds predictions\.json already"):
        aligndet.predict(tuned, sample / "val", output=tmp_path / "predictions")


def test_the_best_checkpoint_is_the_result(tuned: Path) -> None:
    assert (tuned / "checkpoints" / "best.ckpt").is_file()
    assert (tuned / "checkpoints" / "last.ckpt").is_file()
    manifest = json.loads((tuned / "model" / "manifest.json").read_text())
    assert manifest["initialised_from"]["modules"]["backbone.fpn.inner_blocks.0.0"] == "pre-trained"
    assert manifest["class_names"][0] == "brick"


def test_the_average_survives_a_second_call(run: Path, sample: Path, tmp_path: Path) -> None:
    def weights(**settings: Any) -> dict[str, torch.Tensor]:
        output = aligndet.finetune(
            sample / "train.json", output=tmp_path / "tuned", init_from=run, ema=0.9, **SMALL, **settings
        )
        return load_file(output / "model" / "model.safetensors")

    first, second = weights(), weights(resume=True)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_labels_that_have_changed_are_no_labels_to_resume_with(sample: Path, tmp_path: Path) -> None:
    labels = tmp_path / "train.json"
    document = json.loads((sample / "train.json").read_text())
    settings: dict[str, Any] = {**SMALL, "images": sample / "train", "output": tmp_path / "tuned", "steps": 1}
    labels.write_text(json.dumps(document))
    aligndet.finetune(labels, **settings)
    document["annotations"][0]["bbox"][2] += 1.0
    labels.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"began with \d+ images with \d+ boxes of 8 classes \(finger"):
        aligndet.finetune(labels, **settings, resume=True)
    document["annotations"][0]["bbox"][2] -= 1.0
    document["categories"].append({"id": 99, "name": "shell"})
    labels.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"there are .* boxes of 9 classes"):
        aligndet.finetune(labels, **settings, resume=True)


def test_proposals_that_have_changed_are_no_proposals_to_resume_with(sample: Path, tmp_path: Path) -> None:
    proposals = tmp_path / "proposals"
    aligndet.propose(sample / "train", output=proposals, workers=1, max_proposals=9)
    settings: dict[str, Any] = {**SMALL, "proposals": proposals, "output": tmp_path / "run", "steps": 1}
    aligndet.pretrain(sample / "train", **settings)
    aligndet.pretrain(sample / "train", **settings, resume=True)
    aligndet.propose(sample / "train", output=proposals, workers=1, max_proposals=8, overwrite=True)
    with pytest.raises(ValueError, match=r"began with 12 images with \d+ proposals"):
        aligndet.pretrain(sample / "train", **settings, resume=True)


def test_trunk_weights_are_no_new_ones(sample: Path, tmp_path: Path) -> None:
    lite = {"trunk": "tf_efficientnet_lite0", "trunk_weights": "bundled"}
    output = aligndet.finetune(
        sample / "train.json", output=tmp_path / "tuned", **{**SMALL, **lite, "steps": 1}
    )
    start = json.loads((output / "model" / "manifest.json").read_text())["initialised_from"]
    assert start["trunk_weights"] == "bundled"
    assert {name for name, origin in start["modules"].items() if origin == "pre-trained"} == {"backbone.body"}


def test_a_fine_tuned_run_is_not_exported_again(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tuned: is a whole detector already"):
        aligndet.export(tuned, output=tmp_path / "out", num_classes=8)


def test_the_last_step_is_validated(tuned: Path) -> None:
    assert list(read_curves(tuned / "logs")["val/AP"]) == [1, 2]


def test_the_architecture_is_that_of_the_weights(run: Path, sample: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "output": tmp_path / "tuned", "init_from": run, "steps": 1}
    for changed, message in (
        ({"detector": "retinanet"}, r"pretrained: these weights are of --detector fcos, not retinanet"),
        ({"fpn_channels": 96}, r"of --fpn-channels 64, not 96"),
    ):
        with pytest.raises(ValueError, match=message):
            aligndet.finetune(sample / "train.json", overwrite=True, **{**settings, **changed})
    for name in ("trunk", "fpn_channels"):
        del settings[name]
    options = {"nms_thresh": 0.4}
    first = aligndet.finetune(sample / "train.json", **settings, options=options, overwrite=True)
    settings |= {"output": str(tmp_path / "second"), "init_from": str(first)}  # strings will do
    second = aligndet.finetune(str(sample / "train.json"), **settings)  # type: ignore[arg-type]
    detector, manifest = aligndet.load_detector(str(second))  # type: ignore[arg-type]
    assert manifest["architecture"]["options"] == options
    assert detector.nms_thresh == 0.4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"temperature": 0.02}, "--temperature must be at least 0.025"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"lr_drops": (8.0,)}, "--lr-drops must be shares of the run"),
        ({"max_proposals": 0}, "--max-proposals must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ({"options": {"embedding_dim": "wide"}}, "fcos: .*embedding_dim"),
        ({"detector": "yolo"}, "unknown detector 'yolo'; there are: fcos"),
        ({"trunk": "resnet5000"}, "unknown trunk 'resnet5000'"),
        ({"trunk_weights": "nothing.pth"}, r"nothing\.pth: no such file"),
        ({"trunk_weights": "bundled"}, "no bundled weights for trunk 'resnet18'"),
        ({"fpn_channels": 32}, "multiple of 32"),
        ({"min_size": (96, 64)}, "min_size"),
        ({"steps": 0}, "steps must be at least 1"),
        pytest.param(
            {"accelerator": "gpu"},
            "gpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_values_that_make_no_sense_are_named(
    setting: dict[str, Any], message: str, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    settings = {**SMALL, "proposals": proposals, "output": tmp_path / "run", **setting}
    with pytest.raises(ValueError, match=message):
        aligndet.pretrain(sample / "train", **settings)


@pytest.mark.parametrize(
    ("detector", "choice", "top"),
    [("fcos", "default", False), ("fcos", "top", True), ("detr", "default", True), ("detr", "random", False)],
)
def test_the_choice_of_proposals(
    detector: str, choice: Any, top: bool, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def stop(*args: Any, top_proposals: bool, **settings: Any) -> None:
        chosen.append(top_proposals)
        raise InterruptedError

    monkeypatch.setattr("aligndet.commands.pretrain.TwoViewDataset", stop)
    monkeypatch.setattr("aligndet.commands.pretrain.with_clusters", lambda table, *_: table)
    settings: dict[str, Any] = {**SMALL, "detector": detector, "proposal_choice": choice}
    with pytest.raises(InterruptedError):
        aligndet.pretrain(tmp_path, proposals=proposals, output=tmp_path / "run", **settings)
    assert chosen == [top]


def test_images_that_are_left_out_are_not_seen(
    sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in (sample / "train").glob("*.jpg"))
    listed, measured = tmp_path / "names.txt", tmp_path / "val.txt"
    listed.write_text("\n".join(names[1:]))
    measured.write_text("\n".join(names[3:]))
    seen = []

    def stop(source: ImageSource, table: ProposalTable, **_: Any) -> None:
        seen.append(list(table.file_names))
        raise InterruptedError

    monkeypatch.setattr("aligndet.commands.pretrain.TwoViewDataset", stop)
    for lists in ({"names": listed}, {"exclude": measured}, {"names": listed, "exclude": measured}):
        settings: dict[str, Any] = {**SMALL, "proposals": proposals, **lists}
        with pytest.raises(InterruptedError):
            aligndet.pretrain(sample / "train", output=tmp_path / "run", **settings)
    assert seen == [names[1:], names[:3], names[1:3]]


def test_labels_of_other_formats_all_the_way(sample: Path, tmp_path: Path) -> None:
    folders: dict[str, Path] = {}
    for part in ("train", "val"):
        theirs = sv.DetectionDataset.from_coco(str(sample / part), str(sample / f"{part}.json"))
        voc, yolo = tmp_path / f"voc_{part}", tmp_path / f"yolo_{part}"
        theirs.as_pascal_voc(str(voc), str(voc))
        theirs.as_yolo(str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml"))
        folders |= {f"voc_{part}": voc, f"yolo_{part}": yolo}
    tuned = aligndet.finetune(folders["voc_train"], output=tmp_path / "tuned", **{**SMALL, "steps": 1})
    manifest = json.loads((tuned / "model" / "manifest.json").read_text())
    assert sorted(manifest["class_names"]) == manifest["class_names"]
    results = [aligndet.evaluate(tuned, folders[name]) for name in ("voc_val", "yolo_val")]
    for result in results:  # though the orders of classes differ
        assert result.images == 4
        assert list(result.ap_by_class) == manifest["class_names"]
    recalls = [result.figures["AR100"] for result in results]
    assert recalls[0] == pytest.approx(recalls[1], abs=0.02)


def test_masks_all_the_way(sample: Path, proposals: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 1, "detector": "mask_rcnn"}
    run = aligndet.pretrain(sample / "train", proposals=proposals, output=tmp_path / "run", **settings)
    assert any("loss/" in name and "mask" in name for name in read_curves(run / "logs"))
    labels: dict[str, Any] = {"val_annotations": sample / "val.json", "init_from": run}
    settings["options"] = {"box_detections_per_img": 5, "rpn_post_nms_top_n_test": 50}
    tuned = aligndet.finetune(sample / "train.json", output=tmp_path / "tuned", **labels, **settings)
    assert "loss/loss_mask" in read_curves(tuned / "logs")
    result = aligndet.evaluate(tuned, sample / "val.json")
    assert 0 <= result.figures["mask_AP"] <= 1
    assert result.mask_ap_by_class is not None


def test_a_mask_head_needs_masks(sample: Path, proposals: Path, tmp_path: Path) -> None:
    shards = [read_shard(path) for path in sorted(proposals.glob("part-*.parquet"))]
    (tmp_path / "plain").mkdir()
    write_shard(tmp_path / "plain" / "part-00000.parquet", [row for rows in shards for row in rows])
    settings = {**SMALL, "steps": 1, "detector": "mask_rcnn", "proposals": tmp_path / "plain"}
    with pytest.raises(ValueError, match=r"plain: its proposals have no masks.*`aligndet propose --masks`"):
        aligndet.pretrain(sample / "train", output=tmp_path / "run", **settings)
    settings["options"] = {"pretrain_mask": False}
    assert aligndet.pretrain(sample / "train", output=tmp_path / "without", **settings).is_dir()
    document = json.loads((sample / "train.json").read_text())
    del document["annotations"][4]["segmentation"]
    (tmp_path / "train.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"train\.json: annotation 5 has no mask"):
        aligndet.finetune(
            tmp_path / "train.json",
            images=sample / "train",
            output=tmp_path / "tuned",
            **{**SMALL, "detector": "mask_rcnn"},
        )


def test_an_output_that_is_taken(run: Path, sample: Path, proposals: Path, tmp_path: Path) -> None:
    again = {"proposals": proposals, "output": run, **SMALL}
    with pytest.raises(ValueError, match="is not empty; give --resume"):
        aligndet.pretrain(sample / "train", **again)
    with pytest.raises(ValueError, match=r"learning_rate=None, now 0\.1"):
        aligndet.pretrain(sample / "train", **again, learning_rate=0.1, resume=True)
    older = tmp_path / "older"
    (older / "checkpoints").mkdir(parents=True)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["lr_decay"] = "step"
    (older / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was started with lr_decay, which this version does not have"):
        aligndet.pretrain(sample / "train", **{**again, "output": older}, resume=True)
    with locked(run), pytest.raises(ValueError, match="in use"):
        aligndet.pretrain(sample / "train", **again, resume=True)
    thesis = tmp_path / "work" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="not overwritten"):
        aligndet.pretrain(sample / "train", **{**again, "output": thesis.parent}, overwrite=True)
    assert thesis.is_file()


def test_details_of_an_evaluation(
    tuned: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    result = aligndet.evaluate(tuned, sample / "val.json", output=output, details=True, score=0.0)
    details = json.loads(output.read_text())["details"]
    assert result.details is not None
    document = json.loads((sample / "val.json").read_text())
    assert sum(row["objects"] for row in details["classes"].values()) == len(document["annotations"])
    assert sum(map(sum, details["confusion"]["counts"][:-1])) == len(document["annotations"])
    assert set(details["errors"]) == {"class", "location", "both", "duplicate", "background", "missed"}
    assert "boxes from score 0" in capsys.readouterr().out
    drawn = {path.stem for path in (tmp_path / "result_files").iterdir()}
    assert drawn == {f"details_{kind}" for kind in ("precision_recall", "f1", "errors", "confusion1")}


def test_a_report_looks_into_a_pretraining(
    run: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    given: dict[str, Any] = {"images": sample / "val", "annotations": sample / "train.json", "count": 2}
    aligndet.report((run,), output=page, **given)
    drawn = {path.stem for path in (tmp_path / "page_files").iterdir()}
    sides = {f"runs_centers{image}_{side}" for image in (1, 2) for side in (1, 2)}
    assert sides | {"runs_proposals1_1", "runs_proposals2_1"} <= drawn
    assert {"runs_features_class", "runs_features_level"} <= drawn
    text = page.read_text()
    assert "Contrast features of labelled boxes (t-SNE), by pyramid level" in text
    assert "Centres of predicted boxes before fine-tuning" in text
    assert 'alt="00000.jpg, pre-trained"' in text
    stale = tmp_path / "stale"
    shutil.copytree(run, stale, ignore=shutil.ignore_patterns("last.ckpt"))
    aligndet.report((stale,), output=tmp_path / "other.html", annotations=sample / "train.json")
    assert "last.ckpt: is gone; the projection head is nowhere else" in capsys.readouterr().out
    shutil.copy(run / "pretrained" / "model.safetensors", stale / "checkpoints" / "last.ckpt")
    aligndet.report((stale,), output=tmp_path / "third.html", annotations=sample / "train.json")
    assert "last.ckpt: is no checkpoint of" in capsys.readouterr().out


def test_broken_images_do_not_end_a_run(
    sample: Path, proposals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (sample / "train").glob("*.jpg"):
        (images / path.name).write_bytes(path.read_bytes())
    (images / "00003.jpg").write_bytes(b"")
    (images / "00004.jpg").unlink()
    aligndet.pretrain(images, proposals=proposals, output=tmp_path / "run", **{**SMALL, "steps": 6})
    printed = capsys.readouterr().out
    assert "00003.jpg: is empty" in printed
    assert "00004.jpg: no such image" in printed
    aligndet.finetune(
        sample / "train.json",
        images=images,
        val_annotations=sample / "train.json",
        val_images=images,
        output=tmp_path / "tuned",
        **{**SMALL, "steps": 6},
    )
    printed = capsys.readouterr().out
    assert "skipped in validation" in printed
    assert "image 00004.jpg: not in" in printed


def test_options_of_the_detector_are_kept_with_it(sample: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 1, "output": tmp_path / "run", "detector": "faster_rcnn"}
    tuned = aligndet.finetune(sample / "train.json", **settings, options={"box_detections_per_img": 3})
    detector: Any = aligndet.load_detector(tuned)[0]
    assert detector.roi_heads.detections_per_img == 3
    with pytest.raises(ValueError, match=r"no option 'colour'; there are: .*box_nms_thresh"):
        aligndet.finetune(sample / "train.json", **settings, options={"colour": 1}, overwrite=True)


def test_proposals_of_other_images(proposals: Path, sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of its 12 images"):
        aligndet.pretrain(tmp_path, proposals=proposals, output=tmp_path / "run", **SMALL)


def test_weights_of_another_detector(tuned: Path, run: Path, sample: Path, tmp_path: Path) -> None:
    few = json.loads((sample / "train.json").read_text())
    few["annotations"] = [a for a in few["annotations"] if a["category_id"] == 1]
    few["categories"] = few["categories"][:1]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(few))
    with pytest.raises(ValueError, match="another class count"):
        aligndet.finetune(path, images=sample / "train", output=tmp_path / "a", init_from=tuned, **SMALL)
    with pytest.raises(ValueError, match="not those of the detector"):
        aligndet.evaluate(tuned, path, images=sample / "train")
    with pytest.raises(ValueError, match="not a whole detector"):
        aligndet.evaluate(run, path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="broken weights"):
        aligndet.load_detector(tmp_path / "b")


def test_weights_that_run_code_are_refused(tmp_path: Path, sample: Path, proposals: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth: not readable as weights"):
        aligndet.pretrain(
            sample / "train",
            proposals=proposals,
            output=tmp_path / "run",
            **{**SMALL, "trunk_weights": str(tmp_path / "bomb.pth")},
        )
    assert not (tmp_path / "exploded").exists()


def asked_of(command: Any, monkeypatch: pytest.MonkeyPatch, *inputs: Path, **settings: Any) -> Any:
    """The module, data and settings that a command trains with; no training."""
    trained = create_autospec(fit, return_value=False)
    monkeypatch.setattr(f"aligndet.commands.{command.__name__}.fit", trained)
    command(*inputs, trunk="resnet18", trunk_weights="none", **settings)
    return *trained.call_args.args, trained.call_args.kwargs


def recipe_of(module: Any) -> tuple[str, float, float]:
    optimizer = module.configure_optimizers()["optimizer"]
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    return type(optimizer).__name__, max(rates), max(decays)


def sizes_of(sample: Path) -> list[tuple[int, int]]:
    images = json.loads((sample / "train.json").read_text())["images"]
    return [(image["width"], image["height"]) for image in images]


@pytest.mark.parametrize(
    ("settings", "synchronised"),
    [({}, False), ({"fpn_norm": "batch"}, True), ({"detector": "rt_detr", "trunk_weights": "none"}, True)],
)
def test_norms_that_learn_count_over_all_processes(
    settings: dict[str, Any],
    synchronised: bool,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = settings | {"trunk": "resnet18", "trunk_weights": "none"}
    trained = create_autospec(fit, return_value=False)
    monkeypatch.setattr("aligndet.commands.finetune.fit", trained)
    monkeypatch.setattr("aligndet.commands.pretrain.fit", trained)
    aligndet.finetune(sample / "train.json", output=tmp_path / "tuned", **given)
    if "detector" in given:
        given["options"] = {"objectness": True}
    aligndet.pretrain(sample / "train", proposals=proposals, output=tmp_path / "pretrained", **given)
    assert [call.kwargs["sync_batch_norm"] for call in trained.call_args_list] == [synchronised] * 2
    for call in trained.call_args_list:
        assert call.args[1].tall.tolist() == [height > width for width, height in sizes_of(sample)]


DETR: dict[str, Any] = {"detector": "detr", "options": {"num_queries": 10}}


@pytest.mark.parametrize(
    ("settings", "expected", "clip"),
    [
        ({}, ("AdamW", 5e-4, 0.05), 10.0),
        ({"optimizer": "sgd"}, ("SGD", 1e-2, 1e-4), 10.0),
        ({**DETR, "options": {"objectness": True}}, ("AdamW", 1e-4, 1e-4), 0.1),
        ({"learning_rate": 0.3, "weight_decay": 0.2, "clip": None}, ("AdamW", 0.3, 0.2), None),
    ],
)
def test_the_recipe_of_pretraining(
    settings: Any,
    expected: Any,
    clip: Any,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = {"epochs": 3, "batch_size": 2, "accumulate": 2}
    given = {"proposals": proposals, "output": tmp_path / "run", **size, **settings}
    module, _, asked = asked_of(aligndet.pretrain, monkeypatch, sample / "train", **given)
    assert recipe_of(module) == pytest.approx(expected)
    assert (asked["steps"], asked["clip"]) == (9, clip)
    group = module.configure_optimizers()["optimizer"].param_groups[0]
    assert group["lr"] / group["initial_lr"] == pytest.approx(1 / 3)  # 2 steps of warm-up, a quarter of all


@pytest.mark.parametrize(
    ("settings", "pretrained", "expected", "steps"),
    [
        ({}, False, ("AdamW", 1e-3, 0.05), 96_000),
        ({}, True, ("AdamW", 1.5e-3, 0.025), 96_000),
        ({"init": ("trunk", "neck")}, True, ("AdamW", 1e-3, 0.05), 96_000),
        ({"optimizer": "sgd", "schedule": "50e"}, True, ("SGD", 1.5e-2, 5e-5), 300),
        (DETR, False, ("AdamW", 1e-4, 1e-4), 96_000),
    ],
)
def test_the_recipe_of_fine_tuning(
    settings: Any,
    pretrained: bool,
    expected: Any,
    steps: int,
    run: Path,
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"output": tmp_path / "tuned", "batch_size": 2, "init_from": run if pretrained else None}
    given |= settings
    module, data, asked = asked_of(aligndet.finetune, monkeypatch, sample / "train.json", **given)
    assert recipe_of(module) == pytest.approx(expected)
    assert asked["steps"] == steps
    # the loader resizes, as the detector does where it predicts
    is_query = "detector" in settings
    detector = module.detector
    assert (not detector.resize_in_training) if is_query else detector.transform._skip_resize
    assert data.augment.transforms[0].transforms[0].antialias == is_query


def test_what_is_asked_for_reaches_the_algorithm(
    sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"temperature": 0.1, "decay": 0.9, "contrast_weight": 2.0, "box_weight": 0.5, "seed": 7}
    settings |= {"gather_keys": True, "train_trunk": True}
    given = {"proposals": proposals, "output": tmp_path / "run", **settings}
    module, _, asked = asked_of(aligndet.pretrain, monkeypatch, sample / "train", **given)
    assert {name: getattr(module, name) for name in settings} == settings
    assert asked["sync_batch_norm"]  # of a trunk that is trained


def test_what_is_asked_for_reaches_the_data_of_pretraining(
    sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names.txt").write_text("00007.jpg\n00002.jpg\n")
    given: dict[str, Any] = {"proposals": proposals, "names": tmp_path / "names.txt", "max_proposals": 3}
    given |= {
        "output": tmp_path / "run",
        "strict": True,
        "lr_schedule": "step",
        "lr_drops": (0.5, 0.8),
        "warmup_steps": 7,
        "steps": 40,
    }
    module, dataset, asked = asked_of(aligndet.pretrain, monkeypatch, sample / "train", **given)
    assert dataset.table.file_names == ["00002.jpg", "00007.jpg"]
    assert asked["data"].startswith("2 images with ")
    assert (dataset.max_proposals, dataset.strict) == (3, True)
    assert module.schedule_settings == ("step", 40, 7, (0.5, 0.8))


def test_what_is_asked_for_reaches_fine_tuning(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"learning_rate": 0.3, "weight_decay": 0.2, "lr_schedule": "step", "steps": 40}
    given |= {"lr_drops": (0.5, 0.8), "augmentation": "ssd"}
    given |= {"warmup_steps": 7, "trunk_factor": 0.5, "seed": 7, "patience": 3, "strict": True}
    given |= {"val_annotations": sample / "val.json", "output": tmp_path / "tuned"}
    module, dataset, asked = asked_of(aligndet.finetune, monkeypatch, sample / "train.json", **given)
    assert module.optimizer_settings == ("adamw", 0.3, 0.2)
    assert module.schedule_settings == ("step", 40, 7, (0.5, 0.8))
    assert (module.trunk_factor, module.seed) == (0.5, 7)
    assert dataset.strict
    assert any("ZoomOut" in str(part) for part in dataset.augment.modules())
    assert asked["validation"].strict
    (stopping,) = (callback for callback in asked["callbacks"] if isinstance(callback, EarlyStopping))
    assert (stopping.patience, stopping.mode, stopping.monitor) == (3, "max", "val/AP")


def test_a_run_without_patience_left_trains_no_further(sample: Path, tmp_path: Path) -> None:
    """AP stays at 0: the second validation of six is the last."""
    given: dict[str, Any] = {**SMALL, "steps": 6, "val_annotations": sample / "val.json", "validate_every": 1}
    given |= {"output": tmp_path / "tuned", "patience": 1, "checkpoint_every": 1, "learning_rate": 1e-9}
    aligndet.finetune(sample / "train.json", **given)
    last, model = tmp_path / "tuned" / "checkpoints" / "last.ckpt", tmp_path / "tuned" / "model"
    assert read_checkpoint(last)["global_step"] == 2
    weights = load_file(model / "model.safetensors")
    shutil.rmtree(model)
    aligndet.finetune(sample / "train.json", **given, resume=True)
    assert read_checkpoint(last)["global_step"] == 2
    again = load_file(model / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("batch_norm", "fpn_norm", "frozen", "synchronised"),
    [
        ("frozen", "none", True, False),
        ("frozen", "batch", True, True),
        ("trained", "batch", False, False),
        ("sync", "none", False, True),
    ],
)
def test_batch_norms_of_fine_tuning(
    batch_norm: str,
    fpn_norm: str,
    frozen: bool,
    synchronised: bool,
    sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"batch_norm": batch_norm, "fpn_norm": fpn_norm, "output": tmp_path / "tuned"}
    module, _, asked = asked_of(aligndet.finetune, monkeypatch, sample / "train.json", **given)
    assert asked["sync_batch_norm"] == synchronised
    trunk, pyramid = (
        [layer.training for layer in part.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
        for part in (module.detector.backbone.body, module.detector.backbone.fpn)
    )
    assert set(trunk) == {not frozen}
    assert set(pyramid) == ({True} if fpn_norm == "batch" else set())


def test_parts_that_are_not_asked_for_start_anew(
    run: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"init": ("neck",), "init_from": run, "seed": 1, "output": tmp_path / "tuned"}
    module, _, _ = asked_of(aligndet.finetune, monkeypatch, sample / "train.json", **given)
    pretrained, found = load_file(run / "pretrained" / "model.safetensors"), module.detector.state_dict()
    kernels = {name for name, value in pretrained.items() if value.ndim > 1}
    taken = {name for name in kernels if torch.equal(found[name], pretrained[name])}
    assert taken == {name for name in kernels if name.startswith("backbone.fpn.")} != set()


@pytest.mark.parametrize("part", ["train", "val"])
def test_strict_labels(part: str, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((sample / f"{part}.json").read_text())
    document["annotations"][0]["bbox"] = [-20, 4, 60, 20]
    (tmp_path / f"{part}.json").write_text(json.dumps(document))
    labels = {name: sample / f"{name}.json" for name in ("train", "val")}
    labels[part] = tmp_path / f"{part}.json"
    given: dict[str, Any] = {"images": sample / "train", "val_images": sample / "val"}
    given |= {"val_annotations": labels["val"], "output": tmp_path / "tuned"}
    asked_of(aligndet.finetune, monkeypatch, labels["train"], **given)
    with pytest.raises(ValueError, match=rf"{part}\.json: annotation \d+ of .*: clipped the box"):
        asked_of(aligndet.finetune, monkeypatch, labels["train"], strict=True, overwrite=True, **given)


def test_crowds_are_not_learnt_but_validated_with(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((sample / "train.json").read_text())
    crowd = document["annotations"][0]
    crowd["iscrowd"] = 1
    labels = tmp_path / "train.json"
    labels.write_text(json.dumps(document))
    given: dict[str, Any] = {
        "images": sample / "train",
        "val_annotations": labels,
        "val_images": sample / "train",
    }
    _, dataset, asked = asked_of(aligndet.finetune, monkeypatch, labels, output=tmp_path / "tuned", **given)
    assert "12 of 12 validation images are trained on" in capsys.readouterr().out
    index = [image["id"] for image in document["images"]].index(crowd["image_id"])
    learnt, validated = (part.images[index][1]["iscrowd"].tolist() for part in (dataset, asked["validation"]))
    assert (sum(learnt), sum(validated)) == (0, 1)
    assert len(validated) == len(learnt) + 1


def test_the_best_weights_are_the_result(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = iter((0.3, 0.5, 0.4))
    monkeypatch.setattr(CocoEvaluator, "compute", lambda _: CocoResult({"AP": next(figures)}, {}, 4))
    settings = {**SMALL, "val_annotations": sample / "val.json", "validate_every": 1}
    tuned = aligndet.finetune(sample / "train.json", output=tmp_path / "tuned", **settings)
    model, same = load_file(tuned / "model" / "model.safetensors"), {}
    for name in ("best", "last"):
        found = torch.load(tuned / "checkpoints" / f"{name}.ckpt", weights_only=True)
        state = found["state_dict"]
        same[found["global_step"]] = all(torch.equal(v, state[f"detector.{k}"]) for k, v in model.items())
    assert same == {2: True, 3: False}
    for resumed in (False, True):
        if resumed:
            aligndet.finetune(sample / "train.json", output=tuned, **settings, resume=True)
        manifest = json.loads((tuned / "model" / "manifest.json").read_text())
        assert manifest["best"] == {"step": 2, "AP": pytest.approx(0.5)}
        printed = capsys.readouterr().out
        assert "best AP 50.0 at step 2 of 3" in printed
        assert ("tuned: is complete already" in printed) == resumed


def test_labels_without_an_object_are_refused(sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text())
    for objects in ([], [{**a, "iscrowd": 1} for a in document["annotations"]]):
        (tmp_path / "none.json").write_text(json.dumps({**document, "annotations": objects}))
        with pytest.raises(ValueError, match=r"none\.json: has no object"):
            aligndet.finetune(
                tmp_path / "none.json", images=sample / "train", output=tmp_path / "tuned", **SMALL
            )
        with pytest.raises(ValueError, match=r"none\.json: has no object"):
            aligndet.finetune(
                sample / "train.json",
                val_annotations=tmp_path / "none.json",
                val_images=sample / "train",
                output=tmp_path / "tuned",
                **SMALL,
            )
