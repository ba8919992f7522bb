"""`aligndet compare`: what pre-training is worth on labels of your own, at equal budgets."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from aligndet.commands._arms import WEIGHTS, check_arms, check_trunks, read_arms, remarks_on_images
from aligndet.commands._cells import Bench, Labels, Runner
from aligndet.commands._record import first_search, keep_settings
from aligndet.commands._results import write_results, write_tables
from aligndet.commands._settings import typed
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.comparison import Cell, hold_out, labelled_subset, part_of, plan
from aligndet.data.coco import CocoDataset, build_dataset, check_objects, image_files
from aligndet.data.formats import load_labelled, read_labelled
from aligndet.data.labelled import remark_on_shared_images
from aligndet.data.sources import ImageSource
from aligndet.data.splits import with_images
from aligndet.detectors.build import DETECTORS, family_of, training_defaults
from aligndet.files import accepts_strings, read_part
from aligndet.launch import data_summary
from aligndet.proposals.storage import read_proposals

_OURS = {"images", "annotations", "proposals", "output", "init_from", "init", "val_annotations", "val_images"}
_OURS |= {"names", "resume", "overwrite", "seed", "detector", "trunk", "trunk_weights", "fpn_channels"}
_OURS |= {"exclude"}  # validation images are left out anyway
_OURS |= {"devices", "nodes", "strategy"}  # a cell is one process: more would each start the whole comparison
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
        annotations: Labels of the training images: COCO JSON, PASCAL VOC or YOLO (file or folder).
        val_annotations: Labels of the validation images, on which all cells are measured.
        output: Folder of the comparison.
        images: Folder of the training images; by default looked for.
        val_images: Folder of the validation images.
        unlabelled: Folder of the images for pre-training; by default that of the training images. Validation
            images are left out.
        proposals: Proposals of these images; by default made by `aligndet propose`. The clusters that
            query-based detectors need are made by `aligndet cluster` if the proposals have none.
        arms: "scratch" (neck and heads random, the trunk with its weights), "aligndet", "boxes-only" (no
            contrast), "contrast-only" (no box losses), "trunk-only" (the trunk of the pre-training; the
            same as scratch unless --pretraining.train_trunk true), and "from:PATH" (a run or an export; other
            weights in the same folder are another arm). Its trunk must have the same --trunk-weights; a
            remark says if it has, or may have, seen validation images.
        fractions: Shares of the labelled images, above 0 and up to 1 (0.05 is 5 %), nested within a fold.
        folds: Numbers of the random draws of labelled images; all labels (1.0) are one fold.
        seeds: Seeds of pre-training and fine-tuning; pairs share seed and fold. The test takes seeds for
            independent, and with fewer than six cannot reach 5 %.
        steps: Budgets of fine-tuning.
        learning_rates: Learning rates of fine-tuning; by default that of `aligndet finetune` from random
            heads. If there are several, each arm takes its own best for each fraction and budget, chosen on a
            fifth of the labels that is held out, at the first seed and fold that the comparison was begun
            with; the validation images have no part in it. With few labels this choice is noisy. A rate at
            which training diverges loses. The table says where the best rate lies at an end of the list: give
            more rates there.
        detectors: By name, as in `aligndet finetune`. Each of several is a comparison of its own, in a folder
            with its name in output.
        trunk: By name, as in `aligndet finetune`.
        trunk_weights: Weights of the trunk, for all arms.
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
    # the runs of the cells record these paths: they must not depend on how they are spelt
    annotations, val_annotations = map(_spelt_out, (annotations, val_annotations))
    proposals = proposals and _spelt_out(proposals)
    output, images = output.resolve(), images and images.resolve()
    val_images, unlabelled = val_images and val_images.resolve(), unlabelled and unlabelled.resolve()
    if trunk_weights not in WEIGHTS and Path(trunk_weights).exists():
        trunk_weights = str(_spelt_out(Path(trunk_weights)))
    settings = {name: value for name, value in locals().items() if name in _SHARED}
    _check_lists(output, detectors, learning_rates)
    named = read_arms(arms)
    names, sources = [name for name, _ in named], {name: source for name, source in named if source}
    cells = plan(names, fractions, folds, steps, seeds)
    mine = part_of(cells, part)
    stages = {}
    for detector in detectors:
        pretrain_settings = _settings("pretraining", pretrain, pretraining, detector, set())
        finetune_settings = _settings("finetuning", finetune, finetuning, detector, _PLANNED)
        model = {"detector": detector, "trunk": trunk, "fpn_channels": fpn_channels}
        check_arms(names, sources, pretrain_settings, finetune_settings, model)
        recipe = training_defaults(detector, finetune_settings.get("optimizer", "adamw"))
        rates = learning_rates or (recipe["learning_rate"],)
        stages[detector] = (model, rates, pretrain_settings, finetune_settings)
    remarks = check_trunks(sources, trunk_weights)
    folders = {name: output / name if len(detectors) > 1 else output for name in detectors}
    first = {name: first_search(folder, (seeds[0], folds[0])) for name, folder in folders.items()}
    searched = {fold for _, fold in first.values()} if learning_rates and len(learning_rates) > 1 else set()
    masks = any(family_of(name).masks for name in detectors)
    labels, datasets = _read_labels(
        annotations, images, val_annotations, val_images, cells, searched, masks=masks
    )
    if remark := remark_on_shared_images(*datasets):
        remarks.append(f"{remark}.")
    remarks += remarks_on_images(sources, labels.validation_files)
    benches = [
        Bench(
            output=folders[detector],
            labels=labels,
            unlabelled=unlabelled or labels.images,
            proposals=proposals or output / "proposals",
            locks=output / ".locks",
            proposing=None if proposals else {"masks": _with_masks(output / "proposals", masks)},
            sources=sources,
            rates=rates,
            model={**model, "trunk_weights": trunk_weights},
            pretraining=pretrain_settings,
            finetuning=finetune_settings,
            first=first[detector],
            remarks=remarks,
        )
        for detector, (model, rates, pretrain_settings, finetune_settings) in stages.items()
    ]
    if any(bench.ahead(mine).pretrainings for bench in benches):
        # a wrong folder is an error before any cell is tuned
        settings |= _check_pretraining_data(benches[0].unlabelled, proposals)
    runners = []
    for bench in benches:
        stage = {"pretraining": bench.pretraining or None, "finetuning": bench.finetuning or None}
        detector = bench.model["detector"]
        data = [_summary(dataset, masks=family_of(detector).masks) for dataset in datasets]
        about = {**settings, "detector": detector, "data": data, **stage}
        runners.append(Runner(replace(bench, first=keep_settings(bench.output, about, bench.first))))
    for remark in remarks:
        print(remark)
    _run(runners, cells, mine, output)
    return output


def _check_lists(output: Path, detectors: Sequence[str], rates: Sequence[float] | None) -> None:
    if not detectors or len(set(detectors)) < len(detectors):
        raise ValueError(f"detectors must be different names, at least one, not {list(detectors)}")
    if len(detectors) > 1 and (output / "compare.json").is_file():
        raise ValueError(f"{output}: holds the comparison of one detector; give another --output")
    if rates is not None and (not rates or min(rates) <= 0 or len(set(rates)) < len(rates)):
        raise ValueError(f"learning_rates must be different positive numbers, not {list(rates)}")


def _read_labels(
    annotations: Path,
    images: Path | None,
    val_annotations: Path,
    val_images: Path | None,
    cells: Sequence[Cell],
    searched: Set[int],
    *,
    masks: bool,
) -> tuple[Labels, tuple[CocoDataset, CocoDataset]]:
    """The labels as the cells take them, and the training and validation sets that they were checked as."""
    labels = load_labelled(annotations, images, "train")
    training = build_dataset(labels, annotations, masks=masks)
    validation = read_labelled(
        val_annotations, val_images, split="val", categories=training.categories, masks=masks
    )
    check_objects(validation, val_annotations)
    readable = set(training.file_names)
    present = [image for image in labels.content["images"] if image["file_name"] in readable]
    document = with_images(labels.content, present)
    counts = _count_labels(annotations, document, training, cells, searched)
    files = frozenset(image_files(validation.folder, validation.file_names))
    paths = val_annotations, val_images
    return Labels(document, labels.folder, counts, paths, files), (training, validation)


def _with_masks(proposals: Path, wanted: bool) -> bool:
    """Whether the comparison's own proposals have masks: those of an earlier call are as they are."""
    manifest = proposals / "manifest.json"
    has = wanted if not manifest.is_file() else bool(read_part(manifest, "parameters").get("masks"))
    if wanted and not has:
        raise ValueError(f"{proposals}: these proposals have no masks; give another --output")
    return has


