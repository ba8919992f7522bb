"""Speed: our whole pre-training step against the bare network and against torchvision's fine-tuning step.

    python benchmarks/step.py --detectors fcos retinanet faster_rcnn mask_rcnn cascade_rcnn htc
    python benchmarks/step.py --detectors cascade_rcnn cbnet_cascade_rcnn --trunk resnet18 --size 192
    python benchmarks/step.py --detectors fcos --variants plain channels-last bf16 channels-last-bf16

(a) bare network: the trunk twice without gradient, momentum neck and heads forward, online neck and heads
    forward and backward; nothing else. Two-stage heads run on the regions that our step has run them on;
    query-based detectors predict classes and boxes from every layer
(b) torchvision's or transformers' own fine-tuning step: its detector with 91 classes and three trainable
    layers of the trunk (of a ViT: quarters), all losses, backward, AdamW, fused as ours is (cascades, which
    it lacks: ours, built of its parts)
(c) our step: assignment, selection, projection, all losses, statistics, backward, gradient clipping, AdamW,
    momentum; the frozen trunk has its batch norms folded, which (a) and (b) run

Times alternate within one process, also between variants, and are medians; "c/plain" is (c) by the first
variant's. On a machine with other work, --clock cpu counts the processor's time of all threads instead. Each
peak of memory is one process's own. The last line of a detector counts the parameters of (c), in millions, by
the modules that fine-tuning can start from; of query-based detectors it also has the share of (c) that their
Hungarian matching takes, in the losses and for the momentum detector.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aligndet.box_pretraining import BoxPretraining
from aligndet.data.views import TwoViews, View
from aligndet.detectors.build import DETECTORS, build_detector, build_pretrainable, family_of
from aligndet.detectors.query import QueryPretraining, decoder_states, without_losses
from aligndet.detectors.query_detector import relative_targets
from aligndet.detectors.roi_parts import mask_features
from aligndet.detectors.weights import MODULES, network_of
from aligndet.momentum import update_momentum
from aligndet.training import clip_gradients, compile_networks

Step = Callable[[], None]
Module = TypeVar("Module", bound=nn.Module)
Calls = list[tuple[nn.Module, tuple[Any, ...]]]


def batch(args: argparse.Namespace) -> list[TwoViews]:
    items = []
    for index in range(args.batch):
        views = []
        for _ in range(2):
            image = torch.randint(0, 256, (3, args.size, args.size), dtype=torch.uint8)
            corner = torch.rand(args.proposals, 2) * args.size * 0.7
            sides = torch.rand(args.proposals, 2) * args.size * 0.25 + args.size * 0.05
            masks = torch.ones(args.proposals, 56, 56, dtype=torch.uint8).tril()
            clusters = torch.randint(0, 256, (args.proposals,))
            made = image, torch.cat([corner, corner + sides], dim=1), masks, clusters
            views.append(View(*(tensor.to(args.device) for tensor in made)))
        items.append(TwoViews(views[0], views[1], str(index), ()))
    return items


def prepared(module: Module, args: argparse.Namespace) -> Module:
    if "compile" in args.variant:
        compile_networks(module)
    last = "channels-last" in args.variant
    module.to(args.device)
    return module.to(memory_format=torch.channels_last if last else torch.preserve_format)


def in_precision(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled="bf16" in args.variant)


def pretraining(detector: str, args: argparse.Namespace, **settings: Any) -> BoxPretraining:
    adapter = build_pretrainable(detector, trunk=args.trunk, fpn_channels=args.fpn_channels)
    module = BoxPretraining(adapter, steps=1000, **settings)
    return prepared(module.train(), args)


@contextmanager
def recorded(adapter: Any) -> Iterator[Calls]:
    """What the regions' heads are called with, in order."""
    calls: Calls = []
    names = ("box_roi_pool", "mask_roi_pool")
    pools = {getattr(stage, name) for stage in adapter.stages for name in names} - {None}
    hooks = [
        p.register_forward_pre_hook(lambda pool, inputs: calls.append((pool, inputs[1:]))) for p in pools
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def dense_network(adapter: Any, images: Tensor) -> list[Tensor]:
    pyramid = list(adapter.detector.backbone(images).values())
    head = adapter.detector.head
    boxes = head.regression_head(pyramid)
    towers = [head.classification_head.conv(level) for level in pyramid]
    return [*(boxes if isinstance(boxes, tuple) else (boxes,)), *towers]


def region_network(adapter: Any, images: Tensor, calls: Calls) -> list[Tensor]:
    branches = adapter.detector.backbone.branches(images)
    share = len(calls) // len(branches)
    outputs = []
    for index, branch in enumerate(branches):
        outputs += one_branch(adapter, branch.pyramid, calls[index * share : (index + 1) * share])
    return outputs


def one_branch(adapter: Any, pyramid: dict[str, Tensor], calls: Calls) -> list[Tensor]:
    scores, deltas = adapter.detector.rpn.head(list(pyramid.values()))
    outputs = [*scores, *deltas]
    depth = {7: 0, 14: 0}  # stages done so far, by the size that their heads pool to
    for pool, inputs in calls:
        size = int(pool.output_size[0])  # type: ignore[index]
        pooled, stage = pool(pyramid, *inputs), adapter.stages[depth[size]]
        depth[size] += 1
        if size == 7:
            outputs.extend(stage.box_predictor(stage.box_head(pooled)))
        else:
            stages, flows = adapter.stages[: depth[size]], adapter.flows[: depth[size] - 1]
            outputs.append(stage.mask_predictor(mask_features(stages, flows, pooled)[-1]))
    return outputs


def query_network(adapter: Any, images: Tensor, labels: list[dict[str, Tensor]]) -> list[Tensor]:
    network = adapter.detector.network
    with decoder_states(network.model) as states, without_losses(network):
        outputs = adapter.detector.run(list(images), labels)
    count = states[0].shape[adapter.family.layer_dim]
    layers = [layer[name] for layer in adapter._layers(outputs, count) for name in ("logits", "pred_boxes")]
    others = [outputs.get(f"enc_topk_{name}") for name in ("logits", "bboxes")]
    return [states[0], *layers, *(other for other in others if other is not None)]


def bare(detector: str, args: argparse.Namespace) -> Step:
    module = pretraining(detector, args)
    images = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    networks = [lambda: dense_network(module.momentum, images), lambda: dense_network(module.online, images)]
    if isinstance(module.online, QueryPretraining):
        classes = torch.zeros(args.proposals, dtype=torch.int64, device=args.device)
        labels = [relative_targets(i.online.image, i.online.proposals, classes) for i in batch(args)]
        networks = [
            lambda: query_network(module.momentum, images, labels),
            lambda: query_network(module.online, images, labels),
        ]
    elif hasattr(module.online, "stages"):
        items = batch(args)
        with recorded(module.online) as online, recorded(module.momentum) as momentum:
            silently(module).training_step(items, 0)
        networks = [
            lambda: region_network(module.momentum, images, momentum),
            lambda: region_network(module.online, images, online),
        ]

    def step() -> None:
        with in_precision(args):
            with torch.no_grad():
                networks[0]()
            outputs = networks[1]()
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for parameter in trained:
            parameter.grad = None

    return step


def finetuning(detector: str, args: argparse.Namespace) -> Step:
    sizes = {"min_size": args.size, "max_size": args.size, "fpn_channels": args.fpn_channels}
    model: Any = build_detector(detector, num_classes=90, trunk=args.trunk, **sizes)
    depths = {name: re.search(r"layer\.?(\d+)\.", name) for name, _ in model.backbone.body.named_parameters()}
    deepest = max((int(found[1]) for found in depths.values() if found), default=0)
    for name, parameter in model.backbone.body.named_parameters():  # a ViT's: three quarters of its blocks
        parameter.requires_grad_((found := depths[name]) is not None and int(found[1]) > deepest / 4)
    for layer in model.backbone.body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False).eval()
    model = prepared(model, args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    items = batch(args)
    images = [item.online.image.float() / 255 for item in items]
    targets = [
        {
            "boxes": item.online.proposals,
            "labels": torch.ones(args.proposals, dtype=torch.int64, device=args.device),
            "masks": torch.ones(args.proposals, args.size, args.size, dtype=torch.uint8, device=args.device),
        }
        for item in items
    ]

    def step() -> None:
        with in_precision(args):
            losses = model(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def silently(module: BoxPretraining) -> BoxPretraining:
    """Without a trainer there is nothing to log to."""
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return module


def ours(detector: str, args: argparse.Namespace) -> Step:
    module = silently(pretraining(detector, args, learning_rate=1e-6))
    module.on_train_start()
    optimizer: torch.optim.Optimizer = module.configure_optimizers()["optimizer"]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    items = batch(args)

    def step() -> None:
        with in_precision(args):
            loss = module.training_step(items, 0)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(trained, 10.0)
        optimizer.step()
        update_momentum(module.online, module.momentum, 0.996)

    return step


PARTS = {"a": bare, "b": finetuning, "c": ours}
VARIANTS = ("plain", "channels-last", "bf16", "channels-last-bf16", "compile")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def of_variant(variant: str, args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "variant": variant})


def timings(detector: str, args: argparse.Namespace) -> dict[tuple[str, str], float]:
    steps = {
        (variant, part): build(detector, of_variant(variant, args))
        for variant in args.variants
        for part, build in PARTS.items()
    }
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for repeat in range(args.repeats + 2):
        for key, step in steps.items():
            start = CLOCKS[args.clock]()
            step()
            if args.device != "cpu":
                torch.cuda.synchronize(args.device)
            if repeat >= 2:
                taken[key].append(CLOCKS[args.clock]() - start)
    return {key: statistics.median(values) for key, values in taken.items()}


def parameters(detector: str, args: argparse.Namespace) -> dict[str, float]:
    network = network_of(pretraining(detector, args).online.detector)
    return {
        module: sum(p.numel() for name, p in network.named_parameters() if name.startswith(prefixes)) / 1e6
        for module, prefixes in MODULES.items()
    }


def matching_share(detector: str, args: argparse.Namespace) -> float:
    """Of the time of our step, by the family's own matcher, which the losses build anew in each call."""
    matcher: Any = type(pretraining(detector, args).online.matcher)
    own, step, inside = matcher.forward, ours(detector, args), 0.0

    def now() -> float:
        if args.device != "cpu":
            torch.cuda.synchronize(args.device)
        return CLOCKS[args.clock]()

    def timed(*call: Any, **others: Any) -> Any:
        nonlocal inside
        start = now()
        found = own(*call, **others)
        inside += now() - start
        return found

    step()
    matcher.forward = timed
    try:
        start = now()
        for _ in range(args.repeats):
            step()
        return inside / (now() - start)
    finally:
        matcher.forward = own


def peak_memory(device: str) -> float:
    """In GiB, of a GPU's tensors or of this process alone; getrusage would count what the parent held."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


def peak_of(detector: str, part: str, arguments: list[str]) -> float:
    command = [sys.executable, __file__, *arguments, "--detectors", detector, "--memory-of", part]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detectors", nargs="+", default=["fcos", "retinanet"], choices=list(DETECTORS))
    parser.add_argument("--trunk", default="resnet50", help="one of torchvision's ResNets")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--proposals", type=int, default=50)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--fpn-channels", type=int, default=256)
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=VARIANTS)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peaks out")
    parser.add_argument("--memory-of", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        step = PARTS[args.memory_of](args.detectors[0], of_variant(args.variants[0], args))
        for _ in range(3):
            step()
        print(peak_memory(args.device))
        return
    shape = ("trunk", "size", "batch", "proposals", "device", "threads", "fpn_channels")
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in shape]
    head = ("a: bare", "b: finetune", "c: ours", "c/a", "c/b", "c/plain", "peak a", "peak b", "peak c (GiB)")
    print(f"{'detector':>20}{'variant':>20}" + "".join(f"{name:>13}" for name in head))
    for detector in args.detectors:
        taken = timings(detector, args)
        for variant in args.variants:
            a, b, c = (taken[variant, part] for part in PARTS)
            parts = PARTS if args.memory else ()
            peaks = [peak_of(detector, part, [*options, f"--variants={variant}"]) for part in parts]
            cells = [f"{seconds:.3f} s" for seconds in (a, b, c)]
            cells += [f"{ratio:.3f}" for ratio in (c / a, c / b, c / taken[args.variants[0], "c"])]
            cells += [f"{peak:.2f}" for peak in peaks]
            print(f"{detector:>20}{variant:>20}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
        counts = parameters(detector, of_variant(args.variants[0], args))
        figures = [f"{n} {v:.2f} M" for n, v in counts.items()]
        if issubclass(family_of(detector), QueryPretraining):
            share = matching_share(detector, of_variant(args.variants[0], args))
            figures.append(f"matching {100 * share:.1f} % of c")
        print(" " * 22 + ", ".join(figures), flush=True)


if __name__ == "__main__":
    main()
