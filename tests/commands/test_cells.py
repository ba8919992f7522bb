"""What `aligndet compare` asks of other commands, what it does when they fail, and beside other processes.

Nothing is trained.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from aligndet.cli import main
from aligndet.commands import _cells as module
from aligndet.commands.compare import compare
from aligndet.commands.propose import propose
from aligndet.comparison import hold_out, labelled_subset
from aligndet.detectors.weights import save_weights
from aligndet.files import atomic_write, contents, locked
from aligndet.proposals.storage import read_proposals
from aligndet.reporting.runs import read_folders
from tests.commands.test_compare import RUN, SMALL, _compare

FEW: dict[str, Any] = {"fractions": (1.0,), "arms": ("scratch", "aligndet")}


def _in(folder: str, command: Any) -> list[Any]:
    """Calls for a cell, or for a search."""
    return [call for call in command.call_args_list if call.kwargs["output"].parent.name == folder]


def test_each_cell_has_its_own_seed_fold_and_start(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"arms": ("aligndet",), "fractions": (0.5,), "seeds": (3, 4), "folds": (1, 0)}
    _compare(sample, proposals, tmp_path, **changes, learning_rates=(1e-3, 1e-4))
    document = json.loads((sample / "train.json").read_text())
    cells = _in("cells", asked.finetune)
    assert [call.kwargs["seed"] for call in cells] == [3, 3, 4, 4]
    for call, fold in zip(cells, (1, 0, 1, 0), strict=True):
        assert json.loads(call.args[0].read_text()) == labelled_subset(document, 0.5, fold)
        assert call.kwargs["init_from"] == tmp_path / "pretrained" / f"aligndet_seed{call.kwargs['seed']}"
    pretrained = [(call.kwargs["seed"], call.kwargs["output"]) for call in asked.pretrain.call_args_list]
    assert pretrained == [(seed, tmp_path / "pretrained" / f"aligndet_seed{seed}") for seed in (3, 4)]
    searched = _in("search", asked.finetune)
    assert [(call.kwargs["seed"], call.kwargs["learning_rate"]) for call in searched] == [
        (3, 1e-3),
        (3, 1e-4),
    ]
    train, _ = hold_out(labelled_subset(document, 0.5, 1))
    assert all(json.loads(call.args[0].read_text()) == train for call in searched)


def test_cells_are_measured_as_they_are_trained(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    _compare(sample, proposals, tmp_path / "small", fractions=(1.0,), arms=("scratch",))
    large = {**RUN, "batch_size": 16, "accelerator": "auto"}
    _compare(sample, proposals, tmp_path / "large", fractions=(1.0,), arms=("scratch",), finetuning=large)
    given = [(call.kwargs["batch_size"], call.kwargs["device"]) for call in asked.evaluate.call_args_list]
    assert given == [(2, "cpu"), (8, "auto")]


@pytest.mark.parametrize("detectors", [("fcos",), ("fcos", "mask_rcnn")])
def test_proposals_are_made_once_where_none_are_given(
    detectors: tuple[str, ...],
    asked: SimpleNamespace,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy(images: Path, *, output: Path, names: Path | None, masks: bool) -> None:
        shutil.copytree(proposals, output, dirs_exist_ok=True)

    proposed = create_autospec(propose, side_effect=copy)
    monkeypatch.setattr(module, "propose", proposed)
    _compare(sample, None, tmp_path, **FEW, detectors=detectors)
    for call in proposed.call_args_list:
        assert call.args == (sample / "train",)
        masks = len(detectors) > 1
        assert call.kwargs == {"output": tmp_path / "proposals", "names": None, "masks": masks}
    assert proposed.call_count == len(detectors)
    assert all(call.kwargs["proposals"] == tmp_path / "proposals" for call in asked.pretrain.call_args_list)
    assert asked.pretrain.call_count == len(detectors)


@pytest.mark.usefixtures("asked")
def test_proposals_serve_later_calls_if_they_have_what_these_need(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = create_autospec(propose, side_effect=propose)
    monkeypatch.setattr(module, "propose", proposed)
    for output, detectors in (("with", ("fcos", "mask_rcnn")), ("without", ("fcos", "retinanet"))):
        _compare(sample, None, tmp_path / output, **FEW, detectors=detectors)
    _compare(sample, None, tmp_path / "with", **{**FEW, "seeds": (1,)}, detectors=("fcos", "retinanet"))
    assert proposed.call_args.kwargs["masks"]
    with pytest.raises(ValueError, match=r"proposals: these proposals have no masks; give another --output"):
        _compare(sample, None, tmp_path / "without", **FEW, detectors=("fcos", "mask_rcnn"))


@pytest.mark.usefixtures("asked")
def test_own_plots_are_no_images(sample: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(sample / part, tmp_path / part)
        shutil.copy(sample / f"{part}.json", tmp_path)
    output = tmp_path / "train" / "compared"
    asked: dict[str, Any] = {"val_annotations": tmp_path / "val.json", **SMALL, **FEW}
    compare(tmp_path / "train.json", output=output, **{**asked, "arms": ("scratch",)})
    shutil.copy(next((tmp_path / "train").glob("*.jpg")), output / "cells" / "plot.jpg")
    for seed in (0, 1):
        compare(tmp_path / "train.json", output=output, **{**asked, "seeds": (seed,)})
    assert set(read_proposals(output / "proposals").file_names) == {
        p.name for p in (sample / "train").iterdir()
    }


def test_of_equal_rates_the_smallest_is_taken_in_any_order(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    for rates in ((1e-3, 1e-4), (1e-4, 1e-3)):
        _compare(sample, proposals, tmp_path, **{**FEW, "arms": ("scratch",)}, learning_rates=rates)
    assert [call.kwargs["learning_rate"] for call in asked.finetune.call_args_list] == [1e-3, 1e-4, 1e-4]


def test_what_is_finished_can_be_read_before_the_rest_is(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    tune, several = asked.finetune.side_effect, ("fcos", "retinanet")
    asked.finetune.side_effect = [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        _compare(sample, proposals, tmp_path, **FEW, detectors=several)
    done = iter([tune, tune, tune, KeyboardInterrupt])

    def stopped(*args: Any, **settings: Any) -> None:
        if (step := next(done)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        step(*args, **settings)

    asked.finetune.side_effect = stopped
    with pytest.raises(KeyboardInterrupt):
        _compare(sample, proposals, tmp_path, **FEW, detectors=several)
    results = json.loads((tmp_path / "retinanet" / "results.json").read_text())
    assert ([cell["arm"] for cell in results["cells"]], results["planned"]) == (["scratch"], 2)
    assert "1 of 2 cells finished" in (tmp_path / "retinanet" / "table.md").read_text()
    assert (tmp_path / "table.md").read_text().count("## ") == 2
    with (tmp_path / "retinanet" / "results.csv").open() as file:
        assert [(row["arm"], row["AP"], row["seed"]) for row in csv.DictReader(file)] == [
            ("scratch", "0.1", "0")
        ]
    comparisons, _ = read_folders([tmp_path])
    assert [len(comparison.cells) for comparison in comparisons] == [2, 1]


def test_what_is_ahead_is_said(
    asked: SimpleNamespace,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 10_000, 60))  # every fine-tuning and pre-training takes a minute
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    best = {"scratch": 1e-4, "aligndet": 1e-3}

    def measure(model: Path, labels: Path, *, output: Path, **__: Any) -> None:
        arm, _, rest = model.parent.name.partition("_")
        output.write_text(json.dumps({"AP": 0.5 if rest.endswith(f"lr{best[arm]:g}") else 0.1}))

    asked.evaluate.side_effect = measure
    changes: dict[str, Any] = {**FEW, "seeds": (0, 1), "learning_rates": (1e-3, 1e-4)}
    _compare(sample, proposals, tmp_path, **changes)
    lines = capsys.readouterr().out.splitlines()
    assert "fcos: 4 cells; to be done: cells: 4, searches of a rate: 4, pre-trainings: 2" in lines
    assert [line for line in lines if line.startswith("==")] == [
        "== search of a learning rate: fcos, scratch_1_steps1_fold0_seed0_lr0.001",
        "== search of a learning rate, about 7 min left: fcos, scratch_1_steps1_fold0_seed0_lr0.0001",
        "== cell 1 of 4, about 6 min left: fcos, scratch_1_steps1_fold0_seed0_lr0.0001",
        "== pre-training: fcos, aligndet_seed0",
        "== search of a learning rate, about 5 min left: fcos, aligndet_1_steps1_fold0_seed0_lr0.001",
        "== search of a learning rate, about 5 min left: fcos, aligndet_1_steps1_fold0_seed0_lr0.0001",
        "== cell 2 of 4, about 4 min left: fcos, aligndet_1_steps1_fold0_seed0_lr0.001",
        "== cell 3 of 4, about 3 min left: fcos, scratch_1_steps1_fold0_seed1_lr0.0001",
        "== pre-training: fcos, aligndet_seed1",
        "== cell 4 of 4, about 2 min left: fcos, aligndet_1_steps1_fold0_seed1_lr0.001",
    ]
    _compare(sample, proposals, tmp_path, **changes)
    assert "cells: 0, searches of a rate: 0, pre-trainings: 0" in capsys.readouterr().out


def test_a_rate_that_diverges_loses(
    asked: SimpleNamespace,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune = asked.finetune.side_effect

    def diverge(*args: Any, learning_rate: float, output: Path, **settings: Any) -> None:
        if learning_rate > 0.1:
            (output / "checkpoints").mkdir(parents=True)
            raise FloatingPointError("the loss is not finite")
        tune(*args, output=output, **settings)

    asked.finetune.side_effect = diverge
    asked.evaluate.side_effect = lambda *_, output, **__: output.write_text('{"AP": 0.0}')
    changes: dict[str, Any] = {"arms": ("scratch",), "fractions": (1.0,), "learning_rates": (1.0, 1e-3)}
    output = _compare(sample, proposals, tmp_path, **changes)
    assert "learning rate 1 loses, as training diverges: the loss is not finite" in capsys.readouterr().out
    (cell,) = json.loads((output / "results.json").read_text())["cells"]
    assert cell["learning_rate"] == 1e-3
    assert "equally good" not in (output / "table.md").read_text()  # of one that diverged and AP 0
    lost = output / "search" / "scratch_1_steps1_fold0_seed0_lr1"
    assert json.loads((lost / "result.json").read_text())["AP"] is None
    assert not (lost / "checkpoints").exists()
    asked.finetune.reset_mock()
    _compare(sample, proposals, tmp_path, **changes)
    asked.finetune.assert_not_called()


@pytest.mark.parametrize("error", [FloatingPointError, ValueError])
def test_a_cell_that_fails_does_not_end_the_others(
    error: type[Exception],
    asked: SimpleNamespace,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pre = asked.pretrain.side_effect

    def fail(*args: Any, seed: int, **settings: Any) -> None:
        if seed == 0:
            raise error("no such luck")
        pre(*args, **settings)

    asked.pretrain.side_effect = fail
    rates = (1e-3,) if error is ValueError else (1e-3, 1e-4)
    seeds = (0, 1) if error is ValueError else (1, 0)  # the first one is that of the search
    changes: dict[str, Any] = {**FEW, "seeds": seeds, "learning_rates": rates}
    with pytest.raises(ValueError, match=r"^1 cells failed.*aligndet_1_steps1_fold0_seed0.*: no such luck$"):
        _compare(sample, proposals, tmp_path / "out", **changes)
    assert "== failed: fcos, aligndet_1_steps1_fold0_seed0" in capsys.readouterr().out
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert sorted((cell["arm"], cell["seed"]) for cell in cells) == [
        ("aligndet", 1),
        ("scratch", 0),
        ("scratch", 1),
    ]
    asked.pretrain.side_effect = pre
    _compare(sample, proposals, tmp_path / "out", **changes)
    assert "4 of 4 cells finished" in (tmp_path / "out" / "table.md").read_text()


def test_failures_end_in_an_error(asked: SimpleNamespace, sample: Path, tmp_path: Path) -> None:
    asked.finetune.side_effect = FloatingPointError("not finite")
    arguments = [f"--val-annotations={sample / 'val.json'}", f"--output={tmp_path / 'out'}"]
    options = ["--arms=scratch", "--fractions=1.0", "--seeds=0", "--trunk-weights=none"]
    assert main(["compare", str(sample / "train.json"), *arguments, *options]) == 2


@pytest.mark.parametrize("rates", [None, (1e-3, 1e-4)])
def test_draws_without_an_object_are_refused_before_training(
    rates: Any, asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    shutil.copytree(sample, tmp_path / "data")
    labels = tmp_path / "data" / "train.json"
    document = json.loads(labels.read_text())
    drawn = labelled_subset(document, 0.5, 1)
    empty = {image["id"] for image in (hold_out(drawn)[1] if rates else drawn)["images"]}
    kept = [note for note in document["annotations"] if note["image_id"] not in empty]
    labels.write_text(json.dumps({**document, "annotations": kept}))
    message = "train.json: fraction 0.5, fold 1: the 6 images show no object"
    if rates:
        message = "the 1 images that its search of learning rates takes show no object"
    with pytest.raises(ValueError, match=message):
        _compare(tmp_path / "data", proposals, tmp_path / "out", folds=(1, 0), learning_rates=rates)
    assert not (tmp_path / "out").exists()


def test_paths_are_the_same_however_they_are_spelt(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sample, tmp_path / "data")
    shutil.copytree(proposals, tmp_path / "proposals")
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "trunk.pth").write_text("")
    monkeypatch.chdir(tmp_path)
    given = []
    for root in (Path(), Path("..", tmp_path.name), tmp_path, tmp_path / "linked"):
        _compare(
            root / "data",
            root / "proposals",
            root / "out",
            **FEW,
            images=root / "data" / "train",
            val_images=root / "data" / "val",
            unlabelled=root / "data" / "train",
            trunk_weights=str(root / "trunk.pth"),
        )
        commands = (asked.finetune, asked.pretrain, asked.evaluate)
        given.append([call for command in commands for call in command.call_args_list])
        for command in commands:
            command.reset_mock()
        for folder in ("cells", "pretrained"):
            shutil.rmtree(tmp_path / "out" / folder)
    assert given[0] == given[1] == given[2] == given[3]
    assert len(given[0]) == 5


def test_what_helps_through_may_change(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    _compare(sample, proposals, tmp_path, **FEW)
    changed = {
        stage: {**SMALL[stage], "workers": 1, "log_every": 3} for stage in ("pretraining", "finetuning")
    }
    _compare(sample, proposals, tmp_path, **FEW, **changed)
    changed["finetuning"]["batch_size"] = 1
    with pytest.raises(ValueError, match="was started with finetuning="):
        _compare(sample, proposals, tmp_path, **FEW, **changed)


def test_other_proposals_are_another_comparison(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    copied, output = tmp_path / "proposals", tmp_path / "out"
    shutil.copytree(proposals, copied)
    _compare(sample, copied, output, fractions=(1.0,), arms=("scratch",))
    _compare(sample, copied, output, **FEW)
    propose(sample / "train", output=copied, workers=1, shard_size=5, rank="search", overwrite=True)
    _compare(sample, copied, output, **FEW)  # nothing is left to be pre-trained with them
    with pytest.raises(ValueError, match=r"was started with proposals_data='12 images with .* boxes"):
        _compare(sample, copied, output, **FEW, seeds=(1,))


def test_what_is_tuned_is_only_measured(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    atomic_write(
        tmp_path / "cells" / "aligndet_1_steps1_fold0_seed0_lr0.001" / "model" / "manifest.json", "{}"
    )
    atomic_write(tmp_path / "compare.json", "{}")
    _compare(sample, proposals, tmp_path, fractions=(1.0,), arms=("aligndet",))
    asked.pretrain.assert_not_called()
    asked.finetune.assert_not_called()
    asked.evaluate.assert_called_once()


def test_two_parts_may_start_together(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _compare(sample, proposals, tmp_path / "first", **FEW)

    def look(folder: Path) -> list[str]:
        shutil.copy(first / "compare.json", folder)  # by the other part, just now
        return contents(folder)

    monkeypatch.setattr("aligndet.commands._record.contents", look)
    (tmp_path / "out").mkdir()
    _compare(sample, proposals, tmp_path / "out", **FEW)


@pytest.mark.parametrize("made", ["cells_aligndet_1_steps1_fold0_seed0_lr0.001", "pretrained_aligndet_seed0"])
def test_what_another_part_has_made_meanwhile_is_not_made_again(
    made: str,
    asked: SimpleNamespace,
    sample: Path,
    proposals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, _, name = made.partition("_")

    @contextmanager
    def after_another(folder: Path, *, wait: bool) -> Iterator[None]:
        assert wait
        if folder.name == made:
            file = "result.json" if kind == "cells" else "pretrained/manifest.json"
            atomic_write(tmp_path / kind / name / file, '{"AP": 0.7}')
        with locked(folder, wait=wait):
            yield

    monkeypatch.setattr(module, "locked", after_another)
    _compare(sample, proposals, tmp_path, **FEW)
    asked.pretrain.assert_not_called()
    assert len(asked.finetune.call_args_list) == (1 if kind == "cells" else 2)
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 2


def test_results_are_read_and_written_by_one_part_at_a_time(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, waited = tmp_path / "results.json", []

    @contextmanager
    def after_another(folder: Path, *, wait: bool) -> Iterator[None]:
        waited.append(wait)
        if len(waited) == 2:  # the last time, another part has just finished a cell, and added seed 7
            for name in ("aligndet_1_steps1_fold0_seed0_lr0.001", "scratch_1_steps1_fold0_seed7_lr0.001"):
                atomic_write(tmp_path / "cells" / name / "result.json", "{}")
            (cell,) = json.loads(path.read_text())["cells"]
            atomic_write(path, json.dumps({"cells": [{**cell, "seed": 7}]}))
        with locked(folder, wait=wait):
            yield

    monkeypatch.setattr("aligndet.commands._results.locked", after_another)
    _compare(sample, proposals, tmp_path, **FEW, part="1/2")
    assert waited == [True, True]
    cells = json.loads(path.read_text())["cells"]
    assert {(cell["arm"], cell["seed"]) for cell in cells} == {
        ("scratch", 0),
        ("aligndet", 0),
        ("scratch", 7),
    }


def test_later_seeds_take_the_rates_of_the_first(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    """Not if nothing was begun."""
    changes: dict[str, Any] = {"arms": ("scratch",), "fractions": (0.5,), "learning_rates": (1e-3, 1e-4)}
    _compare(sample, proposals, tmp_path / "other", **changes, seeds=(4,))
    shutil.rmtree(tmp_path / "other" / "cells")
    shutil.rmtree(tmp_path / "other" / "search")
    output = _compare(sample, proposals, tmp_path / "out", **changes, seeds=(3,), folds=(1,)) / "search"
    _compare(sample, proposals, tmp_path / "out", **changes, seeds=(0,))
    assert {path.name.split("_lr")[0] for path in output.iterdir()} == {"scratch_0.5_steps1_fold1_seed3"}
    assert json.loads(output.with_name("compare.json").read_text())["first"] == [3, 1]
    _compare(sample, proposals, tmp_path / "other", **changes, seeds=(0,))
    cells = json.loads((tmp_path / "other" / "results.json").read_text())["cells"]
    assert [cell["seed"] for cell in cells] == [0]  # those of seed 4 were thrown away
    assert all("seed0" in path.name for path in (tmp_path / "other" / "search").iterdir())


def test_a_lost_search_is_a_beginning(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    asked.finetune.side_effect = FloatingPointError("not finite")
    changes: dict[str, Any] = {"arms": ("scratch",), "fractions": (1.0,), "learning_rates": (1e-3, 1e-4)}
    with pytest.raises(ValueError, match="1 cells failed"):
        _compare(sample, proposals, tmp_path, **changes)
    with pytest.raises(ValueError, match="was started with finetuning"):
        _compare(sample, proposals, tmp_path, **changes, finetuning={**SMALL["finetuning"], "clip": 0.1})


def test_results_that_are_there_stay(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    def results() -> tuple[int, int]:
        content = json.loads((tmp_path / "results.json").read_text())
        return len(content["cells"]), content["planned"]

    changes: dict[str, Any] = {"arms": ("scratch",), "fractions": (0.5,), "learning_rates": (1e-3, 1e-4)}
    _compare(sample, proposals, tmp_path, **changes, seeds=(0, 1))
    assert results() == (2, 2)
    asked.finetune.side_effect = ValueError("no such luck")
    with pytest.raises(ValueError, match="2 cells failed"):
        _compare(sample, proposals, tmp_path, **changes, seeds=(1, 2, 3))
    assert results() == (2, 4)
    changes["learning_rates"] = (1e-3, 1e-4, 1e-5)
    with pytest.raises(ValueError, match="2 cells failed"):
        _compare(sample, proposals, tmp_path, **changes, seeds=(0, 1))
    assert results() == (2, 2)


def test_a_pretraining_that_fails_is_not_tried_by_every_cell(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    asked.pretrain.side_effect = FloatingPointError("not finite")
    with pytest.raises(ValueError, match=r"3 cells failed.*not finite$"):
        _compare(sample, proposals, tmp_path, arms=("aligndet",), folds=(0, 1))
    asked.pretrain.assert_called_once()


def test_what_was_said_of_an_arm_gives_way(
    asked: SimpleNamespace, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    theirs = {"detector": "fcos", "trunk": "resnet18", "fpn_channels": 64, "fpn_norm": "none"}
    save_weights(tmp_path / "theirs", {}, {"architecture": theirs, "trunk": {"weights": "none"}})
    changes: dict[str, Any] = {"arms": ("scratch", f"from:{tmp_path / 'theirs'}"), "fractions": (1.0,)}
    output = _compare(sample, proposals, tmp_path / "out", **changes)
    path = output / "results.json"
    content = json.loads(path.read_text())
    (remark,) = content["remarks"]
    name = remark.partition(": ")[0]
    others = ["7 of 9 validation images are trained on.", "from-else-1: was pre-trained on 3."]
    path.write_text(json.dumps({**content, "remarks": [*others, f"{name}: was pre-trained on 2."]}))
    _compare(sample, proposals, output, **changes)
    assert json.loads(path.read_text())["remarks"] == [*others, remark]