def _summary(dataset: CocoDataset, *, masks: bool) -> str:
    dataset = dataset if masks else replace(dataset, masks=None)
    classes = (category.name for category in dataset.categories)
    return data_summary(f"{len(dataset)} images", chain(classes, dataset.file_names), dataset.arrays())


def _check_pretraining_data(unlabelled: Path, proposals: Path | None) -> dict[str, str]:
    """Refuses images and proposals that do not fit together; returns a summary of the user's proposals."""
    source = ImageSource(unlabelled)
    source.check_here()
    if proposals is None:
        return {}
    table = read_proposals(proposals)
    source.prepare(table.file_names, proposals)
    count = f"{len(table)} images with {len(table.boxes)} boxes"
    return {"proposals_data": data_summary(count, table.file_names, (table.boxes, table.offsets))}


def _spelt_out(path: Path) -> Path:
    """An absolute path; the last part may be a link, as other files are looked for beside it."""
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _count_labels(
    source: Path, document: dict[str, Any], coco: CocoDataset, cells: Sequence[Cell], searched: Set[int]
) -> dict[float, int]:
    """The number of images of each fraction; refuses draws without an object to learn from or measure by."""
    with_objects = {
        name for name, crowds in zip(coco.file_names, coco.iscrowd, strict=True) if not crowds.all()
    }
    counts = {}
    draws = dict.fromkeys((cell.fraction, cell.fold, False) for cell in cells)
    draws |= dict.fromkeys((cell.fraction, fold, True) for cell in cells for fold in searched)
    for fraction, fold, is_search in draws:
        subset = labelled_subset(document, fraction, fold)
        counts[fraction] = len(subset["images"])
        same = next((f for f, n in counts.items() if n == counts[fraction] and f != fraction), None)
        if same is not None:
            raise ValueError(f"{source}: fractions {same:g} and {fraction:g} are both {counts[same]} images")
        for part in hold_out(subset) if is_search else (subset,):
            if with_objects.isdisjoint(image["file_name"] for image in part["images"]):
                which = "that its search of learning rates takes " if is_search else ""
                raise ValueError(
                    f"{source}: fraction {fraction:g}, fold {fold}: the {len(part['images'])} images {which}"
                    "show no object; give a larger fraction or another fold"
                )
    return counts


