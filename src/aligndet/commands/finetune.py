"""`aligndet finetune`: supervised training on labelled images."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning import seed_everything
from lightning.pytorch import Callback
from torch import Tensor, nn

from aligndet.callbacks import Patience
from aligndet.checkpoints import BestCheckpoint, WeightAverage, best_validation, read_checkpoint
from aligndet.commands._runs import run_folder
from aligndet.commands._settings import provenance, with_recipe
from aligndet.data.augmentations import AugmentationName
from aligndet.data.coco import CocoDataset, CocoDetection, check_objects
from aligndet.data.formats import read_labelled
from aligndet.data.labelled import LabelledDataset, ValidationDataset, remark_on_shared_images
from aligndet.detectors.backbones import PyramidNorm
from aligndet.detectors.build import build_detector, family_of, training_defaults
from aligndet.detectors.weights import MODULES, initialise, load_weights, save_detector
from aligndet.evaluation.coco import CocoEvaluator
from aligndet.files import accepts_strings
from aligndet.finetuning import Finetuning
from aligndet.launch import data_summary
from aligndet.trainer import RUN_SETTINGS, LoggerName, fit
from aligndet.training import DROPS, OptimizerName, ScheduleName

SCHEDULES = {"12k": 12_000, "1x": 90_000, "90k": 90_000, "2x": 180_000, "3x": 270_000, "4x": 360_000}
"""Steps of 16 images each (paper section 4.2 and table 7)."""
EPOCHS = {"50e": 50, "100e": 100, "150e": 150}
"""Passes over the images, as schedules of DETR are named (paper tables 2 and 6)."""

_DEFAULTS = {"detector": "fcos", "trunk": "resnet50", "fpn_channels": 256, "fpn_norm": "none"}
"""Of a detector without --init-from: its neck and heads start from random numbers."""

_EXPLANATION = """A run of `aligndet finetune`.

run.json       settings, command line and versions
checkpoints/   last.ckpt: all that --resume needs; best.ckpt: the best on the validation images
logs/          metrics as CSV, and for TensorBoard (tensorboard --logdir logs)
model/         the result (best, or last without validation images): model.safetensors and manifest.json
               (which has the step and AP of the best), for `aligndet evaluate`, `aligndet predict` and
               aligndet.load_detector
