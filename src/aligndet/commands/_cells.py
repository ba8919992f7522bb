"""The cells of `aligndet compare`: each a fine-tuning of its own, with whatever it needs made once."""

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


@dataclass
class Bench:
    """What the cells of one detector have in common."""

    output: Path
    document: dict[str, Any]
    labels: dict[float, int]  # numbers of labelled images by fraction
    images: Path
    validation: tuple[Path, Path | None]
    measured: frozenset[str]  # its images' files
    unlabelled: Path
    proposals: Path  # written there first if it is not the user's
    locks: Path  # of what several detectors share
    proposing: dict[str, Any] | None  # settings of `aligndet propose`; None: they are the user's
    sources: dict[str, Source]
    rates: tuple[float, ...]
    model: dict[str, Any]
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    first: tuple[int, int]  # seed and fold of the search
    remarks: list[str]  # that belong to the results
    failures: dict[str, str] = field(default_factory=dict)  # messages by cell
    tunings: list[tuple[float, int]] = field(default_factory=list)  # seconds and steps
    pretrainings: list[float] = field(default_factory=list)  # seconds
    lost: dict[Path, str] = field(default_factory=dict)  # messages by pre-training that has failed

    def ahead(self, cells: Sequence[Cell]) -> Ahead:
        """What is not there yet of some cells, and of all that they need.

        Args:
            cells: Of the plan.
        """
        left = [cell for cell in cells if self.figures(cell) is None]
        searched = dict.fromkeys(map(self._searched, left)) if len(self.rates) > 1 else {}
        searches = [
            (cell, rate)
            for cell in searched
            for rate in self.rates
            if _read(self._folder(cell, rate, search=True)) is None
        ]
        wanting = [*(cell for cell, _ in searches), *left]
        folders = dict.fromkeys(self._pretrained(c) for c in wanting if ARMS.get(c.arm) is not None)
        return Ahead(left, searches, [path for path in folders if not _is_pretrained(path)])

    def run_all(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Runs the cells that are not finished; where one fails, that is noted and the others go on.

        Args:
            cells: In the order of the plan.

        Yields:
            Each cell that has been run.
        """
        todo = self.ahead(cells).cells
        for cell in set(cells).difference(todo):
            _without_checkpoints(self._folder(cell, self.rate(cell) or 0))  # if it was stopped before that
        for index, cell in enumerate(todo):
            try:
                self._run(cell, f"cell {index + 1} of {len(todo)}", todo[index:])
            except (FloatingPointError, ValueError) as error:
                name = f"{self.model['detector']}, {cell.name(self.rate(cell) or 0).removesuffix('_lr0')}"
                self.failures[name] = str(error)
                print(f"== failed: {name}: {error}", flush=True)
            else:
                yield cell

    def _run(self, cell: Cell, title: str, ahead: Sequence[Cell]) -> None:
        """Runs a cell and whatever it needs."""
        for searched, rate in self.ahead([cell]).searches:
            self._tune(searched, rate, f"search of a learning rate{self._left(ahead)}", search=True)
        chosen = self.rate(cell)
        assert chosen is not None  # all of its search is there
        self._tune(cell, chosen, title + self._left(ahead))

    def _left(self, cells: Sequence[Cell]) -> str:
        """How long some cells will take, by those that have been run."""
        if not self.tunings:
            return ""
        ahead = self.ahead(cells)
        seconds, steps = map(sum, zip(*self.tunings, strict=True))
        left = seconds / steps * sum(cell.steps for cell in [*ahead.cells, *(c for c, _ in ahead.searches)])
        if self.pretrainings:
            left += sum(self.pretrainings) / len(self.pretrainings) * len(ahead.pretrainings)
        return f", about {left / 60:.0f} min left"

    def _say(self, title: str, name: str) -> None:
        print(f"== {title}: {self.model['detector']}, {name}", flush=True)

    def rate(self, cell: Cell) -> float | None:
        """The learning rate of a cell, or None while its search is not finished."""
        if len(self.rates) == 1:
            return self.rates[0]
        searched = self._searched(cell)
        found = [_read(self._folder(searched, rate, search=True)) for rate in self.rates]
        if None in found:
            return None
        scores = [
            -1.0 if figures is None or figures.get("AP") is None else figures["AP"] for figures in found
        ]
        return self.rates[scores.index(max(scores))]

    def figures(self, cell: Cell) -> dict[str, Any] | None:
        """What `aligndet evaluate` has written for a cell, or None."""
        rate = self.rate(cell)
        return None if rate is None else _read(self._folder(cell, rate))

    def search_ap(self, cell: Cell) -> list[float | None] | None:
        """What a finished search has found, in the order of the rates; None where training has diverged."""
        folders = (self._folder(self._searched(cell), rate, search=True) for rate in sorted(self.rates))
        return [(_read(f) or {}).get("AP") for f in folders] if len(self.rates) > 1 else None

    def _searched(self, cell: Cell) -> Cell:
        return Cell(cell.fraction, cell.steps, *self.first, cell.arm)

    def _folder(self, cell: Cell, rate: float, *, search: bool = False) -> Path:
        return self.output / ("search" if search else "cells") / cell.name(rate)

    def _tune(self, cell: Cell, rate: float, title: str, *, search: bool = False) -> None:
        folder = self._folder(cell, rate, search=search)
        with locked(self.output / ".locks" / f"{folder.parent.name}_{folder.name}", wait=True):
            if _read(folder) is not None:  # made while this waited
                return
            labels, measured, images = self._data(cell, search)
            is_tuned, result = (folder / "model" / "manifest.json").is_file(), folder / "result.json"
            start = None if is_tuned else self._start(cell)
            self._say(title, folder.name)
            begun = time.monotonic()
            if not is_tuned:
                try:
                    self._finetune(cell, rate, labels, start, folder)
                except FloatingPointError as error:
                    if not search:
                        raise
                    print(f"learning rate {rate:g} loses, as training diverges: {error}", flush=True)
                    atomic_write(result, json.dumps({"AP": None, "failed": str(error)}))
            if not result.is_file():
                evaluate(
                    folder / "model",
                    measured,
                    images=images,
                    output=result,
                    details=not search,
                    batch_size=min(8, self.finetuning.get("batch_size", 8)),
                    device=_device(self.finetuning),
                )
            _without_checkpoints(folder)
            self.tunings.append((time.monotonic() - begun, cell.steps))

    def _data(self, cell: Cell, search: bool) -> tuple[Path, Path, Path | None]:
        """Labels to train on, labels to measure by, and the images of these."""
        subset = labelled_subset(self.document, cell.fraction, cell.fold)
        labels = self.output / "labels" / f"{cell.fraction:g}_fold{cell.fold}.json"
        if not search:
            atomic_write(labels, json.dumps(subset))
            return labels, *self.validation
        train, held_out = hold_out(subset)
        parts = labels.with_suffix(".search.json"), labels.with_suffix(".held_out.json")
        for path, part in zip(parts, (train, held_out), strict=True):
            atomic_write(path, json.dumps(part))
        return *parts, self.images

    def _finetune(self, cell: Cell, rate: float, labels: Path, start: Path | None, folder: Path) -> None:
        # the same for all arms
        kind, optimizer = self.model["detector"], self.finetuning.get("optimizer", "adamw")
        decay = training_defaults(kind, optimizer)["weight_decay"]
        alike = detector_settings(kind, self.pretraining, self.finetuning)
        finetune(
            labels,
            images=self.images,
            output=folder,
            init_from=start,
            init=("trunk",) if cell.arm == "trunk-only" else tuple(MODULES),
            steps=cell.steps,
            seed=cell.seed,
            learning_rate=rate,
            resume=folder.is_dir(),
            **{"weight_decay": decay, **self.model, **self.finetuning, **alike},
        )

    def _start(self, cell: Cell) -> Path | None:
        """What a cell is fine-tuned from; a pre-training is made once for each seed."""
        if cell.arm in self.sources:
            return self.sources[cell.arm].path
        settings = ARMS[cell.arm]
        if settings is None:
            return None
        folder = self._pretrained(cell)
        with locked(self.output / ".locks" / f"pretrained_{folder.name}", wait=True):
            if not _is_pretrained(folder):
                if folder in self.lost:  # would fail again
                    raise ValueError(self.lost[folder])
                self._say("pre-training", folder.name)
                begun = time.monotonic()
                try:
                    self._pretrain(cell.seed, settings, folder)
                except (FloatingPointError, ValueError) as error:
                    self.lost[folder] = str(error)
                    raise
                self.pretrainings.append(time.monotonic() - begun)
        return folder

    def _pretrain(self, seed: int, settings: dict[str, Any], folder: Path) -> None:
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

    def _pretrained(self, cell: Cell) -> Path:
        return self.output / "pretrained" / f"{cell.arm if ARMS[cell.arm] else 'aligndet'}_seed{cell.seed}"

    def _unseen(self, proposals: Path) -> Path | None:
        """A list of the images for pre-training without those that cells are measured on, if it has any."""
        names = read_proposals(proposals).file_names
        files = zip(names, image_files(self.unlabelled, names), strict=True)
        kept = [name for name, file in files if file not in self.measured]
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

    def _proposed(self) -> Path:
        folder = self.proposals
        kind, options = self.model["detector"], self.pretraining.get("options") or {}
        with locked(self.locks / "proposals", wait=True):
            if self.proposing is not None:
                propose(self.unlabelled, output=folder, **self.proposing)
            wanted = family_of(kind).weights_format == "transformers" and not options.get("objectness")
            if wanted and not clusters_file(folder).is_file():
                cluster(
                    self.unlabelled,
                    proposals=folder,
                    min_size=max(self.pretraining.get("min_size", (800,))),
                    max_size=self.pretraining.get("max_size", 1333),
                    trunk=self.model["trunk"],
                    trunk_weights=self.model["trunk_weights"],
                    clusters=options.get("num_clusters", 256),
                    device=_device(self.pretraining),
                )
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
