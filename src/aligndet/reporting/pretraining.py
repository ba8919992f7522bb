"""What pre-training has seen and changed: proposals, and the paper's figures 4 and 5."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from aligndet.data.coco import CocoDataset
from aligndet.data.images import first_images, read_image, readable
from aligndet.data.sources import ImageSource
from aligndet.evaluation.centers import predicted_centers
from aligndet.evaluation.drawing import draw_boxes, draw_centers, to_jpeg
from aligndet.evaluation.inference import resolve_device
from aligndet.evaluation.pretraining import load_pretrainable, load_untuned, read_settings
from aligndet.evaluation.tsne import embed_boxes
from aligndet.proposals.storage import read_proposals
from aligndet.reporting.pictures import Pictures, fit
from aligndet.reporting.plots import Plot, draw_points

_SIDES = ("random", "pre-trained")
_CENTERS = 100  # of an image


def first_pretrained(runs: Iterable[Path]) -> Path | None:
    """The first run of `aligndet pretrain` that has come to its end."""
    return next((run for run in runs if (run / "pretrained" / "manifest.json").is_file()), None)


def proposal_pictures(name: str, run: Path, *, count: int) -> list[Pictures]:
    """Proposals on images that pre-training has seen.

    Args:
        name: Of the files.
        run: Of `aligndet pretrain`.
        count: Of images, the first that have proposals.

    Returns:
        One set of pictures, or none if images or proposals are no longer where the run has found them.

    Raises:
        ValueError: Naming the file that cannot be read.
    """
    settings = read_settings(run)
    images, proposals = Path(settings["images"]), Path(settings["proposals"])
    if not (images.exists() and proposals.exists()):
        return []
    source = ImageSource(images)
    table = read_proposals(proposals)

    def draw(index: int) -> tuple[str, tuple[bytes, ...]]:
        image, scale = fit(read_image(source / table.file_names[index]))
        boxes = table.boxes_of(index)[: settings["max_proposals"]] * scale
        return table.file_names[index], (to_jpeg(draw_boxes(image, boxes)),)

    with_boxes = np.flatnonzero(np.diff(table.offsets)).tolist()
    rows = list(islice(readable(draw, with_boxes, strict=False, broken=[]), count))
    note = f"The first {settings['max_proposals']} of each image, which stand for labels in pre-training."
    return [Pictures(f"{name}_proposals", "Proposals", note, ("",), rows)]


def center_pictures(name: str, run: Path, images: Path, *, count: int) -> Pictures:
    """Centres of predicted boxes before fine-tuning, from random and from pre-trained neck and heads.

    Args:
        name: Of the files.
        run: Of `aligndet pretrain`.
        images: Folder; its first images by name are taken.
        count: Of images.

    Raises:
        ValueError: Naming the weights or the image that cannot be read.
    """
    pair, device = load_untuned(run), resolve_device("auto")
    rows = []
    for file_name, image in first_images(images, count):
        shown, scale = fit(image)
        points = [predicted_centers(side, image, count=_CENTERS, device=device).numpy() for side in pair]
        drawn = tuple(to_jpeg(draw_centers(shown, found * scale)) for found in points)
        rows.append((file_name, drawn))
    note = (
        f"Of the {_CENTERS} boxes that the detector is surest of before it has seen a label: after"
        " pre-training they should lie on objects."
    )
    return Pictures(f"{name}_centers", "Centres of predicted boxes before fine-tuning", note, _SIDES, rows)


def feature_plots(name: str, run: Path, coco: CocoDataset) -> list[Plot]:
    """t-SNE of the contrast features of labelled boxes, coloured by class and by pyramid level.

    Args:
        name: Start of the names of the files.
        run: Of `aligndet pretrain`, with its last checkpoint.
        coco: Labelled images.

    Raises:
        ValueError: Naming the checkpoint that is missing, or the labels that are too few.
    """
    settings = read_settings(run)
    sizes = {"min_size": settings["min_size"][1], "max_size": settings["max_size"]}
    embedded = embed_boxes(load_pretrainable(run), coco, **sizes, device=resolve_device("auto"))
    panels = dict(zip(_SIDES, (embedded.before, embedded.after), strict=True))
    title = "Contrast features of labelled boxes (t-SNE), by"
    by_class, by_level = (
        "Each point is a labelled box: after pre-training, those of a class should lie together.",
        "The same points by the level that their size belongs to: a class should not fall apart into levels.",
    )
    return [
        draw_points(f"{name}_features_class", f"{title} class", panels, embedded.classes, note=by_class),
        draw_points(
            f"{name}_features_level",
            f"{title} pyramid level",
            panels,
            embedded.levels,
            note=by_level,
        ),
    ]
