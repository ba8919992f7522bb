"""The processes that work for another one: they read its images, or find its proposals."""

from __future__ import annotations

import math
import os
import resource
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import cv2
import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class _Process(ForkServerProcess):
    """Does not run the user's script a second time, as processes that are no plain copies do: no work of ours
    is defined there, and a script may call commands without asking whether it is ``__main__``.
    """

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def worker_context() -> BaseContext:
    """How such processes start: as copies of one that has imported what they need, and started no threads.

    A copy of a process with threads (autograd's, OpenCV's) may hang; one that starts anew takes seconds and
    hundreds of megabytes to import torch, each for itself. So it does on macOS, whose libraries of linear
    algebra are not made to be copied.
    """
    context = _Context()
    if sys.platform == "linux":
        # images on their way from a loader are open files each, and many systems allow 1,024 by default
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        if resource.RLIM_INFINITY != soft < wanted:
            with suppress(OSError, ValueError):  # where a container forbids it
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        context.set_forkserver_preload(["aligndet.commands.propose", "aligndet.data.labelled"])
    return context


def cores() -> int:
    """How many cores this process may use, where system and container tell; else how many there are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, _QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or one without a bound ("max")
        return count
    return min(count, math.ceil(quota / period))


def worker_settings(workers: int) -> dict[str, Any]:
    """How a DataLoader runs its processes.

    Args:
        workers: Processes; 0 loads in this one.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": worker_context() if workers else None,
        "worker_init_fn": begin,
    }


def begin(_: int = 0) -> None:
    """What such a process does first.

    One process a core, and every process one thread, or they fight over the cores. And it ends with the
    process that has started it, which nothing else sees to if that one is killed.

    Args:
        _: The number of the process.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
