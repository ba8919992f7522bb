"""`aligndet report`: what runs and comparisons have found, in one HTML page."""

from __future__ import annotations

from pathlib import Path

from aligndet.files import accepts_strings, atomic_write


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
        runs: Folders of `aligndet compare`, `quickstart`, `finetune`, `pretrain` or `pretrain-backbone`.
        output: The HTML file; one that is there is replaced.
        plots: Folder for the plots as PNG files; by default beside the page, under its name with _files.
        images: Folder of images for predictions of two detectors side by side: scratch and the best other
            arm of a comparison, or the first two fine-tunings; and for the centres of predicted boxes before
            fine-tuning, random and pre-trained, if there is a run of `aligndet pretrain`.
        annotations: Labelled images (COCO JSON, PASCAL VOC or YOLO) for the contrast features of their boxes
            before and after pre-training (t-SNE), if there is such a run with its last checkpoint.
        count: Of these images, the first by name.
        score: Boxes below are left out.

    Returns:
        The page.

    Raises:
        ImportError: If Jinja2, matplotlib or scikit-learn is not installed.
        ValueError: Naming the folder that is no run, or the file that cannot be read.
    """
    from aligndet.data.formats import read_labelled
    from aligndet.reporting.figures import comparison_plots, run_plots  # late: --help works without them
    from aligndet.reporting.page import render
    from aligndet.reporting.pictures import Pictures, draw_sides, sides_of
    from aligndet.reporting.plots import Plot
    from aligndet.reporting.pretraining import center_plots, feature_plots, pretraining_of
    from aligndet.reporting.runs import read_folders

    if not runs:
        raise ValueError("runs: give at least one folder")
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; give the name of an HTML file")
    comparisons, single = read_folders([Path(folder) for folder in runs])
    drawn = [(c, comparison_plots(c, f"comparison{i + 1}")) for i, c in enumerate(comparisons)]
    of_runs = run_plots(single)
    sides = sides_of(comparisons, single)
    pictures: Pictures | str = "No images were given: --images FOLDER shows predictions of two detectors."
    if images is not None and len(sides) < 2:
        pictures = "There are no two fine-tuned detectors to show: their folders hold no model."
    elif images is not None:
        pictures = draw_sides(sides, images, count=count, score=score)
    looked_into: list[Plot] = []
    pretrained = pretraining_of(comparisons, single)
    if pretrained is None and annotations is not None:
        raise ValueError("--annotations: there is no finished run of `aligndet pretrain` to look into")
    if pretrained is not None and annotations is not None:
        looked_into += feature_plots(pretrained, read_labelled(annotations))
    if pretrained is not None and images is not None:
        looked_into += center_plots(pretrained, images, count=count)
    page = render(drawn, single, of_runs, looked_into, pictures)
    folder = plots or output.with_name(f"{output.stem}_files")
    for plot in [plot for _, some in drawn for plot in some] + of_runs + looked_into:
        atomic_write(folder / f"{plot.name}.png", plot.png)
    atomic_write(output, page)
    print(f"report: {output}, its plots: {folder}")
    return output
