"""Accuracy: what pre-training is worth at equal fine-tuning budgets, seed by seed.

Writes every cell as a run of its own and goes on where it stopped; the table is printed from what is there.

    python benchmarks/gain.py --data ../shared/data/stamps --output runs/gain
    python benchmarks/gain.py --data ../shared/data/stamps --output runs/resnet18 --detectors mask_rcnn \
        --trunk resnet18 --trunk-weights runs/backbone --fpn-norm batch
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any, TypeAlias

import torch

from aligndet.commands.cluster import cluster
from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose
from aligndet.data.augmentations import AUGMENTATIONS
from aligndet.data.splits import with_images
from aligndet.detectors.build import family_of, training_defaults
from aligndet.detectors.weights import MODULES
from aligndet.proposals.clusters import clusters_file

FIGURES = ("AP", "AP50", "AP75", "mask_AP")
CocoFigures: TypeAlias = dict[str, Any]
ALL = tuple(MODULES)
# name: settings of pre-training (None: there is none), parts that fine-tuning takes from it
ARMS: dict[str, tuple[dict[str, Any] | None, tuple[str, ...]]] = {
    "scratch": (None, ALL),
    "aligndet": ({}, ALL),
    # the paper's table 9
    "neck": ({}, ("trunk", "neck")),
    "neck-rpn": ({}, ("trunk", "neck", "rpn")),
    "neck-head": ({}, ("trunk", "neck", "head")),
    # table 10
    "contrast": ({"box_weight": 0.0}, ALL),
    "boxes": ({"contrast_weight": 0.0}, ALL),
    # table 11
    "trained-trunk": ({"train_trunk": True}, ALL),
    # the paper's mask head at random numbers, and its sampling for the region proposal network
    "no-mask": ({"options": {"pretrain_mask": False}}, ALL),
    "rpn-positives": ({"options": {"rpn_positives": True}}, ALL),
    # DETRs: the class layer tells objects from background alone
    "objectness": ({"options": {"objectness": True}}, ALL),
}


# what may differ between the cells of an output folder: their names tell it, or it changes no figure
FREE = {"detectors", "arms", "seeds", "pretrain_steps", "learning_rates", "batch_norm"}
FREE |= {"output", "threads", "channels_last"}


def trunk_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("trunk", "trunk_weights", "fpn_channels", "fpn_norm")}


def keep_settings(args: argparse.Namespace) -> None:
    """Lets no cell of other settings into the table of an output folder."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    labels = ((args.data / f"{part}.json").read_bytes() for part in ("train", "val"))
    settings["data"] = [hashlib.sha256(label).hexdigest() for label in labels]
    path = args.output / "settings.json"
    if path.is_file() and (kept := json.loads(path.read_text())) != settings:
        other = ", ".join(sorted(name for name in settings if kept.get(name) != settings[name]))
        raise SystemExit(f"{path}: these cells have another {other}; give another --output")
    path.write_text(json.dumps(settings, indent=2))


def labelled_part(data: Path, output: Path, images: int) -> Path:
    """Draws the labelled images once and for all (seed 0)."""
    path = output / f"train_{images}.json"
    if not path.is_file():
        document = json.loads((data / "train.json").read_text())
        in_order = sorted(document["images"], key=lambda image: int(image["id"]))
        path.write_text(json.dumps(with_images(document, random.Random(0).sample(in_order, images))))
    return path


