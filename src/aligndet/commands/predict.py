"""`aligndet predict`: boxes, masks and pictures for images and videos without labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork
from tqdm import tqdm

from aligndet.commands._settings import check_bounds
from aligndet.data.document import CocoWriter
from aligndet.data.images import ImageError, read_image, readable
from aligndet.data.listing import list_images, without_ours
from aligndet.data.rle import encode
from aligndet.data.videos import is_video, rate_and_length, read_frames, video_writer
from aligndet.detectors.weights import load_tuned
from aligndet.evaluation.drawing import draw_detections, to_jpeg
from aligndet.evaluation.inference import predict_images, resolve_device
from aligndet.files import accepts_strings, atomic_write, locked, print_skipped, read_json, safe_name


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
    """Finds objects in an image, in a folder of images, or in a video.

    Args:
        model: Folder of `aligndet finetune`.
        images: An image, a folder that is searched with its subfolders, or a video.
        output: Folder for predictions.json (COCO: images, categories, and annotations with scores, and
            segmentation if the detector finds masks; frames of a video are images, named VIDEO/NUMBER;
            beside them the names of the pictures) and pictures/. From Python, aligndet.read_detections reads
            them as supervision's detections.
        score: From 0 to 1; boxes below are left out.
        batch_size: Images at a time; one by one where masks are found, which are large.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        draw: Write pictures, or a video, with the boxes.
        strict: A broken image, or a video that ends early, is an error; by default it is skipped, counted
            and named.
        overwrite: Replace predictions that are there, and the pictures that were drawn for them.

    Returns:
        The output folder.

    Raises:
        ValueError: If the model is not fine-tuned, no image can be read, the video is broken, or the output
            is taken or in use, or score is not from 0 to 1.
    """
    check_bounds({"score": score, "batch_size": batch_size})
    detector, manifest = load_tuned(model)
    names: list[str] = manifest["class_names"]
    if images.resolve().is_relative_to((output / "pictures").resolve()):
        raise ValueError(f"{output}: drawn pictures would replace {images}; give another output")
    broken: list[str] = []
    drawn: dict[str, None] = {}  # in order, and once
    video = is_video(images)
    total, source, pictures = (_video if video else _images)(images, output, strict, broken)
    document = CocoWriter(dict(zip(manifest["category_ids"], names, strict=True)))
    modules: Iterator[Any] = detector.modules()
    for module in modules:  # what is left out below need not be made
        # that of the RPN is of another score
        if hasattr(module, "score_thresh") and not isinstance(module, RegionProposalNetwork):
            module.score_thresh = max(module.score_thresh, score)
    predictions = predict_images(detector, source, device=resolve_device(device), batch_size=batch_size)
    with locked(output):
        ours = ("predictions.json", *(["pictures"] if draw else []))
        taken = [name for name in ours if (output / name).exists()]
        if taken and not overwrite:
            raise ValueError(f"{output}: holds {taken[0]} already; give --overwrite or another output")
        _remove_pictures(output)
        with pictures as write:
            for (image, name), prediction in tqdm(predictions, total=total, desc="predict", unit="image"):
                sure = prediction["scores"] >= score
                prediction = {key: value[sure] for key, value in prediction.items()}
                _add(document, name, image, prediction, manifest["category_ids"])
                if draw:
                    drawn[f"{images.stem}.mp4" if video else _picture_name(name)] = None
                    write(name, draw_detections(image.permute(1, 2, 0).numpy(), prediction, names))
        if not document.content["images"]:
            raise ImageError(f"{images}: none of its {total} images can be read; the first: {broken[0]}")
        atomic_write(output / "predictions.json", json.dumps({**document.content, "pictures": list(drawn)}))
    print_skipped(broken)
    print(
        f"{len(document.content['images'])} images, {len(document.content['annotations'])} boxes,"
        f" {len(broken)} skipped: {output}"
    )
    return output


Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB
Source = tuple[int, Iterator[tuple[Tensor, str]], AbstractContextManager[Callable[[str, Pixels], None]]]
"""How many images there are, the images with their names, and what writes the drawn ones."""


def _remove_pictures(output: Path) -> None:
    """Removes what former predictions have drawn, and nothing else: it may be of other images."""
    former = output / "predictions.json"
    try:
        drawn = read_json(former).get("pictures") if former.exists() else None
    except ValueError:  # not ours
        drawn = None
    for name in drawn if isinstance(drawn, list) else ():
        (output / "pictures" / safe_name(name, former)).unlink(missing_ok=True)
    former.unlink(missing_ok=True)


def _images(images: Path, output: Path, strict: bool, broken: list[str]) -> Source:
    folder, files = (images.parent, [images.name]) if images.is_file() else (images, list_images(images))
    files = without_ours(files, folder, output / "pictures")

    def write(name: str, drawn: Pixels) -> None:
        atomic_write(output / "pictures" / _picture_name(name), to_jpeg(drawn))

    found = readable(lambda name: (read_image(folder / name), name), files, strict=strict, broken=broken)
    return len(files), found, nullcontext(write)


def _video(video: Path, output: Path, strict: bool, broken: list[str]) -> Source:
    rate, length = rate_and_length(video)

    def read() -> Iterator[tuple[Tensor, str]]:
        number = -1
        for number, frame in enumerate(read_frames(video)):
            yield frame, f"{video.name}/{number:06d}"
        if number + 1 < length:
            message = f"{video}: only {number + 1} of its {length} frames can be read"
            if strict:
                raise ImageError(message)
            broken.append(message)

    @contextmanager
    def writing() -> Iterator[Callable[[str, Pixels], None]]:
        with video_writer(output / "pictures" / f"{video.stem}.mp4", rate) as write:
            yield lambda name, drawn: write(drawn)

    return length, read(), writing()


def _picture_name(name: str) -> str:
    """Of the drawn JPEG; keeps the suffix, so that a.png and a.jpg get a picture each."""
    return name if Path(name).suffix.lower() in (".jpg", ".jpeg") else f"{name}.jpg"


def _add(
    document: CocoWriter, name: str, image: Tensor, prediction: dict[str, Tensor], category_ids: list[int]
) -> None:
    document.add_image(name, image.shape[2], image.shape[1])
    masks = encode(prediction["masks"].numpy()).segmentations() if "masks" in prediction else []
    columns = (prediction[key].tolist() for key in ("boxes", "labels", "scores"))
    for position, (box, label, score) in enumerate(zip(*columns, strict=True)):
        area = (box[2] - box[0]) * (box[3] - box[1])
        mask = {"segmentation": masks[position]} if masks else {}
        document.add_object(category_ids[label - 1], box, area=area, score=score, **mask)
