"""`aligndet compare`: what pre-training is worth on labels of your own, at equal budgets."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from aligndet.commands._cells import ARMS, Bench, detector_settings
from aligndet.commands._settings import provenance
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.comparison import part_of, plan
from aligndet.data.coco import build_dataset, image_files
from aligndet.data.formats import load_labelled, read_labelled
from aligndet.data.sources import ImageSource
from aligndet.data.splits import with_images
from aligndet.detectors.build import DETECTORS, family_of, training_defaults
from aligndet.detectors.weights import load_weights
from aligndet.files import accepts_strings, atomic_write, contents, locked, read_json
from aligndet.launch import data_summary
from aligndet.proposals.storage import read_proposals

_OURS = {"images", "annotations", "proposals", "output", "init_from", "init", "val_annotations", "val_images"}
_OURS |= {"names", "resume", "overwrite", "seed", "detector", "trunk", "trunk_weights", "fpn_channels"}
_OURS |= {"devices", "nodes", "strategy"}  # a cell is of one process: others would start the comparison anew
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
    more arms, fractions, folds, seeds, steps or learning rates can be added later. The last weights are
    measured, none are chosen by the validation images.

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
            same as scratch unless --pretraining.train_trunk true), and "from:PATH" (a run or an export).
        fractions: Shares of the labelled images, above 0 and up to 1 (0.05 is 5 %), nested within a fold.
        folds: Numbers of the draws of labelled images; all labels (1.0) are one fold.
        seeds: Of pre-training and fine-tuning; pairs share seed and fold. The test takes seeds for
            independent, and of fewer than six cannot reach 5 %.
        steps: Budgets of fine-tuning.
        learning_rates: Of fine-tuning; by default that of `aligndet finetune` from random heads. Of several,
            each arm takes its own best, for each fraction and budget: on the first seed and fold that the
            comparison was begun with, a fifth of the labels is held out and chooses; the validation images
            have no part in it. With few labels this choice is noisy. The table says where the best lies at an
            end of the list: give more rates there.
        detectors: By name, as in `aligndet finetune`. Each of several is a comparison of its own, in a folder
            with its name in output.
        trunk: By name, as in `aligndet finetune`.
        trunk_weights: Of the trunk, for all arms.
        fpn_channels: Width of the feature pyramid.
        pretraining: Further settings of `aligndet pretrain`, such as --pretraining.steps 5000; those of one
            of several detectors under its name: --pretraining.fcos.steps 5000.
        finetuning: Further settings of `aligndet finetune`, likewise, such as --finetuning.batch_size 8.
        part: I/N: every N-th cell from the I-th on, for array tasks or devices that share the folder; what
            several parts need (proposals, pre-training, searches) is made by one, the others wait.

    Returns:
        The folder, with table.md, results.json and results.csv of the cells that are finished.

    Raises:
        ValueError: If the folder holds a comparison with other data, model or training settings, or the input
            does not fit together; the message names the file or the value.
    """
    settings = {name: value for name, value in locals().items() if name in _SHARED}
    if not detectors or len(set(detectors)) < len(detectors):
        raise ValueError(f"detectors must be different names, at least one, not {list(detectors)}")
    if len(detectors) > 1 and (output / "compare.json").is_file():
        raise ValueError(f"{output}: holds the comparison of one detector; give another --output")
    sources = {_arm_name(arm): Path(arm[5:]) for arm in arms if arm.startswith("from:")}
    names = [_arm_name(arm) for arm in arms]
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
        _check_arms(names, sources, before, after, model)
        stages[detector] = (model, before, after)
    labels = load_labelled(annotations, images, "train")
    coco = build_dataset(labels, annotations)
    held_out = read_labelled(val_annotations, val_images, split="val", categories=coco.categories)
    measured = frozenset(image_files(held_out.folder, held_out.file_names))
    if all(crowds.all() for crowds in held_out.iscrowd):
        raise ValueError(f"{val_annotations}: has no object to measure by")
    if seen := len(measured.intersection(image_files(coco.folder, coco.file_names))):
        print(f"{seen} of {len(held_out)} validation images are trained on, not new to the detector")
    readable = set(coco.file_names)
    present = [image for image in labels.content["images"] if image["file_name"] in readable]
    classes = [category.name for category in coco.categories]
    settings["data"] = [
        data_summary(f"{len(part)} images", chain(classes, part.file_names), part.arrays())
        for part in (coco, held_out)
    ]
    benches = []
    for detector, (model, before, after) in stages.items():
        recipe = training_defaults(detector, after.get("optimizer", "adamw"))
        bench = Bench(
            output=output / detector if len(detectors) > 1 else output,
            document=with_images(labels.content, present),
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
            first=_first(output / detector if len(detectors) > 1 else output, (seeds[0], folds[0])),
        )
        benches.append(bench)
    if any(bench.pretrains(mine) for bench in benches):  # a wrong folder is told before cells are tuned
        source = ImageSource(unlabelled or labels.folder)
        source.check_here()
        if proposals is not None:
            source.prepare(read_proposals(proposals).file_names, proposals)
    for bench in benches:
        own = {"detector": bench.model["detector"]}
        own |= {"pretraining": bench.pretraining or None, "finetuning": bench.finetuning or None}
        _record(bench.output, settings | own, bench.first)
    tables = []
    for detector, bench in zip(detectors, benches, strict=True):
        bench.run_all(mine)
        tables.append(f"## {detector}\n\n{bench.write_results(cells)}")
        print(tables[-1])
        if len(detectors) > 1:
            atomic_write(output / "table.md", "\n".join(tables))
    return output