def _run(runners: Sequence[Runner], cells: Sequence[Cell], mine: Sequence[Cell], output: Path) -> None:
    """Runs the cells of this part for one detector after another; writes the results after every cell."""
    detectors = [runner.bench.model["detector"] for runner in runners]

    def write(bench: Bench) -> None:
        write_results(bench, cells)
        if len(detectors) > 1:
            write_tables(output, detectors)

    for detector, runner in zip(detectors, runners, strict=True):
        print(f"{detector}: {len(mine)} cells; to be done: {runner.bench.ahead(mine)}", flush=True)
    for detector, runner in zip(detectors, runners, strict=True):
        for _ in runner.run_all(mine):
            write(runner.bench)
        write(runner.bench)  # also if nothing was left to be done
        print(f"## {detector}\n\n{(runner.bench.output / 'table.md').read_text()}")
    _raise_failures({name: message for runner in runners for name, message in runner.failures.items()})


def _raise_failures(failures: dict[str, str]) -> None:
    """Ends with an error if a cell has failed."""
    cells: dict[str, list[str]] = {}
    for name, message in failures.items():
        cells.setdefault(message, []).append(name)
    if cells:
        messages = "; ".join(f"{' and '.join(names)}: {message}" for message, names in cells.items())
        raise ValueError(f"{len(failures)} cells failed, the same command tries them again: {messages}")


def _settings(
    kind: str, function: Any, settings: dict[str, Any] | None, detector: str, excluded: set[str]
) -> dict[str, Any]:
    """The settings of a stage for one detector: those for all detectors, overridden by its own."""
    settings = settings or {}
    common = {name: value for name, value in settings.items() if name not in DETECTORS}
    allowed = set(signature(function).parameters) - _OURS - excluded
    merged = common | (settings.get(detector) or {})
    for name in merged:
        if name not in allowed:
            raise ValueError(
                f"{kind}: {name!r} cannot be set; there are: {', '.join(sorted(allowed))},"
                " and settings of one detector under its name"
            )
    try:
        return typed(function, merged)
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error
