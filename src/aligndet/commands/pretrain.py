"""`aligndet pretrain`: box-domain pre-training on unlabelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning import seed_everything

from aligndet.box_pretraining import BoxPretraining
from aligndet.commands._runs import run_folder
from aligndet.commands._settings import provenance, with_recipe
from aligndet.data.sources import ImageSource
from aligndet.data.views import TwoViewDataset
from aligndet.detectors.backbones import PyramidNorm
from aligndet.detectors.build import build_pretrainable, training_defaults
from aligndet.detectors.weights import pretrained_state, save_weights
from aligndet.files import accepts_strings
from aligndet.launch import data_summary
from aligndet.proposals.clusters import with_clusters
from aligndet.proposals.storage import read_proposals
from aligndet.trainer import RUN_SETTINGS, LoggerName, fit
from aligndet.training import DROPS, OptimizerName, ScheduleName

_EXPLANATION = """A run of `aligndet pretrain`.

run.json       settings, command line and versions
checkpoints/   last.ckpt: all that --resume needs
logs/          metrics as CSV, and for TensorBoard (tensorboard --logdir logs)
pretrained/    the result: neck and heads (and the trunk they belong to), written at the end;
               `aligndet finetune --init-from THIS_FOLDER` and `aligndet export THIS_FOLDER` take it
