"""The cells of `aligndet compare`: each a fine-tuning of its own, with whatever it needs made once."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aligndet.commands._settings import provenance
from aligndet.commands.cluster import cluster
from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose
from aligndet.comparison import BASELINE, Cell, hold_out, labelled_subset, rows_of
from aligndet.data.coco import image_files
from aligndet.detectors.build import family_of, training_defaults
from aligndet.detectors.weights import MODULES
from aligndet.files import atomic_write, locked, read_json
from aligndet.proposals.clusters import clusters_file
from aligndet.proposals.storage import read_proposals
from aligndet.verdicts import markdown

ARMS: dict[str, dict[str, Any] | None] = {  # settings of pre-training; None: there is none
    BASELINE: None,
    "trunk-only": {},
    "boxes-only": {"contrast_weight": 0.0},
    "contrast-only": {"box_weight": 0.0},
    "aligndet": {},
}


def detector_settings(
    detector: str, pretraining: dict[str, Any], finetuning: dict[str, Any]
) -> dict[str, Any]:
    """Settings of fine-tuning that make the detectors of all arms alike, pre-trained or not.

    Args:
        detector: A key of `DETECTORS`.
        pretraining: Settings of `aligndet pretrain`.
        finetuning: Of `aligndet finetune`; they come first.

    Returns:
        Its ``options``, and ``fpn_norm`` if it is set.
    """
    shared = family_of(detector).shared_options()
    given = {name: value for name, value in (pretraining.get("options") or {}).items() if name in shared}
    norm = finetuning.get("fpn_norm") or pretraining.get("fpn_norm")
    options = given | (finetuning.get("options") or {})
    return {"options": options or None} | ({"fpn_norm": norm} if norm else {})


@dataclass
class Bench:
    """What the cells of one detector have in common."""

    output: Path
    document: dict[str, Any]
    images: Path
    validation: tuple[Path, Path | None]
    measured: frozenset[str]  # its images' files
    unlabelled: Path
    proposals: Path  # written there first if it is not the user's
    locks: Path  # of what several detectors share
    proposing: dict[str, Any] | None  # settings of `aligndet propose`; None: they are the user's
    sources: dict[str, Path]
    rates: tuple[float, ...]
    model: dict[str, Any]
    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    first: tuple[int, int]  # seed and fold of the search

    def run_all(self, cells: Sequence[Cell]) -> None:
        """Runs the cells that are not finished, and says what is ahead."""
        seconds: list[float] = []
        for index, cell in enumerate(cells):
            left = (
                f", about {sum(seconds) / len(seconds) * (len(cells) - index) / 60:.0f} min"
                if seconds
                else ""
            )
            name = f"{self.model['detector']}, {cell.name(self.rates[0])}"
            print(f"== cell {index + 1} of {len(cells)}{left}: {name}", flush=True)
            begun = time.monotonic()
            if self.run(cell):
                seconds.append(time.monotonic() - begun)

    def pretrains(self, cells: Sequence[Cell]) -> bool:
        """Whether a cell that is not finished wants a pre-training that is not there."""
        return any(
            ARMS.get(cell.arm) is not None
            and self.figures(cell) is None
            and not (self._pretrained(cell) / "pretrained" / "manifest.json").is_file()
            for cell in cells
        )

    def run(self, cell: Cell) -> bool:
        """Runs a cell and whatever it needs; False if it is finished already."""
        rate = self.rate(cell)
        if rate is not None and _read(folder := self._folder(cell, rate)) is not None:
            _without_checkpoints(folder)  # if it was stopped before that
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

    def _search_ap(self, cell: Cell) -> list[float] | None:
        """What a finished search has found, in the order of the rates."""
        folders = (self._folder(self._searched(cell), rate, search=True) for rate in sorted(self.rates))
        return [(_read(f) or {}).get("AP") or 0.0 for f in folders] if len(self.rates) > 1 else None

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
                kind, optimizer = self.model["detector"], self.finetuning.get("optimizer", "adamw")
                decay = training_defaults(kind, optimizer)["weight_decay"]
                alike = detector_settings(kind, self.pretraining, self.finetuning)
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
                    **{"weight_decay": decay, **self.model, **self.finetuning, **alike},
                )
            result = folder / "result.json"
            evaluate(folder / "model", measured[0], images=measured[1], output=result, details=not search)
            _without_checkpoints(folder)

    def _start(self, cell: Cell) -> Path | None:
        """What a cell is fine-tuned from; a pre-training is made once for each seed."""
        if cell.arm in self.sources:
            return self.sources[cell.arm]
        settings = ARMS[cell.arm]
        if settings is None:
            return None
        folder = self._pretrained(cell)
        with locked(self.output / ".locks" / f"pretrained_{folder.name}", wait=True):
            if not (folder / "pretrained" / "manifest.json").is_file():
                proposals = self._proposed()
                pretrain(
                    self.unlabelled,
                    proposals=proposals,
                    names=self._unseen(proposals),
                    output=folder,
                    seed=cell.seed,
                    resume=folder.is_dir(),
                    **{**self.model, **self.pretraining, **settings},
                )
        return folder

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
                )
        return folder

    def write_results(self, cells: Sequence[Cell]) -> str:
        """Table, JSON and CSV of the cells that are finished, those of earlier calls among them."""
        path = self.output / "results.json"
        labels = {
            fraction: len(labelled_subset(self.document, fraction, 0)["images"])
            for fraction in {cell.fraction for cell in cells}
        }
        found = [
            {
                **asdict(cell),
                "labels": labels[cell.fraction],
                "learning_rate": self.rate(cell),
                "searched": sorted(self.rates),
                "search_AP": self._search_ap(cell),
                "figures": {n: value for n, value in figures.items() if n not in ("details", "warnings")},
            }
            for cell in cells
            if (figures := self.figures(cell)) is not None
        ]
        before = read_json(path)["cells"] if path.is_file() else []
        entries = [entry for entry in before if Cell.of(entry) not in cells] + found
        rows = rows_of(entries)
        table = markdown(rows) + f"\n{len(found)} of {len(cells)} cells finished\n"
        atomic_write(self.output / "table.md", table)
        atomic_write(path, json.dumps({"rows": rows, "cells": entries, **provenance()}, indent=2))
        text = io.StringIO()
        names = ["arm", "labels", "fraction", "steps", "fold", "seed", "learning_rate", "AP", "AP50", "AP75"]
        names += ["mask_AP"] if any("mask_AP" in entry["figures"] for entry in entries) else []
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for entry in entries:
            writer.writerow({**entry["figures"], **entry})
        atomic_write(self.output / "results.csv", text.getvalue())
        return table


def _without_checkpoints(folder: Path) -> None:
    """Leaves a finished cell its weights; checkpoints are three times as large."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    return read_json(path) if path.is_file() else None
