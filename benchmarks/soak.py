"""Endurance: the memory of a long pre-training run and of its loader, which has to stay flat.

    python benchmarks/soak.py                                   # 2,000 steps on small views
    python benchmarks/soak.py --output runs/soak --steps 10000 --detector faster_rcnn

Pre-trains on sample data by the command that users call, in a process of its own with loader processes,
checkpoints and logs, and reads from outside what each process holds: RSS, and USS, in which no other process
has a share. Every reading goes to memory.csv. A cell of the table is the median of the readings of the
twentieth of the run before it; growth is from the end of the warm-up to the end of the run. Ends with 1 if
the USS of any process has grown by more than `--most` percent.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from aligndet.commands.propose import propose
from aligndet.commands.sample_data import sample_data
from aligndet.reporting.runs import read_curves

PARTS = (0.1, 0.25, 0.5, 0.75, 1.0)


class Reading(NamedTuple):
    """What one process held at one moment."""

    step: int
    process: str
    rss: int  # bytes
    uss: int


def command(args: argparse.Namespace, output: Path) -> list[str]:
    data, proposals = output / "data", output / "proposals"
    sample_data(data, train_images=args.images, val_images=1, size=args.size)
    propose(data / "train", output=proposals)
    settings = {
        "proposals": proposals,
        "output": output / "run",
        "detector": args.detector,
        "trunk": "tf_efficientnet_lite0",
        "trunk-weights": "bundled",
        "fpn-channels": 64,
        "min-size": f"[{args.size // 2},{args.size * 3 // 4}]",
        "max-size": args.size,
        "max-proposals": 20,
        "batch-size": args.batch,
        "steps": args.steps,
        "workers": args.workers,
        "checkpoint-every": 40,  # as in quickstart
        "log-every": 5,
        "accelerator": "cpu",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "aligndet", "pretrain", str(data / "train"), *options]


def steps_logged(run: Path) -> int:
    """The step of the last whole line of the logs."""
    return max((step + 1 for curve in read_curves(run / "logs").values() for step in curve), default=0)


def names(run: psutil.Process) -> dict[str, psutil.Process]:
    """The process of the run and its loader's, which are children of Python's server of forks."""
    servers = [child for child in run.children() if "forkserver" in " ".join(child.cmdline())]
    workers = [worker for server in servers for worker in server.children()]
    return {"main": run} | {f"worker {index}": worker for index, worker in enumerate(workers)}


def readings(run: subprocess.Popen[bytes], folder: Path, seconds: float) -> Iterator[Reading]:
    """Reads the memory until the run has ended."""
    while run.poll() is None:
        time.sleep(seconds)
        try:
            step = steps_logged(folder)
            for name, process in names(psutil.Process(run.pid)).items():
                held = process.memory_full_info()
                if step and held.uss:  # a process that has ended, but is not yet gone, holds nothing
                    yield Reading(step, name, held.rss, held.uss)
        except psutil.NoSuchProcess:
            continue


def median_at(found: list[Reading], process: str, step: float, window: float, kind: str) -> float:
    """Median in MiB of the readings in `window` steps up to `step`."""
    values = [
        getattr(r, kind) / 2**20 for r in found if r.process == process and step - window <= r.step <= step
    ]
    return statistics.median(values) if values else float("nan")


def table(found: list[Reading], steps: int, warmup: float) -> float:
    """Prints the curve of each process; returns the largest growth of the USS in percent."""
    window, growths = steps / 20, []
    print(f"{'MiB':<16}" + "".join(f"{part:>9.0%}" for part in PARTS) + f"{f'growth after {warmup:.0%}':>20}")
    for process in sorted({reading.process for reading in found}):
        for kind in ("rss", "uss"):
            cells = [median_at(found, process, part * steps, window, kind) for part in PARTS]
            settled = median_at(found, process, (warmup + 0.05) * steps, window, kind)
            growth = 100 * (cells[-1] / settled - 1)
            if kind == "uss":
                growths.append(math.inf if math.isnan(growth) else growth)  # no readings say nothing good
            name = f"{process} {kind.upper()}"
            print(f"{name:<16}" + "".join(f"{cell:>9.1f}" for cell in cells) + f"{growth:>18.2f} %")
    return max(growths)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="an empty folder; by default a temporary one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--detector", default="fcos")
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--size", type=int, default=128, help="long side of images and views")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="between readings")
    parser.add_argument("--warmup", type=float, default=0.15, help="part of the run that growth leaves out")
    parser.add_argument("--most", type=float, default=2.0, help="percent of growth that is allowed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = args.output or Path(temporary)
        found = []
        line = command(args, output)
        with (output / "run.log").open("wb") as log, (output / "memory.csv").open("w", newline="") as file:
            run = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
            writer = csv.writer(file)
            writer.writerow(Reading._fields)
            for reading in readings(run, output / "run", args.seconds):
                found.append(reading)
                writer.writerow(reading)
                file.flush()
        if run.returncode:
            print((output / "run.log").read_text()[-2000:], file=sys.stderr)
            sys.exit(f"{output / 'run'}: the run ended with {run.returncode}")
        growth = table(found, args.steps, args.warmup)
        if len({reading.process for reading in found}) <= args.workers:
            sys.exit("not all workers were found")
        sys.exit(int(growth > args.most))


if __name__ == "__main__":
    main()