"""


class _Data(NamedTuple):
    """The labelled images of a run."""

    training: CocoDataset
    validation: CocoDataset | None

    @property
    def classes(self) -> list[str]:
        return [category.name for category in self.training.categories]

    def summary(self) -> str:
        """What a resumed run knows its data by."""
        parts = [part for part in self if part is not None]
        boxes = sum(map(len, self.training.boxes))
        counts = f"{len(self.training)} images with {boxes} boxes of {len(self.classes)} classes"
        if self.validation is not None:
            counts += f", {len(self.validation)} images for validation"
        return data_summary(
            counts,
            chain(self.classes, *(part.file_names for part in parts)),
            chain(*(part.arrays() for part in parts)),
        )


@accepts_strings
def finetune(
    annotations: Path,
    *,
    images: Path | None = None,
    output: Path,
    val_annotations: Path | None = None,
    val_images: Path | None = None,
    init_from: Path | None = None,
    init: tuple[str, ...] = tuple(MODULES),
    detector: str | None = None,
    trunk: str | None = None,
    trunk_weights: str = "default",
    fpn_channels: int | None = None,
    fpn_norm: PyramidNorm | None = None,
    options: dict[str, Any] | None = None,
    min_size: tuple[int, int] = (800, 800),
    max_size: int = 1333,
    augmentation: AugmentationName = "multiscale",
    schedule: Literal["12k", "90k", "1x", "2x", "3x", "4x", "50e", "100e", "150e"] = "12k",
    steps: int | None = None,
    batch_size: int = 16,
    accumulate: int = 1,
    optimizer: OptimizerName = "adamw",
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    lr_schedule: ScheduleName = "cosine",
    lr_drops: tuple[float, ...] = DROPS,
    trunk_factor: float = 0.1,
    frozen_stages: int = 0,
    warmup_steps: int = 50,
    clip: float | Literal["default"] | None = "default",
    batch_norm: Literal["frozen", "trained", "sync"] = "frozen",
    ema: float | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    devices: int = 1,
    nodes: int = 1,
    accelerator: str = "auto",
    strategy: str = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
    channels_last: bool = False,
    compile: bool = False,
    workers: int | None = None,
    seed: int = 0,
    checkpoint_every: int | None = None,
    log_every: int = 10,
    loggers: tuple[LoggerName, ...] = (),
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Fine-tunes a detector on labelled images, from pre-trained parts or from a trunk alone.

    Args:
        annotations: Labels of the training images: COCO JSON, PASCAL VOC or YOLO (data.yaml), or a folder.
        images: Folder of the training images; by default looked for beside the annotations.
        output: Folder of the run.
        val_annotations: Labels of the validation images; for VOC and YOLO give the same folder, of which the
            validation part is read. With them the best weights are the result, and their step and AP are
            printed at the end; without them the last weights are.
        val_images: Folder of the validation images.
        init_from: A run of `aligndet pretrain` or `aligndet finetune`, or an export; its detector, trunk,
            fpn_channels and fpn_norm are taken over. Without it, neck and heads start from random numbers.
        init: Parts to take from init_from, out of "trunk", "neck", "rpn", "head" (the paper's table 9).
            Without "trunk" its weights are those of trunk_weights: give the ones that pre-training had.
        detector: "fcos" (the default), "retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn" or "htc";
            CBNet v2: "cbnet_cascade_rcnn" or "cbnet_htc"; with transformers: "detr", "conditional_detr",
            "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine" or "rf_detr".
        trunk: A torchvision ResNet or any timm model with feature maps, by name: "resnet50" (the default),
            "mobilenetv2_100", "swin_small_patch4_window7_224", "convnext_tiny", "vit_small_patch16_224", ...
        trunk_weights: "default" (ImageNet, downloaded), "bundled", "none", a run of
            `aligndet pretrain-backbone`, or a file in a published layout (see `aligndet pretrain --help`);
            not used where init_from brings the trunk.
        fpn_channels: Width of the feature pyramid, or of a query-based detector's encoder and decoder, by
            default 256.
        fpn_norm: "none" (the default), or "batch": batch norms in the pyramid, as in the paper.
        options: Further settings of torchvision's detector, such as --options.box_batch_size_per_image 128,
            or of transformers' configuration, such as --options.num_queries 100.
        min_size: Smallest and largest short side of a training image (multi-scale in steps of 32);
            predictions are made at the largest.
        max_size: Bound of the long side; RT-DETR, D-FINE and RF-DETR see squares of the short side: theirs is
            four times as long at least.
        augmentation: How training images change each time: "multiscale": size and flip; "detr": every second
            is cropped, as DETR and Swin are trained; "lsj": large-scale jitter, 0.1 to 2 times the size;
            "ssd": colours, zooming out and crops around objects, as RT-DETR and D-FINE are trained.
        schedule: Length of the run, named as in the field: "12k", "1x" (90k), "2x", "3x", "4x" steps of 16
            images, scaled with the batch size; "50e", "100e", "150e" epochs.
        steps: Length of the run in steps; takes the place of schedule.
        batch_size: Images per batch on each device.
        accumulate: Batches whose gradients are accumulated for one step of the optimizer.
        optimizer: "adamw" or "sgd".
        learning_rate: By default 1e-3 (AdamW; query-based detectors: 1e-4) or 0.01 (SGD, 16 images), times
            1.5 from pre-trained heads.
        weight_decay: By default 0.05 (AdamW; query-based detectors: 1e-4) or 1e-4 (SGD), times 0.5 from
            pre-trained heads.
        lr_schedule: How the learning rate falls: "cosine", "step" (to a tenth at each of lr_drops),
            "constant".
        lr_drops: Of the step schedule: after which shares of the run the rate falls, such as 0.8.
        trunk_factor: Factor of the trunk's learning rate; 0 freezes the trunk.
        frozen_stages: First stages of the trunk that do not learn: 1 is all up to the map of stride 4, as
            MMDetection and detectron2 do with ResNets; it saves time and memory. ViTs and CBNet have none.
        warmup_steps: Steps of linear warm-up, at most a quarter of the run.
        clip: Largest gradient norm, by default 10, of query-based detectors 0.1; null for none.
        batch_norm: Batch norms of the trunk: "frozen"; "trained", in each process by itself; "sync", trained
            over all GPUs (the paper's choice; on CPUs the same as "trained"). Those of a pyramid are always
            trained, over all GPUs unless this is "trained". Query-based detectors only take "frozen".
        ema: Decay of a moving average of the weights, which is then validated and kept; null for none.
        validate_every: Steps between evaluations during the run; by default a tenth of the run.
        patience: Stop after this many evaluations without a better average precision; null: never.
        devices: Devices per machine.
        nodes: Number of machines; torchrun or Slurm starts the command on each.
        accelerator: "auto", "cpu" or "gpu".
        strategy: "auto" or "ddp": every device has the whole detector; "fsdp": a part of every parameter, for
            detectors too large for one (FSDP2; it exchanges more).
        precision: "32", "bf16-mixed" or "16-mixed".
        channels_last: Keep the channels of a pixel together in memory; results are the same up to rounding.
        compile: Let torch.compile take trunk, pyramid and heads; the first steps take minutes.
        workers: Loader processes on each device; by default one less than its share of the cores, up to 8.
        seed: Seed of new weights, data order and augmentation.
        checkpoint_every: Steps between checkpoints; by default a tenth of the run, at most 500.
        log_every: Steps between lines of the logs.
        loggers: Further places to log to: wandb, mlflow; by default none, and nothing leaves this machine.
        strict: A broken image or box is an error; by default it is skipped, counted and named.
        resume: Go on from the last checkpoint in output.
        overwrite: Throw away the run that is in output.

    Returns:
        The folder of the run.

    Raises:
        ValueError: If the input does not fit together; the message names the file or the value.
    """
    settings = dict(locals())
    with run_folder(settings, _EXPLANATION) as checkpoint:
        seed_everything(seed, verbose=False)
        asked = {"detector": detector, "trunk": trunk, "fpn_channels": fpn_channels, "fpn_norm": fpn_norm}
        state, architecture, options = _architecture(init_from, asked, options)
        kind = architecture["detector"]
        family = family_of(kind)
        is_query_based = family.weights_format == "transformers"
        if patience is not None and val_annotations is None:
            raise ValueError(
                "--patience needs --val-annotations: without them, nothing is measured on the way"
            )
        if augmentation == "lsj" and family.square:
            raise ValueError(f"--augmentation lsj: {kind} stretches images to one size; take ssd")
        if batch_norm != "frozen" and is_query_based:
            raise ValueError(f"--batch-norm {batch_norm}: the trunk's batch norms are frozen in {kind}")
        data = _read_data(annotations, images, val_annotations, val_images, masks=family.masks, strict=strict)
        passes = EPOCHS.get(schedule, 0) * len(data.training)
        images_a_step = batch_size * accumulate * devices * nodes
        total = steps or max(1, round(SCHEDULES.get(schedule, passes / 16) * 16 / images_a_step))
        architecture |= {"num_classes": len(data.classes), "min_size": min_size[1], "max_size": max_size}
        architecture |= {"options": options} if options else {}
        trunk_from = "none" if "trunk" in init and state else trunk_weights
        model, origins = _build(architecture, state, init, trunk_from)
        recipe = training_defaults(kind, optimizer)
        if state and "head" in init:  # pre-trained
            recipe["learning_rate"] *= 1.5
            recipe["weight_decay"] *= 0.5
        training = with_recipe(settings, recipe)
        evaluator, validation = None, None
        if data.validation is not None:
            evaluator = CocoEvaluator(data.validation.categories, masks=family.masks)
            validation = ValidationDataset(CocoDetection(data.validation, crowds=True), strict=strict)
        module = Finetuning(
            model,
            steps=total,
            evaluator=evaluator,
            freeze_batch_norm=batch_norm == "frozen",
            trunk_factor=trunk_factor,
            frozen_stages=frozen_stages,
            optimizer=optimizer,
            learning_rate=training["learning_rate"],
            weight_decay=training["weight_decay"],
            schedule=lr_schedule,
            lr_drops=lr_drops,
            warmup_steps=warmup_steps,
            seed=seed,
        )
        written = fit(
            module,
            LabelledDataset(
                data.training,
                min_size=min_size,
                max_size=family.long_side(min_size, max_size),
                augmentation=augmentation,
                antialias=is_query_based,
                strict=strict,
            ),
            data=data.summary(),
            steps=total,
            checkpoint=checkpoint,
            # norms of a pyramid or a hybrid encoder always learn; the trunk's frozen ones are in eval mode
            sync_batch_norm=batch_norm == "sync"
            or (batch_norm == "frozen" and (architecture["fpn_norm"] == "batch" or is_query_based)),
            validation=validation,
            validate_every=validate_every,
            callbacks=_callbacks(output, validation is not None, patience, ema),
            **{name: training[name] for name in RUN_SETTINGS},
        )
        if written:
            best = _load_result(module, output, checkpoint, total)
            initialised_from = {
                "weights": str(init_from) if state else None,
                "trunk_weights": trunk_from if trunk_from != "none" or not state else str(init_from),
                "modules": origins,
            }
            manifest = _manifest(architecture, data, initialised_from, best)
            save_detector(output / "model", module.detector, manifest)
            if best and best["AP"] is not None:
                name = "AP of boxes" if family.masks else "AP"
                print(f"best {name} {100 * best['AP']:.1f} at step {best['step']} of {total}")
            print(f"fine-tuned detector: {output / 'model'}")
    return output


