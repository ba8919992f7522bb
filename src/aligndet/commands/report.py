"""`aligndet report`: what runs and comparisons have found, in one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligndet.files import accepts_strings, atomic_write

if TYPE_CHECKING:
    from aligndet.data.coco import CocoDataset
    from aligndet.reporting.page import Part
    from aligndet.reporting.runs import Comparison, Run


@accepts_strings
def report(
    runs: tuple[Path, ...],
    *,
    output: Path,
    plots: Path | None = None,
    images: Path | None = None,
    annotations: Path | None = None,
    count: int = 4,
    score: float = 0.3,
) -> Path:
    """Writes one page that needs no other file and no network: tables, curves, pictures, settings.

    Args:
        runs: Folders of `aligndet compare`, `quickstart`, `finetune`, `pretrain` or `pretrain-backbone`; what
            `evaluate --output RUN.json` has written beside a RUN may be among them, as in runs/*. Of many
            runs, the nine best are drawn.
        output: The HTML file; one that is there is replaced.
        plots: Folder for the plots as PNG files; by default beside the page, under its name with _files.
        images: Folder of images for predictions of two detectors side by side: scratch and the best other
            arm of each comparison, or the first two fine-tunings; and for the centres of predicted boxes
            before fine-tuning, random and pre-trained, if there is a run of `aligndet pretrain`.
        annotations: Labelled images (COCO JSON, PASCAL VOC or YOLO): their labels stand beside predictions on
            the same images, and the contrast features of their boxes before and after pre-training are laid
            out (t-SNE), if there is such a run with its last checkpoint.
        count: Of these images, the first by name.
        score: Boxes below are left out.

    Returns:
        The page.

    Raises:
        ImportError: If Jinja2, matplotlib or scikit-learn is not installed.
        ValueError: Naming the folder that is no run, or the file that cannot be read.
    """
    # late: --help works without what these need
    from aligndet.data.formats import read_labelled
    from aligndet.reporting.figures import comparison_plots, run_plots
    from aligndet.reporting.page import Part, comparison_section, render, runs_section
    from aligndet.reporting.runs import read_folders

    if not runs:
        raise ValueError("runs: give at least one folder")
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; give the name of an HTML file")
    comparisons, single = read_folders([Path(folder) for folder in runs])
    labelled = None
    if annotations is not None:
        try:
            labelled = read_labelled(annotations)
        except ValueError:  # its images are not where they are looked for
            if images is None:
                raise
            labelled = read_labelled(annotations, images)
    given: dict[str, Any] = {"images": images, "labelled": labelled, "count": count, "score": score}
    sections = []
    for index, comparison in enumerate(comparisons, 1):
        prefix = f"comparison{index}"
        parts = [Part("Figures", comparison_plots(comparison, prefix))]
        sections.append(
            comparison_section(comparison, parts + _looked_into(prefix, [comparison], [], **given))
        )
    if single:
        parts = [Part("Figures", run_plots(single)), *_looked_into("runs", [], single, **given)]
        sections.append(runs_section(single, parts))
    page, folder = render(sections), plots or output.with_name(f"{output.stem}_files")
    for part in [part for section in sections for part in section.parts]:
        for plot in part.plots:
            atomic_write(folder / f"{plot.name}.png", plot.png)
        for shown in part.pictures:
            for number, (_, drawn) in enumerate(shown.rows, 1):
                for side, picture in enumerate(drawn, 1):
                    atomic_write(folder / f"{shown.name}{number}_{side}.jpg", picture)
    atomic_write(output, page)
    print(f"report: {output}, its plots: {folder}")
    return output


def _looked_into(
    prefix: str,
    comparisons: list[Comparison],
    runs: list[Run],
    *,
    images: Path | None,
    labelled: CocoDataset | None,
    count: int,
    score: float,
) -> list[Part]:
    """Predictions side by side, and what pre-training has seen and changed."""
    from aligndet.reporting.figures import pretraining_losses
    from aligndet.reporting.page import Part
    from aligndet.reporting.pictures import draw_sides, sides_of
    from aligndet.reporting.pretraining import (
        center_pictures,
        feature_plots,
        pretraining_of,
        proposal_pictures,
    )
    from aligndet.reporting.runs import read_run

    sides, title = sides_of(comparisons, runs), "Predictions"
    if images is None:
        parts = [
            Part(title, note="No images were given: --images FOLDER shows predictions of two detectors.")
        ]
    elif len(sides) < 2:
        note = "There are no two fine-tuned detectors to show: their folders hold no model."
        parts = [Part(title, note=note)]
    else:
        name = f"{prefix}_predictions"
        parts = [Part(title, [], [draw_sides(name, sides, images, labelled, count=count, score=score)])]
    run = pretraining_of(comparisons, runs)
    if run is not None:
        plots = pretraining_losses(f"{prefix}_pretraining", read_run(run)) if comparisons else []
        pictures = proposal_pictures(prefix, run, count=count)
        if labelled is not None:
            try:
                plots += feature_plots(prefix, run, labelled)
            except ValueError as error:
                print(f"no t-SNE of {run}: {error}")
        if images is not None:
            pictures.append(center_pictures(prefix, run, images, count=count))
        parts.append(Part("Pre-training", plots, pictures))
    return parts