def cell(
    args: argparse.Namespace, detector: str, arm: str, steps: int, seed: int, rate: float
) -> CocoFigures:
    """Runs one cell, or reads what it gave."""
    common: dict[str, Any] = {
        "max_size": args.size,
        "batch_size": 8,
        "seed": seed,
        "workers": 1,
        "channels_last": args.channels_last,
        "accelerator": "auto",
    }
    folder: Path = args.output / detector
    pretrain_options: dict[str, Any] = {}
    finetune_options: dict[str, Any] = {}
    if family_of(detector).weights_format == "transformers":
        settings = (setting.split("=") for setting in args.query_settings)
        pretrain_options = finetune_options = {name: json.loads(value) for name, value in settings}
    elif "rcnn" in detector or "htc" in detector:  # torchvision's 512 and 1,000 are for images of 800 pixels
        common_options = {"box_convolutions": args.box_convolutions}
        pretrain_options = {"max_boxes": 8 * args.pretrain_regions, **common_options}
        finetune_options = {"box_batch_size_per_image": args.regions, "rpn_post_nms_top_n_test": 300}
        finetune_options |= common_options
    pretraining, init = ARMS[arm]
    init_from = None
    if pretraining is not None:
        kind = arm if pretraining else "aligndet"
        init_from = folder / f"pretrain_{kind}_{steps}_seed{seed}"
        if not (init_from / "pretrained" / "manifest.json").is_file():
            pretrain(
                args.data / "train",
                proposals=args.output / "proposals",
                output=init_from,
                detector=detector,
                steps=steps,
                learning_rate=args.pretrain_learning_rate,
                warmup_steps=args.warmup_steps,
                decay=args.decay,
                temperature=args.temperature,
                # the images are 4:3: with such short sides, views differ in scale
                min_size=(args.size // 2, args.size * 3 // 4),
                max_proposals=args.proposals,
                proposal_choice=args.proposal_choice,
                checkpoint_every=50,
                resume=init_from.is_dir(),
                **{**pretraining, "options": pretrain_options | pretraining.get("options", {})},
                **trunk_of(args),
                precision=args.pretrain_precision,
                **common,
            )
    run = folder / f"finetune_{arm}_{steps if init_from else 0}_seed{seed}_lr{rate:g}-{args.batch_norm}"
    result = run / "result.json"
    if not result.is_file():
        if not (run / "model" / "manifest.json").is_file():
            finetune(
                labelled_part(args.data, args.output, args.labels),
                images=args.data / "train",
                output=run,
                init_from=init_from,
                init=init,
                detector=detector,
                steps=args.steps,
                optimizer=args.optimizer,
                learning_rate=rate,
                min_size=(args.size * 3 // 4, args.size),
                augmentation=args.augmentation,
                batch_norm=args.batch_norm,
                precision=args.precision,
                trunk_factor=args.trunk_factor,
                options=finetune_options,
                weight_decay=training_defaults(detector, args.optimizer)["weight_decay"],
                checkpoint_every=50,
                resume=run.is_dir(),
                **trunk_of(args),
                **common,
            )
        evaluate(run / "model", args.data / "val.json", images=args.data / "val", output=result)
    return json.loads(result.read_text())


def table(args: argparse.Namespace) -> str:
    """All cells that are there: mean and spread (standard deviation) over the seeds."""
    cells: dict[tuple[str, int, str, str], list[CocoFigures]] = {}
    for result in sorted(args.output.glob("*/finetune_*/result.json")):
        _, arm, steps, _, rate = result.parent.name.split("_")
        key = (result.parent.parent.name, int(steps), arm, rate.removeprefix("lr"))
        cells.setdefault(key, []).append(json.loads(result.read_text()))
    lines = [
        f"{'detector':<20}{'arm':<16}{'steps':>6}{'lr':>14}{'seeds':>7}"
        + "".join(f"{n:>15}" for n in FIGURES)
    ]
    for (detector, steps, arm, rate), results in sorted(cells.items()):
        line = f"{detector:<20}{arm:<16}{steps:>6}{rate:>14}{len(results):>7}"
        for name in FIGURES:
            values = [100 * r[name] for r in results if r.get(name) is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            line += f"{f'{statistics.mean(values):.2f}{spread}' if values else '':>15}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.json, train/, val.json, val/"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gain"))
    parser.add_argument("--detectors", nargs="+", default=["fcos", "retinanet"])
    parser.add_argument("--trunk", default="tf_efficientnet_lite0", help="as for `aligndet pretrain`")
    parser.add_argument(
        "--trunk-weights", default="bundled", help="likewise; a run of pretrain-backbone, ..."
    )
    parser.add_argument("--fpn-channels", type=int, default=128)
    parser.add_argument("--fpn-norm", default="none", choices=["none", "batch"])
    parser.add_argument("--arms", nargs="+", default=["scratch", "aligndet"], choices=list(ARMS))
    parser.add_argument("--pretrain-steps", nargs="+", type=int, default=[150])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=300, help="labelled images")
    parser.add_argument("--steps", type=int, default=250, help="of fine-tuning")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"], help="of fine-tuning")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--pretrain-learning-rate", type=float, default=5e-4)
    parser.add_argument("--proposals", type=int, default=20, help="of an image in a step")
    parser.add_argument(
        "--proposal-choice", default="default", choices=["default", "top", "random"], help="of these"
    )
    parser.add_argument("--size", type=int, default=256, help="of images: their long side in pixels")
    parser.add_argument("--augmentation", default="multiscale", choices=list(AUGMENTATIONS))
    parser.add_argument("--batch-norm", default="frozen", choices=["frozen", "trained"])
    parser.add_argument(
        "--trunk-factor", type=float, default=0.1, help="of the trunk's learning rate; 0 freezes it"
    )
    parser.add_argument("--warmup-steps", type=int, default=10, help="of pre-training")
    parser.add_argument("--decay", type=float, default=0.9, help="of the momentum detector at the start")
    parser.add_argument("--precision", default="32", choices=["32", "bf16-mixed"], help="of fine-tuning")
    parser.add_argument("--pretrain-precision", default="32", choices=["32", "bf16-mixed"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the contrastive loss")
    parser.add_argument("--regions", type=int, default=128, help="that two-stage heads train on, of an image")
    parser.add_argument("--pretrain-regions", type=int, default=512, help="likewise in pre-training")
    parser.add_argument(
        "--box-convolutions", type=int, default=0, help="of two-stage box heads; as the authors: 4"
    )
    parser.add_argument(
        "--query-settings",
        nargs="+",
        default=["num_queries=100"],
        metavar="NAME=NUMBER",
        help="of query-based detectors, as transformers' configurations have them",
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it comes")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    keep_settings(args)
    if not (args.output / "proposals").exists():
        annotations = args.data / "train.json"
        propose(args.data / "train", output=args.output / "proposals", annotations=annotations, masks=True)
    pretrainings = (setting for setting, _ in (ARMS[arm] for arm in args.arms) if setting is not None)
    with_clusters = not all("objectness" in setting.get("options", {}) for setting in pretrainings)
    if with_clusters and any(family_of(d).weights_format == "transformers" for d in args.detectors):
        settings = {name: trunk_of(args)[name] for name in ("trunk", "trunk_weights")}
        settings |= {"min_size": 480, "max_size": 640}  # clusters of smaller images know little: clusters.py
        if not clusters_file(args.output / "proposals").exists():
            cluster(args.data / "train", proposals=args.output / "proposals", **settings)
    for seed, detector, arm in itertools.product(args.seeds, args.detectors, args.arms):
        for steps, rate in itertools.product(args.pretrain_steps, args.learning_rates):
            figures = cell(args, detector, arm, steps, seed, rate)
            shown = {name: round(100 * figures[name], 2) for name in FIGURES if figures.get(name) is not None}
            print(f"{detector}, {arm}, {steps} steps, seed {seed}, lr {rate:g}: {shown}", flush=True)
    print(table(args))


if __name__ == "__main__":
    main()
