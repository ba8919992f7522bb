"""`aligndet compare`: what pre-training is worth on labels of your own, at equal budgets."""

from __future__ import annotations

import csv
import io
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from aligndet.commands._runs import provenance
from aligndet.commands.cluster import cluster
from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose
from aligndet.comparison import BASELINE, Cell, hold_out, labelled_subset, markdown, part_of, plan, summarise
from aligndet.data.coco import build_dataset
from aligndet.data.formats import load_labelled, read_labelled
from aligndet.detectors.build import predicts_masks, shared_options, training_default, weights_format
from aligndet.detectors.weights import MODULES, load_weights
from aligndet.files import accepts_strings, atomic_write, locked, read_json
from aligndet.proposals.clusters import clusters_file

ARMS: dict[str, dict[str, Any] | None] = {  # settings of pre-training; None: there is none
    BASELINE: None,
    "trunk-only": {},
    "boxes-only": {"contrast_weight": 0.0},
    "contrast-only": {"box_weight": 0.0},
    "aligndet": {},
}
_OURS = {"images", "annotations", "proposals", "output", "init_from", "init", "val_annotations", "val_images"}
_OURS |= {"resume", "overwrite", "seed", "detector", "trunk", "trunk_weights", "fpn_channels"}
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
    learning_rates: tuple[float, ...] = (1e-3,),
    detector: str = "fcos",
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
        unlabelled: Folder of the images for pre-training; by default that of the training images.
        proposals: Of these images; by default made by `aligndet propose`. Clusters, for query-based
            detectors, are made by `aligndet cluster` if there are none beside them.
        arms: "scratch" (neck and heads random, the trunk with its weights), "aligndet", "boxes-only" (no
            contrast), "contrast-only" (no box losses), "trunk-only" (the trunk of the pre-training; the
            same as scratch unless --pretraining.train_trunk true), and "from:PATH" (a run or an export).
        fractions: Of the labelled images, nested within a fold.
        folds: Numbers of the draws of labelled images; all labels (1.0) are one fold.
        seeds: Of pre-training and fine-tuning; pairs share seed and fold.
        steps: Budgets of fine-tuning.
        learning_rates: Of fine-tuning. Of several, each arm takes its own best, for each fraction and budget:
            on the first seed and fold, a fifth of the labels is held out and chooses; the validation images
            have no part in it. With few labels this choice is noisy.
        detector: By name, as in `aligndet finetune`.
        trunk: By name, as in `aligndet finetune`.
        trunk_weights: Of the trunk, for all arms.
        fpn_channels: Width of the feature pyramid.
        pretraining: Further settings of `aligndet pretrain`, such as --pretraining.steps 5000.
        finetuning: Further settings of `aligndet finetune`, such as --finetuning.batch_size 8.
        part: I/N: every N-th cell from the I-th on, for array tasks or devices that share the folder; what
            several parts need (proposals, pre-training, searches) is made by one, the others wait.

    Returns:
        The folder, with table.md, results.json and results.csv of the cells that are finished.

    Raises:
        ValueError: If the folder holds a comparison with other data, model or training settings, or the input
            does not fit together; the message names the file or the value.
    """
    settings = {name: value for name, value in locals().items() if name in _SHARED}
    sources = {_arm_name(arm): Path(arm[5:]) for arm in arms if arm.startswith("from:")}
    names = [_arm_name(arm) for arm in arms]
    cells = plan(names, fractions, folds, steps, seeds)
    mine = part_of(cells, part)
    for kind, function, given in (("pre", pretrain, pretraining), ("fine", finetune, finetuning)):
        _check_options(kind, function, given or {}, {"learning_rate", "steps"} if kind == "fine" else set())
    model = {"detector": detector, "trunk": trunk, "fpn_channels": fpn_channels}
    _check_arms(names, sources, pretraining or {}, model)
    if not learning_rates or min(learning_rates) <= 0 or len(set(learning_rates)) < len(learning_rates):
        raise ValueError(f"learning_rates must be different positive numbers, not {list(learning_rates)}")
    labels = load_labelled(annotations, images, "train")
    coco = build_dataset(labels, annotations)
    read_labelled(val_annotations, val_images, split="val", categories=coco.categories)
    _record(output, settings)
    bench = _Bench(
        output=output,
        document=labels.content,
        images=labels.folder,
        validation=(val_annotations, val_images),
        unlabelled=unlabelled or labels.folder,
        proposals=proposals,
        sources=sources,
        rates=learning_rates,
        model={**model, "trunk_weights": trunk_weights},
        pretraining=pretraining or {},
        finetuning=finetuning or {},
        first=(seeds[0], folds[0]),
    )
    seconds: list[float] = []
    for index, cell in enumerate(mine):
        left = f", about {sum(seconds) / len(seconds) * (len(mine) - index) / 60:.0f} min" if seconds else ""
        print(f"== cell {index + 1} of {len(mine)}{left}: {cell.name(bench.rates[0])}", flush=True)
        begun = time.monotonic()
        if bench.run(cell):
            seconds.append(time.monotonic() - begun)
    print(_write_results(bench, cells))
    return output


@dataclass
class _Bench:
    """What all cells have in common."""

    output: Path
    document: dict[str, Any]
    images: Path
    validation: tuple[Path, Path | None]
    unlabelled: Path
    proposals: Path | None
    sources: dict[str, Path]
    rates: tuple[float, ...]
    model: dict[str, Any]
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    first: tuple[int, int]  # seed and fold of the search

    def run(self, cell: Cell) -> bool:
        """Runs a cell and whatever it needs; False if it is finished already."""
        if self.figures(cell) is not None:
            return False
        if len(self.rates) > 1:
            for rate in self.rates:
                self._tune(self._searched(cell), rate, search=True)
        chosen = self.rate(cell)
        assert chosen is not None  # all of its search is there
        self._tune(cell, chosen)
        return True

    def rate(self, cell: Cell) -> float | None:
        """The learning rate of a cell, or None while its search is not finished."""
        if len(self.rates) == 1:
            return self.rates[0]
        searched = self._searched(cell)
        found = {rate: _read(self._folder(searched, rate, search=True)) for rate in self.rates}
        if any(figures is None for figures in found.values()):
            return None
        return max(self.rates, key=lambda rate: (found[rate] or {}).get("AP") or 0.0)

    def figures(self, cell: Cell) -> dict[str, Any] | None:
        """What `aligndet evaluate` has written for a cell, or None."""
        rate = self.rate(cell)
        return None if rate is None else _read(self._folder(cell, rate))

    def _searched(self, cell: Cell) -> Cell:
        return Cell(cell.fraction, cell.steps, *self.first, cell.arm)

    def _folder(self, cell: Cell, rate: float, *, search: bool = False) -> Path:
        return self.output / ("search" if search else "cells") / cell.name(rate)

    def _tune(self, cell: Cell, rate: float, *, search: bool = False) -> None:
        folder = self._folder(cell, rate, search=search)
        with locked(self.output / ".locks" / f"{folder.parent.name}_{folder.name}", wait=True):
            if _read(folder) is not None:
                return
            subset = labelled_subset(self.document, cell.fraction, cell.fold)
            train, measured = subset, self.validation
            labels = self.output / "labels" / f"{cell.fraction:g}_fold{cell.fold}.json"
            if search:
                train, held_out = hold_out(subset)
                measured = (labels.with_suffix(".held_out.json"), self.images)
                atomic_write(measured[0], json.dumps(held_out))
                labels = labels.with_suffix(".search.json")
            atomic_write(labels, json.dumps(train))
            if not (folder / "model" / "manifest.json").is_file():
                # the same for all arms
                sgd, kind = self.finetuning.get("optimizer") == "sgd", self.model["detector"]
                decay = 1e-4 if sgd else training_default(kind, "weight_decay", 0.05)
                given = self.pretraining.get("options") or {}
                shared = {name: value for name, value in given.items() if name in shared_options(kind)}
                options = shared | (self.finetuning.get("options") or {})
                finetune(
                    labels,
                    images=self.images,
                    output=folder,
                    init_from=self._start(cell),
                    init=("trunk",) if cell.arm == "trunk-only" else tuple(MODULES),
                    steps=cell.steps,
                    seed=cell.seed,
                    learning_rate=rate,
                    resume=folder.is_dir(),
                    **{"weight_decay": decay, **self.model, **self.finetuning, "options": options or None},
                )
            result = folder / "result.json"
            evaluate(folder / "model", measured[0], images=measured[1], output=result, details=not search)

    def _start(self, cell: Cell) -> Path | None:
        """What a cell is fine-tuned from; a pre-training is made once for each seed."""
        if cell.arm in self.sources:
            return self.sources[cell.arm]
        settings = ARMS[cell.arm]
        if settings is None:
            return None
        kind = cell.arm if settings else "aligndet"
        folder = self.output / "pretrained" / f"{kind}_seed{cell.seed}"
        with locked(self.output / ".locks" / f"pretrained_{folder.name}", wait=True):
            if not (folder / "pretrained" / "manifest.json").is_file():
                pretrain(
                    self.unlabelled,
                    proposals=self._proposed(),
                    output=folder,
                    seed=cell.seed,
                    resume=folder.is_dir(),
                    **{**self.model, **self.pretraining, **settings},
                )
        return folder

    def _proposed(self) -> Path:
        folder = self.proposals or self.output / "proposals"
        kind, options = self.model["detector"], self.pretraining.get("options") or {}
        with locked(self.output / ".locks" / "proposals", wait=True):
            if self.proposals is None:
                propose(self.unlabelled, output=folder, masks=predicts_masks(kind))
            wanted = weights_format(kind) == "transformers" and not options.get("objectness")
            if wanted and not clusters_file(folder).is_file():
                cluster(
                    self.unlabelled,
                    proposals=folder,
                    min_size=max(self.pretraining.get("min_size", (800,))),
                    max_size=self.pretraining.get("max_size", 1333),
                    trunk=self.model["trunk"],
                    trunk_weights=self.model["trunk_weights"],
                    clusters=options.get("num_clusters", 256),
                )
        return folder


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    return read_json(path) if path.is_file() else None


def _arm_name(arm: str) -> str:
    if arm.startswith("from:"):
        path = Path(arm[5:]).resolve()
        return f"from-{path.name}-{zlib.crc32(str(path).encode()):08x}"
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; there are: {', '.join(ARMS)} and from:PATH")
    return arm


def _check_arms(
    names: Sequence[str], sources: dict[str, Path], pretraining: dict[str, Any], model: dict[str, Any]
) -> None:
    if "trunk-only" in names and not pretraining.get("train_trunk"):
        raise ValueError(
            "arm 'trunk-only' is the same as 'scratch' while pre-training leaves the trunk frozen;"
            " leave it out or give --pretraining.train_trunk true"
        )
    for path in sources.values():
        architecture = load_weights(path)[1]["architecture"]
        for name, value in model.items():
            if architecture[name] != value:
                raise ValueError(
                    f"{path}: has {name} {architecture[name]!r}, the other arms {value!r}: not comparable"
                )


def _check_options(kind: str, function: Any, given: dict[str, Any], ours: set[str]) -> None:
    allowed = set(signature(function).parameters) - _OURS - ours
    for name in given:
        if name not in allowed:
            raise ValueError(
                f"{kind}{'training' if kind == 'pre' else 'tuning'}: {name!r} cannot be set; "
                f"there are: {', '.join(sorted(allowed))}"
            )


def _record(output: Path, settings: dict[str, Any]) -> None:
    """Writes down what the comparison is about, or refuses to mix it with another."""
    plain = json.loads(json.dumps(settings, default=lambda path: str(Path(path).resolve())))
    record = output / "compare.json"
    if output.is_dir() and not record.is_file():
        other = next((path.name for path in output.iterdir() if not path.name.startswith(".")), None)
        if other is not None:
            raise ValueError(f"{output}: holds {other!r} and no comparison; give another --output")
    with locked(output / ".locks" / "settings", wait=True):
        if record.is_file():
            before = read_json(record).get("settings", {})
            for name, value in plain.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{output}: was started with {name}={before.get(name)!r}, now {value!r}; go on with"
                        " the former or give another --output"
                    )
        else:
            atomic_write(record, json.dumps({"settings": plain, **provenance()}, indent=2) + "\n")


def _write_results(bench: _Bench, cells: Sequence[Cell]) -> str:
    """Table, JSON and CSV of the cells that are finished."""
    found = {cell: figures for cell in cells if (figures := bench.figures(cell)) is not None}
    for figures in found.values():
        figures.pop("details", None)  # curves of all classes stay with their cell
    labels = {c.fraction: len(labelled_subset(bench.document, c.fraction, 0)["images"]) for c in cells}
    rows = summarise({cell: figures.get("AP") or 0.0 for cell, figures in found.items()}, labels)
    table = markdown(rows) + f"\n{len(found)} of {len(cells)} cells finished\n"
    listed = [
        {**asdict(c), "labels": labels[c.fraction], "learning_rate": bench.rate(c), "figures": figures}
        for c, figures in found.items()
    ]
    atomic_write(bench.output / "table.md", table)
    atomic_write(
        bench.output / "results.json", json.dumps({"rows": rows, "cells": listed, **provenance()}, indent=2)
    )
    text = io.StringIO()
    names = ["arm", "labels", "fraction", "steps", "fold", "seed", "learning_rate", "AP", "AP50", "AP75"]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in listed:
        writer.writerow({**row["figures"], **row})
    atomic_write(bench.output / "results.csv", text.getvalue())
    return table
