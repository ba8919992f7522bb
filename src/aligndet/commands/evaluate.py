"""`aligndet evaluate`: COCO's figures of a detector on labelled images."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from aligndet.commands._settings import check_bounds
from aligndet.data.coco import Category, CocoDetection, check_objects
from aligndet.data.formats import read_labelled
from aligndet.data.images import readable
from aligndet.detectors.build import family_of
from aligndet.detectors.weights import load_tuned, weights_folder
from aligndet.evaluation.coco import CocoEvaluator, CocoResult, distinct_names
from aligndet.evaluation.details import Details, DetailsEvaluator
from aligndet.evaluation.inference import predict_images, resolve_device
from aligndet.files import accepts_strings, atomic_write, check_file, fingerprint, print_skipped


@accepts_strings
def evaluate(
    model: Path,
    annotations: Path,
    *,
    images: Path | None = None,
    output: Path | None = None,
    masks: bool = True,
    details: bool = False,
    score: float = 0.3,
    batch_size: int = 8,
    device: str = "auto",
    strict: bool = False,
) -> CocoResult:
    """Measures a detector: COCO's twelve figures and average precision by class, of boxes and of masks if it
    finds masks.

    Args:
        model: Folder of `aligndet finetune`.
        annotations: COCO JSON, PASCAL VOC or YOLO (file or folder), with the classes of the detector.
        images: Folder of the images; by default looked for.
        output: JSON file for the figures, and for what was left out or clipped.
            Named RUN.json beside the folder RUN, `aligndet report RUN` shows them.
        masks: Measure masks if the detector finds them; false for labels without masks.
        details: Of boxes at IoU 0.5, by class: precision, recall and F1 at --score and at the best score; how
            many errors there are of each kind and what they cost (TIDE); which classes are taken for which.
            The file for the figures holds the confusion matrix, the curves over the score and precision
            against recall, too; their pictures lie beside it, under its name with _files.
        score: Boxes below are left out of the details.
        batch_size: Images at a time; one by one where masks are found, which are large.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        strict: A broken image or box is an error; by default it is left out, counted and named.

    Returns:
        The figures in 0..1.

    Raises:
        ValueError: If the detector's classes are not those of the labels, these have no masks to measure
            those of the detector by, or no object at all, score is not from 0 to 1, or a file is missing or
            broken.
    """
    check_bounds({"score": score, "batch_size": batch_size})
    if output is not None:
        check_file(output)
        if details:
            import_module("aligndet.reporting.details")  # an error before the work if matplotlib is missing
    detector, manifest = load_tuned(model)
    categories = [
        Category(*pair) for pair in zip(manifest["category_ids"], manifest["class_names"], strict=True)
    ]
    masks = masks and family_of(manifest["architecture"]["detector"]).masks
    coco = read_labelled(annotations, images, split="val", strict=strict, categories=categories, masks=masks)
    check_objects(coco, annotations)
    dataset = CocoDetection(coco, crowds=True)
    broken: list[str] = []
    found = readable(dataset.__getitem__, range(len(dataset)), strict=strict, broken=broken)
    evaluator = CocoEvaluator(categories, masks=masks)
    detailed = DetailsEvaluator(distinct_names(categories), score=score)
    predictions = predict_images(detector, found, device=resolve_device(device), batch_size=batch_size)
    for (_, target), prediction in tqdm(predictions, total=len(dataset), desc="evaluate", unit="image"):
        evaluator.update([prediction], [target])
        if details:
            detailed.update(prediction, target)
    result = evaluator.compute()
    if details:
        result = replace(result, details=detailed.compute())
    print(result.table())
    print_skipped(broken)
    remarks = f", {len(coco.warnings)} remarks on the labels (see above)" if coco.warnings else ""
    print(f"{result.images} images, {len(broken)} skipped{remarks}")
    if output is not None:
        weights = fingerprint(weights_folder(model) / "model.safetensors")
        notes = {
            "skipped": broken,
            "warnings": coco.warnings,
            "annotations": str(annotations),
            "weights": weights,
        }
        atomic_write(output, json.dumps({**result.to_dict(), **notes}, indent=2) + "\n")
        if result.details is not None:
            _draw(result.details, model, output.with_name(f"{output.stem}_files"))
    return result


def _draw(details: Details, model: Path, folder: Path) -> None:
    from aligndet.reporting.details import detail_plots  # late: matplotlib takes its time
    from aligndet.reporting.plots import colours_of

    name = model.resolve().name
    for plot in detail_plots("details", "", {name: [details.to_dict()]}, colours_of([name])):
        atomic_write(folder / f"{plot.name}.png", plot.png)