def _architecture(
    init_from: Path | None, asked: dict[str, Any], options: dict[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Pre-trained tensors with the architecture and options of their detector; without any, as asked for."""
    if init_from is None:
        return {}, {k: _DEFAULTS[k] if v is None else v for k, v in asked.items()}, options or {}
    state, manifest = load_weights(init_from)
    architecture = _DEFAULTS | manifest["architecture"]
    for name, value in asked.items():
        if value is not None and value != architecture[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{init_from}: these weights are of {option} {architecture[name]}, not {value}; leave the"
                " option out, or take other weights"
            )
    options = {**architecture.get("options", {}), **(options or {})}
    return state, {name: architecture[name] for name in asked}, options


def _build(
    architecture: dict[str, Any], state: dict[str, Tensor], init: tuple[str, ...], trunk_weights: str
) -> tuple[nn.Module, dict[str, str]]:
    """The detector, and of each of its modules whether it is "pre-trained" or "new"."""
    model = build_detector(**architecture, trunk_weights=trunk_weights, resize_in_training=False)
    origins = initialise(model, state, init)
    if trunk_weights != "none":
        trunk = (name for name in origins if f"{name}.".startswith(MODULES["trunk"]))
        origins |= dict.fromkeys(trunk, "pre-trained")
    return model, origins


def _read_data(
    annotations: Path,
    images: Path | None,
    val_annotations: Path | None,
    val_images: Path | None,
    *,
    masks: bool,
    strict: bool,
) -> _Data:
    training = read_labelled(annotations, images, split="train", strict=strict, masks=masks)
    check_objects(training, annotations)
    if val_annotations is None:
        return _Data(training, None)
    validation = read_labelled(
        val_annotations, val_images, split="val", strict=strict, categories=training.categories, masks=masks
    )
    check_objects(validation, val_annotations)
    if remark := remark_on_shared_images(training, validation):
        print(remark)
    return _Data(training, validation)


def _load_result(
    module: Finetuning, output: Path, checkpoint: Path | None, total: int
) -> dict[str, Any] | None:
    """Loads the weights to save into the module; returns step and AP if they are the best of a validation."""
    best = output / "checkpoints" / "best.ckpt"
    if best.is_file():
        content = read_checkpoint(best)
        module.load_state_dict(content["state_dict"])
        return best_validation(content)
    if checkpoint is not None and (content := read_checkpoint(checkpoint))["global_step"] >= total:
        module.load_state_dict(content["state_dict"])  # it holds the average of the weights
    return None


def _manifest(
    architecture: dict[str, Any], data: _Data, initialised_from: dict[str, Any], best: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "kind": "detector",
        "format": family_of(architecture["detector"]).weights_format,
        "architecture": architecture,
        "class_names": data.classes,
        "category_ids": [category.id for category in data.training.categories],
        "initialised_from": initialised_from,
        **({"best": best} if best else {}),
        **provenance(),
    }


def _callbacks(output: Path, validated: bool, patience: int | None, ema: float | None) -> list[Callback]:
    callbacks: list[Callback] = []
    if ema is not None:
        callbacks.append(WeightAverage(decay=ema))
    if validated:
        callbacks.append(BestCheckpoint(output / "checkpoints"))
        if patience is not None:
            callbacks.append(Patience("val/AP", mode="max", patience=patience))
    return callbacks