"""


@accepts_strings
def pretrain(
    images: str | Path,
    *,
    proposals: Path,
    output: Path,
    names: Path | None = None,
    exclude: Path | None = None,
    detector: str = "fcos",
    trunk: str = "resnet50",
    trunk_weights: str = "default",
    fpn_channels: int = 256,
    fpn_norm: PyramidNorm = "none",
    options: dict[str, Any] | None = None,
    min_size: tuple[int, int] = (640, 800),
    max_size: int = 1333,
    max_proposals: int = 50,
    proposal_choice: Literal["default", "top", "random"] = "default",
    steps: int | None = None,
    epochs: float = 12.0,
    batch_size: int = 16,
    accumulate: int = 1,
    optimizer: OptimizerName = "adamw",
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    lr_schedule: ScheduleName = "cosine",
    lr_drops: tuple[float, ...] = DROPS,
    warmup_steps: int = 50,
    clip: float | Literal["default"] | None = "default",
    temperature: float = 0.5,
    gather_keys: bool = False,
    decay: float | None = None,
    contrast_weight: float = 1.0,
    box_weight: float = 1.0,
    train_trunk: bool = False,
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
    """Pre-trains neck and heads of a detector on images without labels.

    Two augmented views of each image go through an online and a momentum detector on one frozen trunk; boxes
    of the same proposal are pulled together, all others apart, while the detector's own box losses run
    (paper section 3.2).

    Args:
        images: Folder or address (s3://bucket/images, https://host/images, ...) that the file names of the
            proposals are relative to; only images that have proposals are used. A tar counts as a folder.
        proposals: What `aligndet propose` has written for them, or a COCO-style JSON of boxes; with
            clusters (`aligndet cluster`) for query-based detectors.
        output: Folder of the run.
        names: Only these images of the proposals: a text file with a name a line, or Parquet with a column
            file_name; a tar stands for its images.
        exclude: A list of images, likewise, to leave out: those that are measured on later, such as the
            val.txt of `aligndet split`.
        detector: "fcos", "retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn" or "htc"; CBNet v2:
            "cbnet_cascade_rcnn" or "cbnet_htc"; with transformers: "detr", "conditional_detr",
            "dab_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine" or "rf_detr".
        trunk: A torchvision ResNet or any timm model with feature maps, by name: "resnet50",
            "mobilenetv2_100", "swin_small_patch4_window7_224", "convnext_tiny", "vit_small_patch16_224.dino",
            ... Images are normalised as for timm's weights of that name (the part behind the dot).
        trunk_weights: "default" (ImageNet, downloaded), "bundled" (tf_efficientnet_lite0 alone, out of
            aligndet[quickstart]), "none", a run of `aligndet pretrain-backbone`, or a file (.pth, .pkl,
            .safetensors) as MoCo, SwAV, SimSiam, BYOL, DenseCL, PixPro, DetCo, DINO, SimMIM, Swin,
            torchvision, timm, OpenMMLab and detectron2 publish them; what matched is printed.
        fpn_channels: Width of the feature pyramid, or of a query-based detector's encoder and decoder.
        fpn_norm: "none", or "batch": batch norms in the pyramid, as in the paper.
        options: Further settings of the detector, such as --options.embedding_dim 256; the answer to a wrong
            one lists them all. Of query-based detectors: settings of transformers' configuration, such as
            --options.num_queries 100, and --options.objectness true to do without clusters.
        min_size: Smallest and largest short side of a view, as in 640,800; each view draws its own in steps
            of 32.
        max_size: Bound of a view's long side; if it always binds, views no longer differ in scale. RT-DETR,
            D-FINE and RF-DETR see squares of the short side: theirs is four times as long at least.
        max_proposals: Most proposals of an image in a step.
        proposal_choice: Where an image has more: "random" draws anew in each step (the default), "top" takes
            the first in rank order (the default of query-based detectors; better for few epochs).
        steps: Length of the run in optimizer steps; takes the place of epochs.
        epochs: Length of the run in epochs: passes over the images.
        batch_size: Images a batch on each device.
        accumulate: Batches whose gradients are accumulated for one step of the optimizer.
        optimizer: "adamw" or "sgd".
        learning_rate: After the warm-up; by default 5e-4, of query-based detectors 1e-4, with SGD 1e-2.
        weight_decay: Of matrices and kernels; by default 0.05, of query-based detectors and with SGD 1e-4.
        lr_schedule: Of the learning rate: "cosine", "step" (to a tenth at each of lr_drops),
            "constant".
        lr_drops: Of the step schedule: after which shares of the run the rate falls, such as 0.8.
        warmup_steps: Steps of linear warm-up, at most a quarter of the run.
        clip: Largest gradient norm, by default 10, of query-based detectors 0.1; null for none.
        temperature: Of the contrastive loss (equation 4); at least 0.025; in short runs 0.1 did better.
        gather_keys: Contrast with the boxes of all processes; by default each with its own alone.
        decay: Coefficient of the momentum detector's moving average (EMA) at the start; it grows to 1 by a
            cosine. By default 0.996, or 1 - 15 / steps in runs of fewer than 3,750 steps.
        contrast_weight: Factor of the contrastive loss; 0 leaves the box losses alone.
        box_weight: Factor of the detector's own box losses; 0 leaves the contrast alone.
        train_trunk: Train the trunk as well (the paper's table 11 advises against it).
        devices: Devices a machine; 2 on a machine without GPU means two processes.
        nodes: Machines; torchrun or Slurm starts the command on each.
        accelerator: "auto", "cpu" or "gpu".
        strategy: "auto" or "ddp": every device has the whole detector; "fsdp": a part of every parameter, for
            detectors too large for one (FSDP2; it exchanges more).
        precision: "32", "bf16-mixed" or "16-mixed".
        channels_last: Hold channels as neighbours in memory; the same up to rounding.
        compile: Let torch.compile take trunk, pyramid and heads; the first steps take minutes.
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
        ValueError: If the input does not fit together; the message names the file or the value.
    """
    settings = dict(locals())
    with run_folder(settings, _EXPLANATION) as checkpoint:
        seed_everything(seed, verbose=False)
        architecture: dict[str, Any] = {
            "detector": detector,
            "trunk": trunk,
            "fpn_channels": fpn_channels,
            "fpn_norm": fpn_norm,
        }
        adapter: Any = build_pretrainable(**architecture, trunk_weights=trunk_weights, options=options)
        needs = adapter.needs
        table = read_proposals(proposals, masks="masks" in needs)
        if "clusters" in needs:
            table = with_clusters(table, proposals, adapter.num_clusters)
        source = ImageSource(images)
        if names is not None or exclude is not None:
            table = table.only(source.select(table.file_names, only=names, exclude=exclude))
        dataset = TwoViewDataset(
            source,
            table,
            min_size=min_size,
            max_size=adapter.long_side(min_size, max_size),
            max_proposals=max_proposals,
            top_proposals=adapter.top_proposals if proposal_choice == "default" else proposal_choice == "top",
            strict=strict,
        )
        if not len(table.boxes):
            raise ValueError(
                f"{proposals}: holds no box in any of its {len(table)} images: nothing to learn from"
            )
        source.prepare(table.file_names, proposals)
        images_a_step = batch_size * accumulate * devices * nodes
        training = with_recipe(settings, training_defaults(detector, optimizer, learning_rate=5e-4))
        total = steps or max(1, round(epochs * len(dataset) / images_a_step))
        module = BoxPretraining(
            adapter,
            steps=total,
            temperature=temperature,
            gather_keys=gather_keys,
            decay=decay,
            contrast_weight=contrast_weight,
            box_weight=box_weight,
            train_trunk=train_trunk,
            optimizer=optimizer,
            learning_rate=training["learning_rate"],
            weight_decay=training["weight_decay"],
            schedule=lr_schedule,
            lr_drops=lr_drops,
            warmup_steps=warmup_steps,
            seed=seed,
        )
        run = {name: training[name] for name in RUN_SETTINGS} | {
            "sync_batch_norm": train_trunk or fpn_norm == "batch" or adapter.weights_format == "transformers"
        }
        counts = f"{len(table)} images with {len(table.boxes)} proposals"
        masks = () if table.masks is None else (table.masks[0].numpy(), table.masks[1])
        clusters = () if table.clusters is None else (table.clusters,)
        data = data_summary(counts, table.file_names, [table.boxes, table.offsets, *masks, *clusters])
        if fit(module, dataset, data=data, steps=total, checkpoint=checkpoint, **run):
            shared = {k: v for k, v in (options or {}).items() if k in adapter.shared_options()}
            manifest = {
                "kind": "pre-trained parts",
                "architecture": architecture | ({"options": shared} if shared else {}),
                "trunk": {"weights": trunk_weights, "trained": train_trunk},
                "left_out": list(module.online.prediction_layers),
                "pretraining": settings,
                **provenance(),
            }
            save_weights(output / "pretrained", pretrained_state(module.online), manifest)
            print(f"pre-trained weights: {output / 'pretrained'}")
    return output
