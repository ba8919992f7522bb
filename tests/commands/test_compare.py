"""A comparison in small: run, resumed, refused, and made in parts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest

from aligndet.commands import _cells as module
from aligndet.commands._arms import detector_settings
from aligndet.commands.compare import compare
from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.data.formats import read_labelled
from aligndet.detectors.weights import save_weights
from aligndet.proposals.clusters import clusters_file
from aligndet.proposals.storage import write_shard
from aligndet.proposals.table import ImageProposals
from aligndet.reporting.runs import read_folders

RUN: dict[str, Any] = {"max_size": 96, "batch_size": 2, "workers": 0, "accelerator": "cpu"}
SMALL: dict[str, Any] = {
    "fractions": (0.5, 1.0),
    "seeds": (0,),
    "steps": (1,),
    "trunk": "resnet18",
    "trunk_weights": "none",
    "fpn_channels": 64,
    "pretraining": {"steps": 1, "min_size": [64, 64], **RUN},
    "finetuning": {"min_size": [64, 64], **RUN},
}


def _compare(sample: Path, proposals: Path | None, output: Path, **changes: Any) -> Path:
    return compare(
        sample / "train.json",
        output=output,
        proposals=proposals,
        **{"val_annotations": sample / "val.json", **SMALL, **changes},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("scratch", "magic")}, "unknown arm 'magic'"),
        ({"arms": ("scratch", "trunk-only")}, "same as 'scratch'"),
        ({"finetuning": {"seed": 3}}, "finetuning: 'seed' cannot be set"),
        ({"finetuning": {"schedule": "4x"}}, "finetuning: 'schedule' cannot be set"),  # the steps are given
        ({"finetuning": {"devices": 2}}, "finetuning: 'devices' cannot be set"),
        ({"pretraining": {"stepz": 3}}, "pretraining: 'stepz' cannot be set"),
        ({"finetuning": {"optimizer": "SGD"}}, r"finetuning: --optimizer: .*'sgd'.* Got value: SGD"),
        ({"finetuning": {"batch_size": 0}}, "finetuning: --batch-size must be at least 1"),
        ({"pretraining": {"train_trunk": "no way"}}, "pretraining: --train-trunk: Expected a bool"),
        ({"pretraining": {"min_size": 640}}, "pretraining: --min-size: Expected a tuple with 2 elements"),
        ({"fractions": (0.5, 0.51)}, r"train\.json: fractions 0\.5 and 0\.51 are both \d+ images"),
        ({"learning_rates": ()}, "learning_rates must be different positive"),
        ({"part": "3/2"}, "part must be I/N"),
        ({"unlabelled": Path("nowhere")}, "nowhere: no such folder of images"),
        ({"unlabelled": Path("s3://bucket/images")}, "is an address, where a local file or folder is wanted"),
        ({"detectors": ("fcos", "fcos")}, "detectors must be different names"),
        ({"detectors": ("fcos", "retinanet"), "finetuning": {"fcos": {"stepz": 3}}}, "'stepz' cannot be set"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    sample: Path, proposals: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _compare(sample, proposals, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_labels_without_masks_are_refused_before_anything_is_trained(
    sample: Path, proposals: Path, tmp_path: Path
) -> None:
    shutil.copytree(sample, tmp_path / "data")
    document = json.loads((sample / "val.json").read_text())
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "data" / "val.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"val\.json: .*segmentation"):
        _compare(tmp_path / "data", proposals, tmp_path / "out", detectors=("fcos", "mask_rcnn"))
    assert not (tmp_path / "out").exists()


def test_weights_of_another_detector_are_refused(sample: Path, proposals: Path, tmp_path: Path) -> None:
    theirs = {"detector": "faster_rcnn", "trunk": "resnet18", "fpn_channels": 64, "fpn_norm": "batch"}
    save_weights(tmp_path / "theirs", {}, {"architecture": theirs})
    arms = ("scratch", f"from:{tmp_path / 'theirs'}")
    given: dict[str, Any] = {"detectors": ("faster_rcnn",), "arms": arms}
    for settings, difference in (
        ({}, "fpn_norm 'batch', the other arms 'none'"),
        (
            {"fpn_norm": "batch", "options": {"box_convolutions": 4}},
            "box_convolutions None, the other arms 4",
        ),
    ):
        pretraining = {**SMALL["pretraining"], **settings}
        with pytest.raises(ValueError, match=f"theirs: has {difference}: not comparable"):
            _compare(sample, proposals, tmp_path / "out", pretraining=pretraining, **given)


def test_all_arms_have_the_same_detector() -> None:
    options = {"box_convolutions": 4, "rpn_positives": True}
    settings = detector_settings("faster_rcnn", {"fpn_norm": "batch", "options": options}, {"batch_size": 2})
    assert settings == {"fpn_norm": "batch", "options": {"box_convolutions": 4}}
    assert detector_settings("fcos", {}, {}) == {"options": None}


def test_a_folder_of_something_else_is_left_alone(sample: Path, proposals: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'mine.txt' and no comparison"):
        _compare(sample, proposals, tmp_path)


def test_a_folder_of_several_comparisons_says_which(sample: Path, proposals: Path, tmp_path: Path) -> None:
    for detector in ("fcos", "retinanet"):
        (tmp_path / detector).mkdir()
        (tmp_path / detector / "compare.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds the comparisons of fcos, retinanet; .*/fcos$"):
        _compare(sample, proposals, tmp_path)


def test_arms_differ_in_their_start_alone(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    """No training: what each cell is asked to do, and which learning rate each arm chooses."""
    best = {"scratch": 1e-4, "aligndet": 1e-3}

    def measure(*_: Any, output: Path, **__: Any) -> None:
        arm, rate = output.parent.name.split("_")[0], asked.finetune.call_args.kwargs["learning_rate"]
        output.write_text(json.dumps({"AP": 0.5 if rate == best[arm] else 0.1}))

    asked.evaluate.side_effect = measure
    output = _compare(sample, proposals, tmp_path / "out", fractions=(1.0,), learning_rates=(1e-3, 1e-4))
    calls: dict[str, dict[str, dict[str, Any]]] = {"search": {}, "cells": {}}
    for call in asked.finetune.call_args_list:
        folder = call.kwargs["output"]
        calls[folder.parent.name][folder.name] = {"labels": call.args[0], **call.kwargs}
    scratch, ours = (
        next(settings for name, settings in calls["cells"].items() if name.startswith(arm)) for arm in best
    )
    assert len(calls["cells"]) == 2
    differ = {name for name in scratch if scratch[name] != ours[name]}
    assert differ == {"output", "init_from", "learning_rate"}
    assert (scratch["learning_rate"], ours["learning_rate"]) == (1e-4, 1e-3)
    assert scratch["init_from"] is None
    assert ours["init_from"] == asked.pretrain.call_args.kwargs["output"]
    assert scratch["weight_decay"] == 0.05  # a number: by default that of pre-trained heads is another one
    assert len(calls["search"]) == 4
    whole = set(read_labelled(sample / "train.json").file_names)
    for call in asked.evaluate.call_args_list:
        model, labels = call.args
        if model.parent.parent.name == "search":  # the validation images have no part in the choice
            held_out = {entry["file_name"] for entry in json.loads(labels.read_text())["images"]}
            trained = json.loads(calls["search"][model.parent.name]["labels"].read_text())["images"]
            assert held_out | {entry["file_name"] for entry in trained} == whole
            assert held_out.isdisjoint(entry["file_name"] for entry in trained)
            assert call.kwargs["images"] == sample / "train"
        else:
            assert labels == sample / "val.json"
    found = json.loads((output / "results.json").read_text())["cells"]
    assert {(c["arm"], c["learning_rate"]) for c in found} == set(best.items())
    assert {c["arm"]: c["search_AP"] for c in found} == {"scratch": [0.5, 0.1], "aligndet": [0.1, 0.5]}
    assert "aligndet: 0.001, the largest learning rate tried, was best" in (output / "table.md").read_text()
    # seeds that are added later have the rates that the first has chosen
    given: dict[str, Any] = {"fractions": (1.0,), "learning_rates": (1e-3, 1e-4)}
    best["scratch"] = 1e-3
    _compare(sample, proposals, output, **given, seeds=(3,))
    assert len(list((output / "search").iterdir())) == 4
    found = json.loads((output / "results.json").read_text())["cells"]
    assert {c["learning_rate"] for c in found if c["arm"] == "scratch"} == {1e-4}
    assert {c["seed"] for c in found} == {0, 3}


@pytest.mark.parametrize("figures", [{"AP": 0.3}, {"AP": 0.3, "mask_AP": 0.25}])
def test_the_table_for_spreadsheets_has_masks_where_they_were_measured(
    figures: dict[str, float], asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    asked.evaluate.side_effect = lambda *_, output, **__: output.write_text(json.dumps(figures))
    output = _compare(sample, proposals, tmp_path / "out", arms=("scratch",), fractions=(1.0,))
    with (output / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {name: float(row[name]) for name in row if name.endswith("AP")} == figures


@pytest.mark.usefixtures("asked")
def test_a_comparison_stays_with_its_labels(sample: Path, proposals: Path, tmp_path: Path) -> None:
    shutil.copytree(sample, tmp_path / "data")
    labels = tmp_path / "data" / "val.json"
    kept = json.loads(labels.read_text())
    arms: dict[str, Any] = {"arms": ("scratch",), "fractions": (0.5,)}
    _compare(tmp_path / "data", proposals, tmp_path / "out", **arms)
    _compare(tmp_path / "data", proposals, tmp_path / "out", **arms, seeds=(0, 1))
    labels.write_text(json.dumps(kept | {"annotations": kept["annotations"][1:]}))
    with pytest.raises(ValueError, match="was started with data="):
        _compare(tmp_path / "data", proposals, tmp_path / "out", **arms)
    labels.write_text(json.dumps(kept | {"annotations": []}))
    with pytest.raises(ValueError, match=r"val\.json: has no object in any of its"):
        _compare(tmp_path / "data", proposals, tmp_path / "other", **arms)


def test_images_that_are_not_there_are_no_labels(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    shutil.copytree(sample, tmp_path / "data")
    for path in sorted((tmp_path / "data" / "train").iterdir())[:6]:
        path.unlink()
    output = _compare(
        tmp_path / "data", proposals, tmp_path / "out", arms=("scratch",), fractions=(0.5,), seeds=(0,)
    )
    (cell,) = json.loads((output / "results.json").read_text())["cells"]
    assert cell["labels"] == 3
    images = json.loads(asked.finetune.call_args.args[0].read_text())["images"]
    assert all((tmp_path / "data" / "train" / image["file_name"]).is_file() for image in images)


@pytest.mark.parametrize("folder", [".", "train", "val"])
def test_what_is_measured_is_not_learnt_from(
    folder: str, asked: SimpleNamespace, sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "linked").symlink_to(sample)  # the same images under another name
    unlabelled = tmp_path / "linked" / folder
    proposals, boxes = tmp_path / "part-00000.parquet", np.ones((1, 4), np.float32)
    images = [str(path.relative_to(unlabelled)) for path in sorted(unlabelled.rglob("*.jpg"))]
    write_shard(proposals, [ImageProposals(name, 9, 9, boxes) for name in images])
    changes = {"unlabelled": unlabelled, "fractions": (1.0,), "arms": ("aligndet",)}
    if folder == "val":
        with pytest.raises(ValueError, match="all of its images are measured on"):
            _compare(sample, proposals, tmp_path / "out", **changes)
        return
    _compare(sample, proposals, tmp_path / "out", **changes)
    names = asked.pretrain.call_args.kwargs["names"]
    if folder == "train":
        assert names is None
    else:
        assert names.read_text().split() == [f"train/{i.name}" for i in sorted((sample / "train").iterdir())]


@pytest.mark.slow
def test_resumed_refused_and_in_parts(
    sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _compare(sample, proposals, tmp_path / "whole")
    results = json.loads((whole / "results.json").read_text())
    assert [(c["arm"], c["labels"]) for c in results["cells"]] == [
        ("scratch", 6),
        ("aligndet", 6),
        ("scratch", 12),
        ("aligndet", 12),
    ]
    assert not any("details" in cell["figures"] for cell in results["cells"])
    assert all("details" in json.loads(path.read_text()) for path in whole.glob("cells/*/result.json"))
    assert len(list((whole / "pretrained").iterdir())) == 1  # shared by the fractions
    assert not list(whole.glob("cells/*/checkpoints"))  # of what is finished, the weights are enough
    with (whole / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["scratch", "aligndet"] * 2
    assert "4 of 4 cells finished" in (whole / "table.md").read_text()

    removed = whole / "cells" / "aligndet_0.5_steps1_fold0_seed0_lr0.001"
    shutil.rmtree(removed)
    tuned = create_autospec(finetune, side_effect=finetune)
    pretrained = create_autospec(pretrain)
    monkeypatch.setattr(module, "finetune", tuned)
    monkeypatch.setattr(module, "pretrain", pretrained)
    _compare(sample, proposals, whole)
    assert [call.kwargs["output"] for call in tuned.call_args_list] == [removed]
    pretrained.assert_not_called()
    assert json.loads((whole / "results.json").read_text())["cells"] == results["cells"]
    with pytest.raises(ValueError, match="started with fpn_channels=64, now 32"):
        _compare(sample, proposals, whole, fpn_channels=32)
    monkeypatch.undo()

    parts = tmp_path / "parts"
    _compare(sample, proposals, parts, part="1/2")
    assert "2 of 4 cells finished" in (parts / "table.md").read_text()
    _compare(sample, proposals, parts, part="2/2")
    for name in ("table.md", "results.csv"):
        assert (parts / name).read_text() == (whole / name).read_text()


@pytest.mark.slow
def test_several_detectors_with_settings_of_their_own(sample: Path, proposals: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"detectors": ("fcos", "retinanet"), "fractions": (1.0,)}
    sizes = {**SMALL["finetuning"], "min_size": "64,64", "retinanet": {"batch_size": 1}}
    output = _compare(sample, proposals, tmp_path, **given, finetuning=sizes)
    for detector, batch_size in (("fcos", 2), ("retinanet", 1)):
        assert f"## {detector}" in (output / "table.md").read_text()
        for run in (output / detector / "cells").iterdir():
            settings = json.loads((run / "run.json").read_text())["settings"]
            assert (settings["detector"], settings["batch_size"]) == (detector, batch_size)
            assert settings["min_size"] == [64, 64]
    comparisons, _ = read_folders([output])
    assert [comparison.name for comparison in comparisons] == ["fcos", "retinanet"]

    _compare(sample, proposals, output / "fcos", arms=("scratch",), fractions=(0.5,), finetuning=sizes)
    cells = json.loads((output / "fcos" / "results.json").read_text())["cells"]
    assert sorted(cell["labels"] for cell in cells) == [6, 12, 12]  # those of the earlier call are kept
    with pytest.raises(ValueError, match="holds the comparison of one detector"):
        _compare(sample, proposals, output / "fcos", **given)


@pytest.mark.slow
def test_each_arm_has_its_own_rate_and_other_weights_take_part(
    sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(model: Path, labels: Path, *, output: Path, **settings: Any) -> None:
        evaluate(model, labels, output=output, **settings)
        arm, rate = output.parent.name.partition("_")[0], output.parent.name.rpartition("_lr")[2]
        ap = 0.5 if rate == {"scratch": "0.0001"}.get(arm, "0.001") else 0.1
        output.write_text(json.dumps({**json.loads(output.read_text()), "AP": ap}))

    monkeypatch.setattr(module, "evaluate", measure)
    first = _compare(sample, proposals, tmp_path / "first", arms=("aligndet",), fractions=(1.0,))
    source = first / "pretrained" / "aligndet_seed0"
    output = _compare(
        sample,
        proposals,
        tmp_path / "second",
        arms=("scratch", f"from:{source}"),
        fractions=(1.0,),
        learning_rates=(1e-3, 1e-4),
    )
    searched = list((output / "search").iterdir())
    assert len(searched) == 4
    held_out = json.loads((output / "labels" / "1_fold0.held_out.json").read_text())
    trained = json.loads((output / "labels" / "1_fold0.search.json").read_text())
    assert not {i["id"] for i in held_out["images"]} & {i["id"] for i in trained["images"]}
    cells = json.loads((output / "results.json").read_text())["cells"]
    assert [(cell["arm"] == "scratch", cell["learning_rate"]) for cell in cells] == [
        (True, 1e-4),
        (False, 1e-3),
    ]
    assert len(list((output / "cells").iterdir())) == 2
    assert not (output / "pretrained").exists()
    with pytest.raises(ValueError, match="has trunk 'resnet18', the other arms 'resnet34'"):
        _compare(sample, proposals, tmp_path / "third", arms=(f"from:{source}",), trunk="resnet34")


@pytest.mark.slow
def test_query_based_detectors_get_clusters_and_the_same_queries(
    sample: Path, proposals: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "proposals"
    copied.mkdir()
    for shard in proposals.glob("part-*.parquet"):
        shutil.copy(shard, copied)
    changes: dict[str, Any] = {"detectors": ("detr",), "fractions": (1.0,), "arms": ("scratch", "aligndet")}
    options = {"num_queries": 10, "decoder_layers": 2, "encoder_layers": 1}
    changes["pretraining"] = {**SMALL["pretraining"], "options": {**options, "embedding_dim": 16}}
    output = _compare(sample, copied, tmp_path / "out", **changes)
    assert clusters_file(copied).is_file()
    manifests = [json.loads(path.read_text()) for path in output.glob("cells/*/model/manifest.json")]
    assert len(manifests) == 2
    assert all(manifest["architecture"]["options"] == options for manifest in manifests)


@pytest.mark.parametrize(
    ("arm", "weights"),
    [
        ("aligndet", {}),
        ("boxes-only", {"contrast_weight": 0.0}),
        ("contrast-only", {"box_weight": 0.0}),
        ("trunk-only", {}),
    ],
)
def test_what_an_arm_is_pretrained_with_and_takes(
    arm: str, weights: Any, asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    pretraining = {**SMALL["pretraining"], "train_trunk": arm == "trunk-only"}
    changes: dict[str, Any] = {"arms": (arm,), "fractions": (1.0,), "pretraining": pretraining}
    _compare(sample, proposals, tmp_path / "out", **changes)
    given, taken = asked.pretrain.call_args.kwargs, asked.finetune.call_args.kwargs
    assert {name: value for name, value in given.items() if name.endswith("_weight")} == weights
    assert taken["init_from"] == given["output"]
    assert taken["init"] == (("trunk",) if arm == "trunk-only" else ("trunk", "neck", "rpn", "head"))
