"""`aligndet compare`: what pre-training is worth on labels of your own, at equal budgets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence, Set
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from aligndet.commands._arms import WEIGHTS, check_arms, check_trunks, read_arms, remarks_on_images
from aligndet.commands._cells import Bench
from aligndet.commands._results import write_results, write_tables
from aligndet.commands._runs import MAY_CHANGE
from aligndet.commands._settings import provenance
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.comparison import Cell, hold_out, labelled_subset, part_of, plan
from aligndet.data.coco import CocoDataset, build_dataset, check_objects, image_files
from aligndet.data.formats import load_labelled, read_labelled
from aligndet.data.labelled import remark_on_shared_images
from aligndet.data.sources import ImageSource
from aligndet.data.splits import with_images
from aligndet.detectors.build import DETECTORS, family_of, training_defaults
from aligndet.files import accepts_strings, atomic_write, contents, locked, read_json
from aligndet.launch import data_summary
from aligndet.proposals.storage import read_proposals

_OURS = {"images", "annotations", "proposals", "output", "init_from", "init", "val_annotations", "val_images"}
_OURS |= {"names", "resume", "overwrite", "seed", "detector", "trunk", "trunk_weights", "fpn_channels"}
_OURS |= {"devices", "nodes", "strategy"}  # a cell is of one process: others would start the comparison anew
_SEARCHED = re.compile(r"_fold(?P<fold>\d+)_seed(?P<seed>\d+)_")  # in the names of cells
_PLANNED = {"learning_rate", "steps", "schedule", "validate_every", "patience"}  # cells are not validated
_SHARED = {"annotations", "images", "val_annotations", "val_images", "unlabelled", "proposals", "detector"}
_SHARED |= {"trunk", "trunk_weights", "fpn_channels", "pretraining", "finetuning"}


@accepts_strings
def compare(
    annotations: Path,
    *,
    val_annotations: Path,
    output: Path,
    images: Path | None = None,
    val_images: Path | None = None,
    unlabelled: Path | None = None,
    proposals: Path | None = None,
    arms: tuple[str, ...] = ("scratch", "aligndet"),
    fractions: tuple[float, ...] = (0.05, 0.2, 1.0),
    folds: tuple[int, ...] = (0,),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: tuple[int, ...] = (1000,),
    learning_rates: tuple[float, ...] | None = None,
    detectors: tuple[str, ...] = ("fcos",),
    trunk: str = "resnet50",
    trunk_weights: str = "default",
    fpn_channels: int = 256,
    pretraining: dict[str, Any] | None = None,
    finetuning: dict[str, Any] | None = None,
    part: str = "1/1",
) -> Path:
    """Compares ways to start fine-tuning at equal budgets, seeds and labels.

    Every cell is a fine-tuning of its own in output/cells; the same command goes on where it was stopped, and
    more arms, fractions, folds, seeds, steps or learning rates can be added later. The results are written
    after every cell, so that a comparison can be looked at, also by `aligndet report`, while it runs. A cell
    that fails is named, and the others go on. The last weights are measured, none are chosen by the
    validation images.

    Args:
        annotations: Of the training images: COCO JSON, PASCAL VOC or YOLO (file or folder).
        val_annotations: Of the images that all cells are measured on, likewise.
        output: Folder of the comparison.
        images: Folder of the training images; by default looked for.
        val_images: Folder of the validation images.
        unlabelled: Folder of the images for pre-training; by default that of the training images. Those of
            the validation are left out.
        proposals: Of these images; by default made by `aligndet propose`. Clusters, for query-based
            detectors, are made by `aligndet cluster` if there are none beside them.
        arms: "scratch" (neck and heads random, the trunk with its weights), "aligndet", "boxes-only" (no
            contrast), "contrast-only" (no box losses), "trunk-only" (the trunk of the pre-training; the
            same as scratch unless --pretraining.train_trunk true), and "from:PATH" (a run or an export; other
            weights there later are another arm). Its trunk must have the same --trunk-weights; whether it
            has seen validation images is said, as far as it is known.
        fractions: Shares of the labelled images, above 0 and up to 1 (0.05 is 5 %), nested within a fold.
        folds: Numbers of the draws of labelled images; all labels (1.0) are one fold.
        seeds: Of pre-training and fine-tuning; pairs share seed and fold. The test takes seeds for
            independent, and of fewer than six cannot reach 5 %.
        steps: Budgets of fine-tuning.
        learning_rates: Of fine-tuning; by default that of `aligndet finetune` from random heads. Of several,
            each arm takes its own best, for each fraction and budget: on the first seed and fold that the
            comparison was begun with, a fifth of the labels is held out and chooses; the validation images
            have no part in it. With few labels this choice is noisy. A rate at which training diverges loses.
            The table says where the best lies at an end of the list: give more rates there.
        detectors: By name, as in `aligndet finetune`. Each of several is a comparison of its own, in a folder
            with its name in output.
        trunk: By name, as in `aligndet finetune`.
        trunk_weights: Of the trunk, for all arms.
        fpn_channels: Width of the feature pyramid.
        pretraining: Further settings of `aligndet pretrain`, such as --pretraining.steps 5000; those of one
            of several detectors under its name: --pretraining.fcos.steps 5000. Only those that change no
            result, such as workers, may be others when it goes on.
        finetuning: Further settings of `aligndet finetune`, likewise, such as --finetuning.batch_size 8.
        part: I/N: every N-th cell from the I-th on, for array tasks or devices that share the folder; what
            several parts need (proposals, pre-training, searches) is made by one, the others wait.

    Returns:
        The folder, with table.md, results.json and results.csv of the cells that are finished.

    Raises:
        ValueError: If the folder holds a comparison with other data, model or training settings, or the input
            does not fit together; the message names the file or the value. At the end, if a cell has failed.
    """
    if unlabelled is not None:
        ImageSource(unlabelled)  # refuses an address
    # the runs of cells are known by these names: the same ones, however they are spelt
    annotations, val_annotations = map(_spelt_out, (annotations, val_annotations))
    proposals = proposals and _spelt_out(proposals)
    output, images = output.resolve(), images and images.resolve()
    val_images, unlabelled = val_images and val_images.resolve(), unlabelled and unlabelled.resolve()
    if trunk_weights not in WEIGHTS and Path(trunk_weights).exists():
        trunk_weights = str(_spelt_out(Path(trunk_weights)))
    settings = {name: value for name, value in locals().items() if name in _SHARED}
    if not detectors or len(set(detectors)) < len(detectors):
        raise ValueError(f"detectors must be different names, at least one, not {list(detectors)}")
    if len(detectors) > 1 and (output / "compare.json").is_file():
        raise ValueError(f"{output}: holds the comparison of one detector; give another --output")
    read = read_arms(arms)
    names, sources = [name for name, _ in read], {name: source for name, source in read if source}
    cells = plan(names, fractions, folds, steps, seeds)
    mine = part_of(cells, part)
    rates = learning_rates
    if rates is not None and (not rates or min(rates) <= 0 or len(set(rates)) < len(rates)):
        raise ValueError(f"learning_rates must be different positive numbers, not {list(rates)}")
    stages = {}
    for detector in detectors:
        before = _settings("pretraining", pretrain, pretraining, detector, set())
        after = _settings("finetuning", finetune, finetuning, detector, _PLANNED)
        model = {"detector": detector, "trunk": trunk, "fpn_channels": fpn_channels}
        check_arms(names, sources, before, after, model)
        stages[detector] = (model, before, after)
    remarks = check_trunks(sources, trunk_weights)
    labels = load_labelled(annotations, images, "train")
    coco = build_dataset(labels, annotations)
    held_out = read_labelled(val_annotations, val_images, split="val", categories=coco.categories)
    measured = frozenset(image_files(held_out.folder, held_out.file_names))
    check_objects(held_out, val_annotations)
    if remark := remark_on_shared_images(coco, held_out):
        remarks.append(f"{remark}.")
    remarks += remarks_on_images(sources, measured)
    readable = set(coco.file_names)
    present = [image for image in labels.content["images"] if image["file_name"] in readable]
    document = with_images(labels.content, present)
    own = {name: output / name if len(detectors) > 1 else output for name in detectors}
    first = {name: _first(folder, (seeds[0], folds[0])) for name, folder in own.items()}
    searched = {fold for _, fold in first.values()} if rates is not None and len(rates) > 1 else set()
    counts = _count_labels(annotations, document, coco, cells, searched)
    classes = [category.name for category in coco.categories]
    settings["data"] = [
        data_summary(f"{len(part)} images", chain(classes, part.file_names), part.arrays())
        for part in (coco, held_out)
    ]
    benches = []
    for detector, (model, before, after) in stages.items():
        recipe = training_defaults(detector, after.get("optimizer", "adamw"))
        bench = Bench(
            output=own[detector],
            document=document,
            labels=counts,
            images=labels.folder,
            validation=(val_annotations, val_images),
            measured=measured,
            unlabelled=unlabelled or labels.folder,
            proposals=proposals or output / "proposals",
            locks=output / ".locks",
            proposing=None if proposals else {"masks": any(family_of(name).masks for name in detectors)},
            sources=sources,
            rates=rates or (recipe["learning_rate"],),
            model={**model, "trunk_weights": trunk_weights},
            pretraining=before,
            finetuning=after,
            first=first[detector],
            remarks=remarks,
        )
        benches.append(bench)
    if any(bench.ahead(mine).pretrainings for bench in benches):
        # a wrong folder is told before cells are tuned
        source = ImageSource(unlabelled or labels.folder)
        source.check_here()
        if proposals is not None:
            table = read_proposals(proposals)
            source.prepare(table.file_names, proposals)
            count = f"{len(table)} images with {len(table.boxes)} boxes"
            settings["proposals_data"] = data_summary(count, table.file_names, (table.boxes, table.offsets))
    for bench in benches:
        stage = {"pretraining": bench.pretraining or None, "finetuning": bench.finetuning or None}
        about = {**settings, "detector": bench.model["detector"], **stage}
        bench.first = _record(bench.output, about, bench.first)
    for remark in remarks:
        print(remark)
    for detector, bench in zip(detectors, benches, strict=True):
        print(f"{detector}: {len(mine)} cells; to be done: {bench.ahead(mine)}", flush=True)
    for detector, bench in zip(detectors, benches, strict=True):
        for _ in bench.run_all(mine):
            _write(bench, cells, output, detectors)
        _write(bench, cells, output, detectors)  # also if nothing was left to be done
        print(f"## {detector}\n\n{(bench.output / 'table.md').read_text()}")
    _tell_failures({name: message for bench in benches for name, message in bench.failures.items()})
    return output


def _spelt_out(path: Path) -> Path:
    """An absolute path; a link itself stays, as other files are looked for beside it."""
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _count_labels(
    source: Path, document: dict[str, Any], coco: CocoDataset, cells: Sequence[Cell], searched: Set[int]
) -> dict[float, int]:
    """How many images a fraction has; draws that nothing can be learnt from or measured by are refused.

    Args:
        source: Of the labels, for messages.
        document: All labels.
        coco: The same, checked.
        cells: Of the plan.
        searched: The folds on which learning rates are searched.
    """
    shown = {name for name, crowds in zip(coco.file_names, coco.iscrowd, strict=True) if not crowds.all()}
    counts = {}
    draws = dict.fromkeys((cell.fraction, cell.fold, False) for cell in cells)
    draws |= dict.fromkeys((cell.fraction, fold, True) for cell in cells for fold in searched)
    for fraction, fold, is_search in draws:
        subset = labelled_subset(document, fraction, fold)
        counts[fraction] = len(subset["images"])
        for part in hold_out(subset) if is_search else (subset,):
            if shown.isdisjoint(image["file_name"] for image in part["images"]):
                which = "that its search of learning rates takes " if is_search else ""
                raise ValueError(
                    f"{source}: fraction {fraction:g}, fold {fold}: the {len(part['images'])} images {which}"
                    "show no object; give a larger fraction or another fold"
                )
    return counts


def _write(bench: Bench, cells: Sequence[Cell], output: Path, detectors: Sequence[str]) -> None:
    write_results(bench, cells)
    if len(detectors) > 1:
        write_tables(output, detectors)


def _tell_failures(failures: dict[str, str]) -> None:
    """Ends with an error if a cell has failed."""
    cells: dict[str, list[str]] = {}
    for name, message in failures.items():
        cells.setdefault(message, []).append(name)
    if cells:
        told = "; ".join(f"{' and '.join(names)}: {message}" for message, names in cells.items())
        raise ValueError(f"{len(failures)} cells failed, the same command tries them again: {told}")


def _settings(
    kind: str, function: Any, given: dict[str, Any] | None, detector: str, ours: set[str]
) -> dict[str, Any]:
    """Settings of one detector: those of all, and its own in front of them."""
    common = {name: value for name, value in (given or {}).items() if name not in DETECTORS}
    parameters = signature(function).parameters
    allowed = set(parameters) - _OURS - ours
    settings = {}
    for name, value in {**common, **((given or {}).get(detector) or {})}.items():
        if name not in allowed:
            raise ValueError(
                f"{kind}: {name!r} cannot be set; there are: {', '.join(sorted(allowed))},"
                " and settings of one detector under its name"
            )
        is_list = str(parameters[name].annotation).startswith("tuple[int") and isinstance(value, str)
        settings[name] = json.loads(f"[{value}]") if is_list else value  # 640,800 as on a command line
    return settings


def _first(output: Path, given: tuple[int, int]) -> tuple[int, int]:
    """Seed and fold that learning rates are searched on: those that the comparison has begun with."""
    record = output / "compare.json"
    if not (record.is_file() and _is_begun(output)):
        return given
    former = [name for path in output.glob("search/*") if (name := _SEARCHED.search(path.name))]
    searched = (int(former[0]["seed"]), int(former[0]["fold"])) if former else given  # of earlier versions
    seed, fold = read_json(record).get("first", searched)
    return seed, fold


def _is_begun(output: Path) -> bool:
    names = ("checkpoints", "model", "pretrained", "result.json")
    return any(path for name in names for path in output.glob(f"*/*/{name}"))


def _record(output: Path, settings: dict[str, Any], first: tuple[int, int]) -> tuple[int, int]:
    """Writes down what the comparison is about, or refuses to mix it with another; returns whose seed and
    fold are searched on, if another part has begun meanwhile.
    """
    plain = json.loads(json.dumps(settings, default=lambda path: str(Path(path).resolve())))
    record = output / "compare.json"
    # first what is there: another part can begin meanwhile, and its record comes before anything else
    used = contents(output) if output.is_dir() else []
    if used and not record.is_file():
        several = sorted(path.parent.name for path in output.glob("*/compare.json"))
        if several:
            raise ValueError(
                f"{output}: holds the comparisons of {', '.join(several)}; to go on with one of them give its"
                f" folder, as in --output {output / several[0]}"
            )
        raise ValueError(f"{output}: holds {used[0]!r} and no comparison; give another --output")
    with locked(output / ".locks" / "settings", wait=True):
        there = read_json(record) if record.is_file() else {}
        noted = there if _is_begun(output) else provenance()
        before = noted.get("settings", {})
        for name, value in plain.items():
            if name in before and _lasting(before[name]) != _lasting(value):
                raise ValueError(
                    f"{output}: was started with {name}={before[name]!r}, now {value!r}; go on with"
                    " the former or give another --output"
                )
        if "first" not in noted or plain.keys() - before.keys():
            noted = {"first": first, **noted, "settings": before | plain}
            atomic_write(record, json.dumps(noted, indent=2) + "\n")
    seed, fold = noted["first"]
    return seed, fold


def _lasting(value: Any) -> Any:
    """Settings of a stage without those that a run may change when it goes on."""
    if isinstance(value, str) and Path(value).exists():  # a file of weights, however it is spelt
        return os.path.realpath(value)
    return {k: v for k, v in value.items() if k not in MAY_CHANGE} if isinstance(value, dict) else value or {}
