"""What features know of classes before any fine-tuning, in half a minute: a quick word on a pre-training run.

    python benchmarks/probe.py --data ../shared/data/stamps RUN_OF_PRETRAIN ...

A linear classifier learns the classes of labelled objects from the features at their centres, of the trunk,
the pyramid and the class tower (or those of the box head, of two-stage detectors), and is asked for objects
that it has not seen. Beside its accuracy stands the effective rank of the features, the exponential of the
entropy of their covariance's spectrum: a learning rate too high leaves few directions, and fine-tuning has to
make up for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from aligndet.data.coco import CocoDataset
from aligndet.data.formats import read_labelled
from aligndet.data.images import read_image
from aligndet.detectors.trunks import trunk_features
from aligndet.evaluation.pretraining import load_untuned

Table = tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.int64]]


def at_centres(maps: list[Tensor], boxes: Tensor, width: int) -> Tensor:
    """Features (n, C) at the centres of boxes, of the map on whose level an object of the size is looked for
    (that of 8 pixels a location up to 64 pixels, and so on), or of the only one.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    levels = ((sides / 64).log2().floor() + 1).clamp(0, min(2, len(maps) - 1)).long().tolist()
    found = []
    for level, centre in zip(levels, (boxes[:, :2] + boxes[:, 2:]) / 2, strict=True):
        features = maps[level][0]
        x, y = (centre * features.shape[2] / width).long().tolist()
        found.append(features[:, min(y, features.shape[1] - 1), min(x, features.shape[2] - 1)])
    return torch.stack(found)


@torch.inference_mode()
def features_of(detector: Any, image: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Features (n, C) of the boxes, by depth."""
    images, _ = detector.transform([image.float() / 255])
    width = images.tensors.shape[-1]
    boxes = boxes * (images.image_sizes[0][1] / image.shape[-1])
    trunk = trunk_features(detector.backbone.body, images.tensors)
    pyramid = detector.backbone(images.tensors)
    found = {f"trunk {i}": at_centres([features], boxes, width) for i, features in enumerate(trunk, 1)}
    maps = list(pyramid.values())
    found["pyramid"] = at_centres(maps, boxes, width)
    if hasattr(detector, "roi_heads"):
        pooled = detector.roi_heads.box_roi_pool(pyramid, [boxes], images.image_sizes)
        return found | {"box head": detector.roi_heads.box_head(pooled)}
    tower = detector.head.classification_head.conv
    return found | {"class tower": at_centres([tower(features) for features in maps], boxes, width)}


def table(detector: Any, labelled: CocoDataset, count: int) -> Table:
    """The features of all objects of evenly chosen images, by depth, and their labels."""
    parts: dict[str, list[Tensor]] = {}
    labels = []
    for i in np.linspace(0, len(labelled) - 1, min(count, len(labelled))).astype(int):
        kept = ~labelled.iscrowd[i]
        if kept.any():
            image, boxes = read_image(labelled.folder / labelled.file_names[i]), labelled.boxes[i][kept]
            for name, part in features_of(detector, image, torch.from_numpy(boxes)).items():
                parts.setdefault(name, []).append(part)
            labels.append(labelled.labels[i][kept])
    return {name: torch.cat(part).numpy() for name, part in parts.items()}, np.concatenate(labels)


def accuracy(
    seen: npt.NDArray[Any], labels: npt.NDArray[Any], held_out: npt.NDArray[Any], wanted: npt.NDArray[Any]
) -> float:
    """The best of three penalties: so the figure is of the features, not of the penalty."""
    mean, spread = seen.mean(0), seen.std(0) + 1e-6
    fits = [
        LogisticRegression(C=c, max_iter=300).fit((seen - mean) / spread, labels) for c in (3e-4, 3e-3, 3e-2)
    ]
    return max(float(fit.score((held_out - mean) / spread, wanted)) for fit in fits)


def effective_rank(features: npt.NDArray[Any]) -> float:
    spectrum = np.linalg.svd(features - features.mean(0), compute_uv=False) ** 2
    shares = spectrum / spectrum.sum()
    return float(np.exp(-(shares * np.log(shares + 1e-12)).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="of `aligndet pretrain`, torchvision's detectors")
    parser.add_argument("--data", type=Path, required=True, help="with train.json, train/, val.json, val/")
    parser.add_argument("--images", type=int, default=300, help="of train; of val half as many")
    args = parser.parse_args()
    train, val = (read_labelled(args.data / f"{p}.json", args.data / p) for p in ("train", "val"))
    for run in args.runs:
        for side, detector in zip(("random", "pre-trained"), load_untuned(run), strict=True):
            seen, labels = table(detector, train, args.images)
            held_out, wanted = table(detector, val, args.images // 2)
            words = [
                f"{name} {100 * accuracy(features, labels, held_out[name], wanted):.1f} %"
                f" (rank {effective_rank(features):.0f} of {features.shape[1]})"
                for name, features in seen.items()
                if side == "pre-trained" or not name.startswith("trunk")
            ]
            print(f"{run}, {side}: {', '.join(words)}", flush=True)
    share = np.bincount(wanted).max() / len(wanted)
    print(f"{len(labels)} objects to learn from, {len(wanted)} to name; {100 * share:.1f} % are of one class")


if __name__ == "__main__":
    main()