def _arm_name(arm: str) -> str:
    if arm.startswith("from:"):
        path = Path(arm[5:]).resolve()
        return f"from-{path.name}-{zlib.crc32(str(path).encode()):08x}"
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; there are: {', '.join(ARMS)} and from:PATH")
    return arm


def _check_arms(
    names: Sequence[str],
    sources: dict[str, Path],
    pretraining: dict[str, Any],
    finetuning: dict[str, Any],
    model: dict[str, Any],
) -> None:
    if "trunk-only" in names and not pretraining.get("train_trunk"):
        raise ValueError(
            "arm 'trunk-only' is the same as 'scratch' while pre-training leaves the trunk frozen;"
            " leave it out or give --pretraining.train_trunk true"
        )
    others: dict[str, Any] = {**model, "fpn_norm": "none"}
    others |= detector_settings(model["detector"], pretraining, finetuning)
    options = others.pop("options") or {}
    shared = family_of(model["detector"]).shared_options()
    others |= {name: options.get(name) for name in shared}
    for path in sources.values():
        architecture = load_weights(path)[1]["architecture"]
        found = dict.fromkeys(shared) | architecture | architecture.get("options", {})
        for name, value in others.items():
            if found[name] != value:
                raise ValueError(
                    f"{path}: has {name} {found[name]!r}, the other arms {value!r}: not comparable"
                )


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
    seed, fold = (read_json(record) if record.is_file() else {}).get("first", given)
    return seed, fold


def _record(output: Path, settings: dict[str, Any], first: tuple[int, int]) -> None:
    """Writes down what the comparison is about, or refuses to mix it with another."""
    plain = json.loads(json.dumps(settings, default=lambda path: str(Path(path).resolve())))
    record = output / "compare.json"
    if output.is_dir() and not record.is_file():
        several = sorted(path.parent.name for path in output.glob("*/compare.json"))
        if several:
            raise ValueError(
                f"{output}: holds the comparisons of {', '.join(several)}; to go on with one of them give its"
                f" folder, as in --output {output / several[0]}"
            )
        if used := contents(output):
            raise ValueError(f"{output}: holds {used[0]!r} and no comparison; give another --output")
    with locked(output / ".locks" / "settings", wait=True):
        begun = any(
            path for name in ("checkpoints", "model", "pretrained") for path in output.glob(f"*/*/{name}")
        )
        if record.is_file() and begun:
            before = read_json(record).get("settings", {})
            for name, value in plain.items():
                if before.get(name) != value and (name != "data" or name in before):
                    raise ValueError(
                        f"{output}: was started with {name}={before.get(name)!r}, now {value!r}; go on with"
                        " the former or give another --output"
                    )
        else:
            atomic_write(
                record, json.dumps({"settings": plain, "first": first, **provenance()}, indent=2) + "\n"
            )
