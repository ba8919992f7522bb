"""Loss: time and memory against naive loops and against the matrix products alone.

    python benchmarks/loss.py

Forward and backward, medians of alternating calls in one process. "products" is what no implementation can do
without: all similarities, and their gradient. "loop" goes over the queries one by one, each against all keys
at once, so it is a kind loop; it runs up to --loop boxes. "pairs" is the formula as it stands, one pair of
boxes after the other; the time of a few queries is scaled up to all. Memory is the peak over what was there
before, of a process each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.boxes import BACKGROUND, BoxPredictions
from aligndet.losses import box_contrastive_loss

TEMPERATURE = 0.5


def views(boxes: int, width: int = 128) -> tuple[BoxPredictions, BoxPredictions]:
    """Half of the boxes stand for 160 proposals, the others for none, as in a batch of 8 images."""
    sides = []
    for _ in range(2):
        ids = torch.randint(0, 160, (boxes,))
        ids[boxes // 2 :] = BACKGROUND
        sides.append(BoxPredictions(torch.randn(boxes, width), ids))
    sides[0].embeddings.requires_grad_()
    return sides[0], sides[1]


def ours(online: BoxPredictions, momentum: BoxPredictions) -> Tensor:
    return box_contrastive_loss(online, momentum, TEMPERATURE)


def products(online: BoxPredictions, momentum: BoxPredictions) -> Tensor:
    boxes = F.normalize(online.embeddings, dim=1)
    keys = torch.cat([F.normalize(momentum.embeddings, dim=1), boxes.detach()])
    return (boxes[online.proposal_ids != BACKGROUND] / TEMPERATURE @ keys.T).exp().sum()


def loop(online: BoxPredictions, momentum: BoxPredictions) -> Tensor:
    boxes = F.normalize(online.embeddings, dim=1)
    keys = torch.cat([F.normalize(momentum.embeddings, dim=1), boxes.detach()])
    key_ids = torch.cat([momentum.proposal_ids, online.proposal_ids])
    losses: dict[int, list[Tensor]] = {}
    for box, proposal in zip(boxes, online.proposal_ids.tolist(), strict=True):
        positives = (momentum.proposal_ids == proposal).nonzero()[:, 0]
        if proposal == BACKGROUND or not len(positives):
            continue
        similarities = keys @ box / TEMPERATURE
        below = similarities[key_ids != proposal].exp().sum()
        above = similarities[positives].exp()
        losses.setdefault(proposal, []).append(-(above / (above + below)).log().mean())
    return torch.stack([torch.stack(parts).mean() for parts in losses.values()]).mean()


def seconds_of_pairs(online: BoxPredictions, momentum: BoxPredictions, queries: int = 4) -> float:
    """Of all queries, by the time that a few of them take."""
    keys = torch.cat([momentum.embeddings, online.embeddings.detach()])
    ids = torch.cat([momentum.proposal_ids, online.proposal_ids]).tolist()
    found = momentum.proposal_ids[momentum.proposal_ids != BACKGROUND]
    assigned = torch.isin(online.proposal_ids, found).nonzero()[:, 0].tolist()
    begun = time.perf_counter()
    for query in assigned[:queries]:
        box = online.embeddings[query]
        similarities = [(torch.dot(box, key) / (box.norm() * key.norm()) / TEMPERATURE).exp() for key in keys]
        of_others = [s for s, proposal in zip(similarities, ids, strict=True) if proposal != ids[query]]
        below = torch.stack(of_others).sum()
        losses = [
            -(similarity / (similarity + below)).log()
            for similarity, proposal in zip(similarities, momentum.proposal_ids.tolist(), strict=False)
            if proposal == ids[query]
        ]
        torch.stack(losses).mean().backward()
    return (time.perf_counter() - begun) / queries * len(assigned)


WAYS: dict[str, Callable[[BoxPredictions, BoxPredictions], Tensor]] = {
    "ours": ours,
    "products": products,
    "loop": loop,
}


def seconds(way: str, sides: tuple[BoxPredictions, BoxPredictions]) -> float:
    sides[0].embeddings.grad = None
    begun = time.perf_counter()
    WAYS[way](*sides).backward()
    return time.perf_counter() - begun


def peak(way: str, boxes: int) -> float:
    """MiB over what was there before, of a process of its own."""
    command = [sys.executable, __file__, "--peak", way, "--boxes", str(boxes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident() -> float:
    """MiB, at their peak so far (of this process alone: resource's figure would be inherited)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure_peak(way: str, boxes: int) -> None:
    seconds(way, views(256))  # libraries are loaded
    sides = views(boxes)
    before = resident()
    seconds(way, sides)
    print(resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--boxes", nargs="+", type=int, default=[256, 1024, 2048, 4096, 8192], help="of a view"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop", type=int, default=4096, help="most boxes of the loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak:
        return measure_peak(args.peak, args.boxes[0])
    print(
        f"{'boxes':>6}"
        + "".join(f"{way + ' ms':>13}{'MiB':>7}" for way in WAYS)
        + f"{'/products':>11}{'loop/ours':>11}{'pairs/ours':>12}"
    )
    for boxes in args.boxes:
        sides = views(boxes)
        ways = [way for way in WAYS if way != "loop" or boxes <= args.loop]
        for way in ways:
            seconds(way, sides)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(args.repeats):
            for way in ways:
                if way != "loop" or repeat == 0:
                    times[way].append(seconds(way, sides))
        median = {way: 1000 * statistics.median(values) for way, values in times.items()}
        line = f"{boxes:>6}"
        for way in WAYS:
            line += f"{median[way]:>13.1f}{peak(way, boxes):>7.0f}" if way in median else f"{'':>20}"
        line += f"{median['ours'] / median['products']:>11.2f}"
        line += f"{median['loop'] / median['ours']:>11.1f}" if "loop" in median else f"{'':>11}"
        print(line + f"{1000 * seconds_of_pairs(*sides) / median['ours']:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
