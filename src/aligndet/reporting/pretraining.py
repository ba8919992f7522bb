"""What pre-training has changed: the paper's figures 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchvision.transforms import v2

from aligndet.data.coco import CocoDataset
from aligndet.data.images import list_images, read_image
from aligndet.evaluation.centers import predicted_centers
from aligndet.evaluation.inference import resolve_device
from aligndet.evaluation.pretraining import load_pretrainable, load_untuned, read_settings
from aligndet.evaluation.tsne import embed_boxes
from aligndet.reporting.plots import Plot, draw_centers, draw_points
from aligndet.reporting.runs import Comparison, Run

_SIDES = ("random", "pre-trained")
_SIDE = 480  # pixels of a picture on the page
_CENTERS = 100  # of an image


def pretraining_of(comparisons: Sequence[Comparison], runs: Sequence[Run]) -> Path | None:
    """Chooses the pre-training to look into.

    Args:
        comparisons: Whose first pre-training counts if there is no single run of one.
        runs: The first that has come to its end is taken.

    Returns:
        Its folder, or None.
    """
    folders = [run.folder for run in runs]
    for comparison in comparisons:
        folders += sorted((comparison.folder / "pretrained").glob("aligndet_seed*"))
    return next((f for f in folders if (f / "pretrained" / "manifest.json").is_file()), None)


def center_plots(run: Path, images: Path, *, count: int) -> list[Plot]:
    """Centres of predicted boxes before fine-tuning, from random and from pre-trained neck and heads.

    Args:
        run: Of `aligndet pretrain`.
        images: Folder; its first images by name are taken.
        count: Of images.

    Raises:
        ValueError: Naming the weights or the image that cannot be read.
    """
    pair, device = load_untuned(run), resolve_device("auto")
    plots = []
    for number, name in enumerate(list_images(images)[:count], 1):
        image = read_image(images / name)
        points = [predicted_centers(side, image, count=_CENTERS, device=device).numpy() for side in pair]
        shown = (
            v2.functional.resize(image, [_SIDE], max_size=2 * _SIDE)
            if min(image.shape[1:]) > _SIDE
            else image
        )
        scale = shown.shape[2] / image.shape[2]
        panels = {side: scale * found for side, found in zip(_SIDES, points, strict=True)}
        title = f"Centres of predicted boxes before fine-tuning, {name}"
        plots.append(draw_centers(f"centers{number}", title, shown.permute(1, 2, 0).numpy(), panels))
    return plots


def feature_plots(run: Path, coco: CocoDataset) -> list[Plot]:
    """t-SNE of the contrast features of labelled boxes, coloured by class and by pyramid level.

    Args:
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
    return [
        draw_points("features_class", f"{title} class", panels, embedded.classes),
        draw_points("features_level", f"{title} pyramid level", panels, embedded.levels),
    ]
