"""Predictions of a plain detector on images of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item", bound=tuple[Any, ...])


def resolve_device(device: str, *, elsewhere: bool = False) -> torch.device:
    """Finds a device by name.

    Args:
        device: Of torch, or "auto": a GPU if there is one.
        elsewhere: Other machines compute: whether this one has the device does not matter.

    Raises:
        ValueError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: auto, cpu, cuda, cuda:1, ...") from error
    if not elsewhere and found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch finds {torch.cuda.device_count()} GPUs here")
    return found


def allow_tf32(device: torch.device) -> None:
    """Lets a GPU's matrix products be TF32, as its convolutions are by default."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def predict_images(
    detector: nn.Module, images: Iterable[Item], *, device: torch.device, batch_size: int = 8
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Predicts image by image, computing batch by batch; the next batch is read meanwhile, by a thread.

    Args:
        detector: Of `aligndet.detectors.build.build_detector`; put into eval mode and onto the device.
        images: Tuples that begin with an image, (3, H, W) uint8; what else they hold comes back with it.
        device: To compute on.
        batch_size: Images at a time; one by one where masks are found.

    Yields:
        Each tuple, and of its image: boxes (n, 4) xyxy pixels, labels (n,), scores (n,), and if the detector
        finds them, masks (n, H, W) bool, on the CPU.

    Raises:
        ValueError: If batch_size is less than 1, or the GPU has too little memory for so many.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    detector.eval().to(device)
    allow_tf32(device)
    masks = any(name.endswith("mask_predictor") for name, _ in detector.named_modules())
    if masks:
        batch_size = 1  # torchvision's masks are numbers of 32 bits for every pixel and box
    remaining = iter(images)

    def read() -> list[Item]:
        return list(islice(remaining, batch_size))

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(read)
        while batch := following.result():
            following = reader.submit(read)
            try:
                with torch.inference_mode():
                    predictions = detector([image.to(device).float() / 255 for image, *_ in batch])
                for prediction in predictions:
                    if "masks" in prediction:  # as bool they take a quarter of the memory
                        prediction["masks"] = binary_masks(prediction["masks"])
            except torch.cuda.OutOfMemoryError as error:
                less = f"for {len(batch)} images at a time; give a smaller --batch-size"
                if masks:
                    less = "for the masks of an image of this size; make it smaller, or give --device cpu"
                raise ValueError(f"the GPU has not enough memory {less} ({error})") from error
            for item, prediction in zip(batch, predictions, strict=True):
                yield item, {name: value.cpu() for name, value in prediction.items()}


def binary_masks(masks: Tensor) -> Tensor:
    """Turns probabilities into masks.

    Args:
        masks: (n, 1, H, W) probabilities, torchvision's form, or (n, H, W) bool, which stays.

    Returns:
        (n, H, W) bool.
    """
    return masks.flatten(0, -3) > 0.5
