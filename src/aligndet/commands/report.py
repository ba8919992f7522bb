"""`aligndet report`: what runs and comparisons have found, in one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligndet.files import accepts_strings, atomic_write, check_file

if TYPE_CHECKING:
    from aligndet.data.coco import CocoDataset
    from aligndet.reporting.page import Part
    from aligndet.reporting.plots import Plot
    from aligndet.reporting.runs import Run


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
    from aligndet.reporting.figures import comparison_plots, pretraining_losses, run_plots
    from aligndet.reporting.page import Part, comparison_section, render, runs_section
    from aligndet.reporting.pictures import sides_of
    from aligndet.reporting.pretraining import first_pretrained
    from aligndet.reporting.runs import read_folders, read_run

    if not runs:
        raise ValueError("runs: give at least one folder")
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    check_file(output, "an HTML file")
    plots = plots or output.with_name(f"{output.stem}_files")
    ours = {output.resolve(), plots.resolve()}  # of an earlier call, as in runs/*
    comparisons, single = read_folders(
        [path for folder in runs if (path := Path(folder)).resolve() not in ours]
    )
    labelled = None
    if annotations is not None:
        try:
            labelled = read_labelled(annotations)
        except ValueError:  # its images are not where they are looked for
            if images is None:
                raise
            labelled = read_labelled(annotations, images)
    given: dict[str, Any] = {"images": images, "labelled": labelled, "count": count}
    sections = []
    for index, comparison in enumerate(comparisons, 1):
        prefix = f"comparison{index}"
        parts = [
            Part("Figures", comparison_plots(comparison, prefix)),
            _predictions(prefix, sides_of(comparison), score=score, **given),
        ]
        run = first_pretrained(sorted((comparison.folder / "pretrained").glob("aligndet_seed*")))
        if run is not None:
            losses = pretraining_losses(f"{prefix}_pretraining", read_run(run))
            parts.append(_pretraining(prefix, run, losses, **given))
        sections.append(comparison_section(comparison, parts))
    if single:
        sides = [(run.name, run) for run in single if run.model is not None][:2]
        parts = [Part("Figures", run_plots(single)), _predictions("runs", sides, score=score, **given)]
        run = first_pretrained(run.folder for run in single)
        if run is not None:
            parts.append(_pretraining("runs", run, [], **given))
        sections.append(runs_section(single, parts))
    page = render(sections)
    for part in [part for section in sections for part in section.parts]:
        for plot in part.plots:
            atomic_write(plots / f"{plot.name}.png", plot.png)
        for shown in part.pictures:
            for number, (_, drawn) in enumerate(shown.rows, 1):
                for side, picture in enumerate(drawn, 1):
                    atomic_write(plots / f"{shown.name}{number}_{side}.jpg", picture)
    atomic_write(output, page)
    print(f"report: {output}, its plots: {plots}")
    return output


def _predictions(
    prefix: str,
    sides: list[tuple[str, Run]],
    *,
    images: Path | None,
    labelled: CocoDataset | None,
    count: int,
    score: float,
) -> Part:
    """Predictions of two detectors side by side."""
    from aligndet.reporting.page import Part
    from aligndet.reporting.pictures import draw_sides

    title = "Predictions"
    if images is None:
        return Part(title, note="No images were given: --images FOLDER shows predictions of two detectors.")
    if len(sides) < 2:
        note = "There are no two fine-tuned detectors to show: their folders hold no model."
        return Part(title, note=note)
    name = f"{prefix}_predictions"
    return Part(title, [], [draw_sides(name, sides, images, labelled, count=count, score=score)])


def _pretraining(
    prefix: str,
    run: Path,
    plots: list[Plot],
    *,
    images: Path | None,
    labelled: CocoDataset | None,
    count: int,
) -> Part:
    """What pre-training has seen and changed."""
    from aligndet.reporting.page import Part
    from aligndet.reporting.pretraining import center_pictures, feature_plots, proposal_pictures

    pictures = []
    try:
        pictures += proposal_pictures(prefix, run, count=count)
    except ValueError as error:
        print(f"no proposals of {run}: {error}")
    if labelled is not None:
        try:
            plots = plots + feature_plots(prefix, run, labelled)
        except ValueError as error:
            print(f"no t-SNE of {run}: {error}")
    if images is not None:
        pictures.append(center_pictures(prefix, run, images, count=count))
    return Part("Pre-training", plots, pictures)
