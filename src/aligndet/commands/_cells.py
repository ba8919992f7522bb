"""The cells of `aligndet compare`: each is a fine-tuning of its own; what several need is made once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aligndet.commands._arms import ARMS, Source, detector_settings
from aligndet.commands.cluster import cluster
from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose
from aligndet.comparison import Cell, hold_out, labelled_subset
from aligndet.data.coco import image_files
from aligndet.data.listing import without_ours
from aligndet.data.sources import ImageSource
from aligndet.detectors.build import family_of, training_defaults
from aligndet.detectors.weights import MODULES
from aligndet.files import atomic_write, locked, read_json
from aligndet.proposals.clusters import clusters_file
from aligndet.proposals.storage import read_proposals


class Ahead(NamedTuple):
    """What is left to do."""

    cells: list[Cell]
    searches: list[tuple[Cell, float]]  # fine-tunings to choose learning rates by
    pretrainings: list[Path]  # folders

    def __str__(self) -> str:
        searches, pretrainings = len(self.searches), len(self.pretrainings)
        return f"cells: {len(self.cells)}, searches of a rate: {searches}, pre-trainings: {pretrainings}"


class Labels(NamedTuple):
    """The labelled images, the same for all detectors."""

    document: dict[str, Any]  # COCO JSON of the training images
    images: Path  # their folder
    counts: dict[float, int]  # numbers of training images by fraction
    validation: tuple[Path, Path | None]  # annotations, and folder of the images
    validation_files: frozenset[str]


@dataclass(frozen=True)
class Bench:
    """What the cells of one detector have in common, and how what they need is made."""

    output: Path
    labels: Labels
    unlabelled: Path
    proposals: Path  # made there first if they are not the user's
    locks: Path  # folder of locks for what several detectors share
    proposing: dict[str, Any] | None  # settings of `aligndet propose`; None: the proposals are the user's
    sources: dict[str, Source]
    rates: tuple[float, ...]
    model: dict[str, Any]
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    first: tuple[int, int]  # seed and fold on which learning rates are searched
    remarks: list[str]  # to be written with the results

    def ahead(self, cells: Sequence[Cell]) -> Ahead:
        """What some cells, and all that they need, still lack.

        Args:
            cells: Cells of the plan.
        """
        left = [cell for cell in cells if self.figures(cell) is None]
        searched = dict.fromkeys(map(self.searched, left)) if len(self.rates) > 1 else {}
        searches = [
            (cell, rate)
            for cell in searched
            for rate in self.rates
            if _read(self.folder(cell, rate, search=True)) is None
        ]
        wanting = [*(cell for cell, _ in searches), *left]
        folders = dict.fromkeys(self.pretrained(c) for c in wanting if ARMS.get(c.arm) is not None)
        return Ahead(left, searches, [path for path in folders if not _is_pretrained(path)])

    def rate(self, cell: Cell) -> float | None:
        """The learning rate of a cell, or None while its search is not finished."""
        if len(self.rates) == 1:
            return self.rates[0]
        searched = self.searched(cell)
        results = [_read(self.folder(searched, rate, search=True)) for rate in self.rates]
        if None in results:
            return None
        scores = [-1.0 if not result or result.get("AP") is None else result["AP"] for result in results]
        return max(sorted(self.rates), key=dict(zip(self.rates, scores, strict=True)).__getitem__)

    def figures(self, cell: Cell) -> dict[str, Any] | None:
        """What `aligndet evaluate` has written for a cell, or None."""
        rate = self.rate(cell)
        return None if rate is None else _read(self.folder(cell, rate))

    def search_ap(self, cell: Cell) -> list[float | None] | None:
        """AP of each rate in a finished search, in ascending order; None where training has diverged."""
        folders = (self.folder(self.searched(cell), rate, search=True) for rate in sorted(self.rates))
        return [(_read(f) or {}).get("AP") for f in folders] if len(self.rates) > 1 else None

    def searched(self, cell: Cell) -> Cell:
        """The cell whose search chooses the learning rate of a cell."""
        return Cell(cell.fraction, cell.steps, *self.first, cell.arm)

    def folder(self, cell: Cell, rate: float, *, search: bool = False) -> Path:
        """The run folder of a cell, or of its search."""
        return self.output / ("search" if search else "cells") / cell.name(rate)

    def pretrained(self, cell: Cell) -> Path:
        """Folder of the pre-training that a cell needs, which the cells of a seed share."""
        return self.output / "pretrained" / f"{cell.arm if ARMS[cell.arm] else 'aligndet'}_seed{cell.seed}"

    def write_labels(self, cell: Cell, *, search: bool) -> tuple[Path, Path, Path | None]:
        """Writes the labels of a cell: to train on, and to measure by, with the folder of their images."""
        subset = labelled_subset(self.labels.document, cell.fraction, cell.fold)
        path = self.output / "labels" / f"{cell.fraction:g}_fold{cell.fold}.json"
        if not search:
            atomic_write(path, json.dumps(subset))
            return path, *self.labels.validation
        paths = path.with_suffix(".search.json"), path.with_suffix(".held_out.json")
        for path, part in zip(paths, hold_out(subset), strict=True):
            atomic_write(path, json.dumps(part))
        return *paths, self.labels.images

    def finetune(self, cell: Cell, rate: float, labels: Path, start: Path | None, folder: Path) -> None:
        """Fine-tunes a cell, with the same settings for all arms."""
        kind, optimizer = self.model["detector"], self.finetuning.get("optimizer", "adamw")
        decay = training_defaults(kind, optimizer)["weight_decay"]
        alike = detector_settings(kind, self.pretraining, self.finetuning)
        finetune(
            labels,
            images=self.labels.images,
            output=folder,
            init_from=start,
            init=("trunk",) if cell.arm == "trunk-only" else tuple(MODULES),
            steps=cell.steps,
            seed=cell.seed,
            learning_rate=rate,
            resume=folder.is_dir(),
            **{"weight_decay": decay, **self.model, **self.finetuning, **alike},
        )

    def evaluate(self, folder: Path, labels: Path, images: Path | None, *, details: bool) -> None:
        """Measures the cell in a folder."""
        evaluate(
            folder / "model",
            labels,
            images=images,
            output=folder / "result.json",
            details=details,
            batch_size=min(8, self.finetuning.get("batch_size", 8)),
            device=_device(self.finetuning),
        )

    def pretrain(self, seed: int, settings: dict[str, Any], folder: Path) -> None:
        """Pre-trains for the cells of a seed, with the settings of an arm overriding the common ones."""
        proposals = self._proposed()
        pretrain(
            self.unlabelled,
            proposals=proposals,
            names=self._unseen(proposals),
            output=folder,
            seed=seed,
            resume=folder.is_dir(),
            **{**self.model, **self.pretraining, **settings},
        )

    def _unseen(self, proposals: Path) -> Path | None:
        """A list of the images for pre-training without validation images; None if it has none of these."""
        names = read_proposals(proposals).file_names
        files = zip(names, image_files(self.unlabelled, names), strict=True)
        kept = [name for name, file in files if file not in self.labels.validation_files]
        if len(kept) == len(names):
            return None
        if not kept:
            raise ValueError(
                f"{self.unlabelled}: all of its images are measured on; give others --unlabelled"
            )
        print(f"{len(names) - len(kept)} validation images are left out of pre-training")
        path = (self.output / "unlabelled.txt").resolve()
        atomic_write(path, "\n".join(kept) + "\n")
        return path

    def _photographs(self) -> Path | None:
        """A list of the images without our own plots; None if these lie elsewhere."""
        images, ours = self.unlabelled.resolve(), self.locks.parent
        if not ours.is_relative_to(images):
            return None
        names = without_ours(ImageSource(images).names(), images, ours)
        path = ours / "images.txt"
        atomic_write(path, "\n".join(names) + "\n")
        return path

    def _proposed(self) -> Path:
        """The folder of the proposals; makes them, and their clusters, if need be."""
        folder = self.proposals
        kind, options = self.model["detector"], self.pretraining.get("options") or {}
        with locked(self.locks / "proposals", wait=True):
            if self.proposing is not None:
                propose(self.unlabelled, output=folder, names=self._photographs(), **self.proposing)
            wanted = family_of(kind).weights_format == "transformers" and not options.get("objectness")
            if wanted and not clusters_file(folder).is_file():
                cluster(
                    self.unlabelled,
                    proposals=folder,
                    trunk=self.model["trunk"],
                    trunk_weights=self.model["trunk_weights"],
                    clusters=options.get("num_clusters", 256),
                    device=_device(self.pretraining),
                )
        return folder


@dataclass
class Runner:
    """Runs cells and makes what they need, each once; notes what fails and how long the rest takes."""

    bench: Bench
    failures: dict[str, str] = field(default_factory=dict)  # messages by cell
    tunings: list[tuple[float, int]] = field(default_factory=list)  # seconds and steps
    pretrainings: list[float] = field(default_factory=list)  # seconds
    lost: dict[Path, str] = field(default_factory=dict)  # messages by pre-training that has failed

    def run_all(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Runs the cells that are not finished; where one fails, that is noted and the others go on.

        Args:
            cells: In the order of the plan.

        Yields:
            Each cell that has been run.
        """
        bench = self.bench
        unfinished = bench.ahead(cells).cells
        for cell in set(cells).difference(unfinished):
            _without_checkpoints(bench.folder(cell, bench.rate(cell) or 0))  # left if it was stopped
        for index, cell in enumerate(unfinished):
            try:
                self._run(cell, f"cell {index + 1} of {len(unfinished)}", unfinished[index:])
            except (FloatingPointError, ValueError) as error:
                name = cell.name(bench.rate(cell) or 0).removesuffix("_lr0")
                name = f"{bench.model['detector']}, {name}"
                self.failures[name] = str(error)
                print(f"== failed: {name}: {error}", flush=True)
            else:
                yield cell

    def _run(self, cell: Cell, title: str, ahead: Sequence[Cell]) -> None:
        """Runs a cell and whatever it needs."""
        for searched, rate in self.bench.ahead([cell]).searches:
            self._tune(searched, rate, f"search of a learning rate{self._left(ahead)}", search=True)
        chosen = self.bench.rate(cell)
        assert chosen is not None  # its search is complete
        self._tune(cell, chosen, title + self._left(ahead))

    def _left(self, cells: Sequence[Cell]) -> str:
        """How long some cells will take, judged by those that have been run."""
        if not self.tunings:
            return ""
        ahead = self.bench.ahead(cells)
        seconds, steps = map(sum, zip(*self.tunings, strict=True))
        steps_left = sum(cell.steps for cell in [*ahead.cells, *(cell for cell, _ in ahead.searches)])
        seconds_left = seconds / steps * steps_left
        if self.pretrainings:
            seconds_left += sum(self.pretrainings) / len(self.pretrainings) * len(ahead.pretrainings)
        return f", about {seconds_left / 60:.0f} min left"

    def _tune(self, cell: Cell, rate: float, title: str, *, search: bool = False) -> None:
        folder = self.bench.folder(cell, rate, search=search)
        with locked(self.bench.output / ".locks" / f"{folder.parent.name}_{folder.name}", wait=True):
            if _read(folder) is not None:  # made while this waited
                return
            labels, val_labels, val_images = self.bench.write_labels(cell, search=search)
            is_tuned = (folder / "model" / "manifest.json").is_file()
            start = None if is_tuned else self._start(cell)
            print(f"== {title}: {self.bench.model['detector']}, {folder.name}", flush=True)
            begun = time.monotonic()
            try:
                if not is_tuned:
                    self.bench.finetune(cell, rate, labels, start, folder)
            except FloatingPointError as error:
                if not search:
                    raise
                print(f"learning rate {rate:g} loses, as training diverges: {error}", flush=True)
                atomic_write(folder / "result.json", json.dumps({"AP": None, "failed": str(error)}))
            else:
                self.bench.evaluate(folder, val_labels, val_images, details=not search)
            _without_checkpoints(folder)
            self.tunings.append((time.monotonic() - begun, cell.steps))

    def _start(self, cell: Cell) -> Path | None:
        """What a cell is fine-tuned from; a pre-training is made once for each seed."""
        if cell.arm in self.bench.sources:
            return self.bench.sources[cell.arm].path
        settings = ARMS[cell.arm]
        if settings is None:
            return None
        folder = self.bench.pretrained(cell)
        with locked(self.bench.output / ".locks" / f"pretrained_{folder.name}", wait=True):
            if not _is_pretrained(folder):
                if folder in self.lost:  # would fail again
                    raise ValueError(self.lost[folder])
                print(f"== pre-training: {self.bench.model['detector']}, {folder.name}", flush=True)
                begun = time.monotonic()
                try:
                    self.bench.pretrain(cell.seed, settings, folder)
                except (FloatingPointError, ValueError) as error:
                    self.lost[folder] = str(error)
                    raise
                self.pretrainings.append(time.monotonic() - begun)
        return folder


def _without_checkpoints(folder: Path) -> None:
    """Leaves a finished cell its weights; checkpoints are three times as large."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _is_pretrained(folder: Path) -> bool:
    return (folder / "pretrained" / "manifest.json").is_file()


def _device(settings: Mapping[str, Any]) -> str:
    """Where `evaluate` and `cluster` compute when training has such settings."""
    return "cpu" if settings.get("accelerator") == "cpu" else "auto"


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    return read_json(path) if path.is_file() else None
