"""Accuracy: what pre-training is worth at equal fine-tuning budgets, seed by seed.

Writes every cell as a run of its own and goes on where it stopped; the table is printed from what is there.

    python benchmarks/gain.py --data ../shared/data/stamps --output runs/gain
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch

from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose

TRUNK: dict[str, Any] = {"trunk": "tf_efficientnet_lite0", "trunk_weights": "bundled", "fpn_channels": 128}


def labelled_part(data: Path, output: Path, images: int) -> Path:
    """Draws the labelled images once and for all (seed 0)."""
    path = output / f"train_{images}.json"
    if not path.is_file():
        document = json.loads((data / "train.json").read_text())
        document["images"] = random.Random(0).sample(
            sorted(document["images"], key=lambda i: int(i["id"])), images
        )
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
        path.write_text(json.dumps(document))
    return path


def cell(
    args: argparse.Namespace, detector: str, pretrain_steps: int, seed: int, learning_rate: float
) -> dict[str, float]:
    """Runs one cell, or reads what it gave."""
    common: dict[str, Any] = {
        "max_size": 256,
        "batch_size": 8,
        "seed": seed,
        "workers": 1,
        "precision": args.precision,
        "accelerator": "auto",
    }
    folder: Path = args.output / detector
    init_from = None
    if pretrain_steps:
        init_from = folder / f"pretrain_{pretrain_steps}_seed{seed}"
        if not (init_from / "pretrained" / "manifest.json").is_file():
            pretrain(
                args.data / "train",
                proposals=args.output / "proposals",
                output=init_from,
                detector=detector,
                steps=pretrain_steps,
                learning_rate=args.pretrain_learning_rate,
                warmup_steps=args.warmup_steps,
                decay=args.decay,
                # the images are 4:3 and 256 long at most: short sides of 128 to 192 let views differ in scale
                min_size=(128, 192),
                max_proposals=args.proposals,
                checkpoint_every=50,
                resume=init_from.is_dir(),
                **TRUNK,
                **common,
            )
    run = folder / f"finetune_after{pretrain_steps}_seed{seed}_lr{learning_rate:g}-{args.batch_norm}"
    result = run / "result.json"
    if not result.is_file():
        if not (run / "model" / "manifest.json").is_file():
            finetune(
                labelled_part(args.data, args.output, args.labels),
                images=args.data / "train",
                output=run,
                init_from=init_from,
                detector=detector,
                steps=args.steps,
                learning_rate=learning_rate,
                min_size=(192, 256),
                batch_norm=args.batch_norm,
                weight_decay=0.05,
                checkpoint_every=50,
                resume=run.is_dir(),
                **TRUNK,
                **common,
            )
        evaluate(run / "model", args.data / "val.json", images=args.data / "val", output=result)
    figures = json.loads(result.read_text())
    return {name: 100 * figures[name] for name in ("AP", "AP50", "AP75")}


def table(args: argparse.Namespace) -> str:
    """All cells that are there: mean and spread (standard deviation) over the seeds."""
    cells: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for result in sorted(args.output.glob("*/finetune_after*/result.json")):
        after, _, learning_rate = result.parent.name.removeprefix("finetune_after").split("_")
        figures = json.loads(result.read_text())
        cells.setdefault((result.parent.parent.name, int(after), learning_rate), []).append(figures)
    lines = [
        f"{'detector':<12}{'pre-training':>14}{'lr':>16}{'seeds':>7}"
        + "".join(f"{n:>16}" for n in ("AP", "AP50", "AP75"))
    ]
    for (detector, after, learning_rate), results in sorted(cells.items()):
        line = f"{detector:<12}{after or 'none':>14}{learning_rate[2:]:>16}{len(results):>7}"
        for name in ("AP", "AP50", "AP75"):
            values = [100 * r[name] for r in results]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            line += f"{f'{statistics.mean(values):.2f}{spread}':>16}"
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
    parser.add_argument("--pretrain-steps", nargs="+", type=int, default=[0, 150], help="0: no pre-training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--labels", type=int, default=300, help="labelled images")
    parser.add_argument("--steps", type=int, default=250, help="of fine-tuning")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--pretrain-learning-rate", type=float, default=1e-3)
    parser.add_argument("--proposals", type=int, default=20, help="of an image in a step, at random")
    parser.add_argument("--batch-norm", default="frozen", choices=["frozen", "trained"])
    parser.add_argument("--warmup-steps", type=int, default=10, help="of pre-training")
    parser.add_argument("--decay", type=float, default=0.996, help="of the momentum detector at the start")
    parser.add_argument("--precision", default="32", choices=["32", "bf16-mixed"])
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it comes")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "proposals").exists():
        propose(args.data / "train", output=args.output / "proposals", annotations=args.data / "train.json")
    for seed in args.seeds:
        for detector in args.detectors:
            for steps in args.pretrain_steps:
                for learning_rate in args.learning_rates:
                    figures = cell(args, detector, steps, seed, learning_rate)
                    print(
                        f"{detector} after {steps} steps, seed {seed}, lr {learning_rate:g}: {figures}",
                        flush=True,
                    )
    print(table(args))


if __name__ == "__main__":
    main()
