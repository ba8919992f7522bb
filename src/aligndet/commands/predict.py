"""`aligndet predict`: boxes, masks and pictures for images without labels."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from aligndet.data.images import ImageError, list_images, read_image
from aligndet.data.rle import encode
from aligndet.detectors.weights import load_detector
from aligndet.evaluation.drawing import draw_detections
from aligndet.evaluation.inference import predict_images, resolve_device
from aligndet.files import accepts_strings, atomic_write, locked


@accepts_strings
def predict(
    model: Path,
    images: Path,
    *,
    output: Path,
    score: float = 0.3,
    batch_size: int = 8,
    device: str = "auto",
    draw: bool = True,
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Finds objects in an image or in a folder of images.

    Args:
        model: Folder of `aligndet finetune`.
        images: An image, or a folder that is searched with its subfolders.
        output: Folder for predictions.json (COCO: images, categories, and annotations with scores, and
            segmentation if the detector finds masks) and pictures/.
        score: Boxes below are left out.
        batch_size: Images at a time.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        draw: Write pictures with the boxes.
        strict: A broken image is an error; by default it is skipped, counted and named.
        overwrite: Replace predictions that are there.

    Returns:
        The output folder.

    Raises:
        ValueError: If the model is not fine-tuned, no image can be read, or the output is taken or in use.
    """
    detector, manifest = load_detector(model)
    names: list[str] | None = manifest.get("class_names")
    if not names:
        raise ValueError(f"{model}: knows no classes yet; fine-tune it first")
    folder, files = (images.parent, [images.name]) if images.is_file() else (images, list_images(images))
    read: list[tuple[str, Tensor]] = []  # the images of the running batch only
    broken: list[str] = []

    def readable() -> Iterator[Tensor]:
        for name in files:
            try:
                image = read_image(folder / name)
            except ImageError as error:
                if strict:
                    raise
                broken.append(str(error))
                continue
            read.append((name, image))
            yield image

    categories = [{"id": i, "name": n} for i, n in zip(manifest["category_ids"], names, strict=True)]
    document: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}
    predictions = predict_images(detector, readable(), device=resolve_device(device), batch_size=batch_size)
    with locked(output):
        if (output / "predictions.json").exists() and not overwrite:
            raise ValueError(f"{output}: holds predictions already; give --overwrite or another output")
        for prediction in tqdm(predictions, total=len(files), desc="predict", unit="image"):
            name, image = read.pop(0)
            sure = prediction["scores"] >= score
            prediction = {key: value[sure] for key, value in prediction.items()}
            _add(document, name, image, prediction, manifest["category_ids"])
            if draw:
                drawn = draw_detections(image.permute(1, 2, 0).numpy(), prediction, names)
                buffer = io.BytesIO()
                Image.fromarray(drawn).save(buffer, "JPEG", quality=92)
                atomic_write(output / "pictures" / _picture_name(name), buffer.getvalue())
        if not document["images"]:
            raise ImageError(f"{images}: none of its {len(files)} images can be read; the first: {broken[0]}")
        atomic_write(output / "predictions.json", json.dumps(document))
    for message in broken[:10]:
        print(f"skipped: {message}")
    print(
        f"{len(document['images'])} images, {len(document['annotations'])} boxes,"
        f" {len(broken)} skipped: {output}"
    )
    return output


def _picture_name(name: str) -> str:
    """Of the drawn JPEG; keeps the suffix, so that a.png and a.jpg get a picture each."""
    return name if Path(name).suffix.lower() in (".jpg", ".jpeg") else f"{name}.jpg"


def _add(
    document: dict[str, list[dict[str, Any]]],
    name: str,
    image: Tensor,
    prediction: dict[str, Tensor],
    category_ids: list[int],
) -> None:
    image_id = len(document["images"]) + 1
    document["images"].append(
        {"id": image_id, "file_name": name, "width": image.shape[2], "height": image.shape[1]}
    )
    masks = encode(prediction["masks"].numpy()).segmentations() if "masks" in prediction else []
    columns = (prediction[key].tolist() for key in ("boxes", "labels", "scores"))
    for position, ((x0, y0, x1, y1), label, confidence) in enumerate(zip(*columns, strict=True)):
        annotation = {
            "id": len(document["annotations"]) + 1,
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "score": confidence,
        }
        if masks:
            annotation["segmentation"] = masks[position]
        document["annotations"].append(annotation)
