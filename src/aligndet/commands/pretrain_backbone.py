"""`aligndet pretrain-backbone`: image-domain pre-training of a trunk on unlabelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning import seed_everything

from aligndet.commands._runs import run_folder
from aligndet.commands._settings import provenance
from aligndet.data.crops import ClassifiedDataset, TwoCropsDataset, read_classes
from aligndet.data.labelled import ValidationDataset
from aligndet.data.sources import ImageSource
from aligndet.detectors.trunks import build_trunk, normalisation
from aligndet.detectors.weights import save_weights
from aligndet.files import accepts_strings
from aligndet.launch import data_summary
from aligndet.trainer import RUN_SETTINGS, LoggerName, fit
from aligndet.training import DROPS, OptimizerName, ScheduleName

_EXPLANATION = """A run of `aligndet pretrain-backbone`.

run.json       settings, command line and versions
checkpoints/   last.ckpt: all that --resume needs
logs/          metrics as CSV, and for TensorBoard (tensorboard --logdir logs); embeddings/std_of_healthy near
               0 means that the trunk has collapsed, near 1 that it has not
trunk/         the result, written at the end: model.safetensors and manifest.json;
               `aligndet pretrain ... --trunk NAME --trunk-weights THIS_FOLDER` takes it
"""


@accepts_strings
def pretrain_backbone(
    images: str | Path,
    *,
    output: Path,
    names: Path | None = None,
    exclude: Path | None = None,
    trunk: str = "resnet50",
    trunk_weights: str = "none",
    method: Literal["simsiam", "moco"] = "simsiam",
    labels: str | None = None,
    crop_size: int = 224,
    min_scale: float = 0.2,
    steps: int | None = None,
    epochs: float = 100.0,
    batch_size: int = 64,
    accumulate: int = 1,
    optimizer: OptimizerName = "sgd",
    learning_rate: float | None = None,
    weight_decay: float = 1e-4,
    lr_schedule: ScheduleName = "cosine",
    lr_drops: tuple[float, ...] = DROPS,
    warmup_steps: int = 50,
    clip: float | None = None,
    temperature: float = 0.2,
    decay: float = 0.99,
    queue: int = 4096,
    batch_norm: Literal["default", "sync", "local"] = "default",
    validate_every: int | None = None,
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
    """Pre-trains a trunk on images without labels, for those who have no ImageNet weights or want none.

    Two crops of each image have to be recognised as the same one (SimSiam, MoCo v2). The result is what
    `aligndet pretrain` and `aligndet finetune` take as --trunk-weights, with the same --trunk.

    A trunk collapses when it says the same of every image. Its embeddings' standard deviation is logged, and
    a warning is printed when it stays low; with --labels, the accuracy of nearest neighbours is logged too.

    Args:
        images: Folder of images, or an address (s3://bucket/images, ...); a tar in it counts as a folder.
        output: Folder of the run.
        names: Only these images; see `aligndet propose --help`.
        exclude: All but these; see `aligndet pretrain --help`.
        trunk: A torchvision ResNet or any timm model with feature maps, by name.
        trunk_weights: To start from: "none", "default" (ImageNet, downloaded), "bundled", or a file (see
            `aligndet pretrain --help`).
        method: "simsiam", or "moco" (version 2), which does with smaller batches.
        labels: Only to look at, not to learn from: COCO JSON, PASCAL VOC or YOLO (an image's class is that of
            its largest box), or "folders" (the first sub-folder is the class).
        crop_size: Side of the square crops.
        min_scale: Smallest share of the image's area in a crop; raise it where objects are large.
        steps: Length of the run in optimizer steps; takes the place of epochs.
        epochs: Length of the run in passes over the images; a few thousand images need several hundred.
        batch_size: Images a batch on each device.
        accumulate: Batches a step of the optimizer.
        optimizer: "sgd", or "adamw" (better for transformers).
        learning_rate: After the warm-up; by default, for 256 images a step and in proportion for others, 0.05
            (SimSiam) or 0.03 (MoCo), with AdamW 5e-4.
        weight_decay: Of matrices and kernels.
        lr_schedule: Of the learning rate: "cosine", "step" (to a tenth at each of lr_drops),
            "constant".
        lr_drops: Of the step schedule: after which shares of the run the rate falls, such as 0.8.
        warmup_steps: Steps of linear warm-up, at most a quarter of the run.
        clip: Bound of the gradient norm; null for none.
        temperature: Of MoCo's loss.
        decay: Of MoCo's momentum encoder at the start; it grows to 1.
        queue: Embeddings that MoCo keeps as negatives; no more than there are images (ImageNet: 65536).
        batch_norm: "sync" (over all processes, on GPUs) or "local"; by default "sync" for SimSiam and "local"
            for MoCo, which shuffles images among the processes so that norms do not give the pairs away.
        validate_every: Steps between looks at the labelled images; by default a tenth of the run.
        devices: Devices a machine; 2 on a machine without GPU means two processes.
        nodes: Machines; torchrun or Slurm starts the command on each.
        accelerator: "auto", "cpu" or "gpu".
        strategy: "auto" or "ddp": every device has the whole trunk; "fsdp": a part of every parameter, for
            trunks too large for one (FSDP2; it exchanges more).
        precision: "32", "bf16-mixed" or "16-mixed".
        channels_last: Hold channels as neighbours in memory; the same up to rounding.
        compile: Let torch.compile take the trunk; the first steps take minutes.
        workers: Loader processes on each device; by default one less than its share of the cores, up to 8.
        seed: Of weights, data order and augmentation.
        checkpoint_every: Steps between checkpoints; by default a tenth of the run, at most 500.
        log_every: Steps between lines of the logs.
        loggers: Further places to log to: wandb, mlflow; by default none, and nothing leaves this machine.
        strict: A broken image is an error; by default it is skipped, counted and named.
        resume: Go on from the last checkpoint in output.
        overwrite: Throw away the run that is in output.

    Returns:
        The folder of the run.

    Raises:
        ImportError: If lightly is not installed.
        ValueError: If the input does not fit together; the message names the file or the value.
    """
    settings = dict(locals())
    from aligndet.image_pretraining import METHODS  # late: --help works without lightly

    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 (batch norms, comparison), not {batch_size}")
    with run_folder(settings, _EXPLANATION) as checkpoint:
        seed_everything(seed, verbose=False)
        source = ImageSource(images)
        file_names = source.select(source.names(names), exclude=exclude)
        body, channels = build_trunk(trunk, weights=trunk_weights)
        mean, std = normalisation(trunk)
        kind, processes = METHODS[method], devices * nodes
        augment = kind.transform(
            input_size=crop_size, min_scale=min_scale, normalize={"mean": list(mean), "std": list(std)}
        )
        validation = None
        if labels is not None:
            local = Path() if labels == "folders" else source.labelled_folder("--labels")
            classes = read_classes(labels, local, file_names, strict=strict)
            whole = ClassifiedDataset(source, classes, size=crop_size, mean=mean, std=std)
            validation = ValidationDataset(whole, strict=strict)
        images_a_step = batch_size * accumulate * processes
        total = steps or max(1, round(epochs * len(file_names) / images_a_step))
        own: dict[str, Any] = {"temperature": temperature, "decay": decay, "queue": queue}
        rate = kind.sgd_learning_rate if optimizer == "sgd" else 5e-4
        module = kind(
            body,
            channels[-1],
            steps=total,
            optimizer=optimizer,
            learning_rate=learning_rate or rate * images_a_step / 256,
            weight_decay=weight_decay,
            schedule=lr_schedule,
            lr_drops=lr_drops,
            warmup_steps=warmup_steps,
            seed=seed,
            **(own | {"processes": processes} if method == "moco" else {}),
        )
        written = fit(
            module,
            TwoCropsDataset(source, file_names, augment, strict=strict),
            data=data_summary(f"{len(file_names)} images", file_names, ()),
            steps=total,
            checkpoint=checkpoint,
            validation=validation,
            validate_every=validate_every,
            sync_batch_norm=batch_norm == "sync" or (batch_norm == "default" and method == "simsiam"),
            **{name: settings[name] for name in RUN_SETTINGS},
        )
        if written:
            manifest = {
                "kind": "trunk",
                "architecture": {"trunk": trunk},
                "names": "torchvision's ResNet, or timm's with features_only=True",
                "images": len(file_names),
                "pretraining": settings,
                **provenance(),
            }
            save_weights(output / "trunk", module.encoder.trunk.state_dict(), manifest)
            print(f"trunk {trunk}: {output / 'trunk'}")
    return output
