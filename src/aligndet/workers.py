"""The processes that work for another one: they read its images, or find its proposals."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import cv2
import torch


def worker_context() -> BaseContext:
    """How such processes start: as copies of one that has imported what they need, and started no threads.

    A copy of a process with threads (autograd's, OpenCV's) may hang; one that starts anew takes seconds and
    hundreds of megabytes to import torch, each for itself. So it does on macOS, whose libraries of linear
    algebra are not made to be copied.
    """
    context = get_context("forkserver")
    if sys.platform == "linux":
        context.set_forkserver_preload(["aligndet.commands.propose", "aligndet.data.labelled"])
    return context


def cores() -> int:
    """How many cores this process may use, where the system tells; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_settings(workers: int) -> dict[str, Any]:
    """How a DataLoader runs its processes.

    Args:
        workers: Processes; 0 loads in this one.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": worker_context() if workers else None,
        "worker_init_fn": one_thread,
    }


def one_thread(_: int = 0) -> None:
    """One process a core, and every process one thread, or they fight over the cores.

    Args:
        _: The number of the process.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
