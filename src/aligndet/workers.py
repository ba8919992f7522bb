"""Worker processes, which read images or find proposals."""

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
    """Forkserver re-imports the user's ``__main__``. We need nothing from it, and an unguarded script would
    start itself again.
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
    """How workers start: as forks of a server that has imported what they need, and started no threads.

    A fork of a process with threads (autograd's, OpenCV's) may hang; a process that starts afresh takes
    seconds and hundreds of megabytes to import torch. On macOS each worker does, since libraries of linear
    algebra do not survive a fork there.
    """
    context = _Context()
    if sys.platform == "linux":
        # each image on its way from a loader is an open file, and many systems allow 1,024 by default
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        if resource.RLIM_INFINITY != soft < wanted:
            with suppress(OSError, ValueError):  # where a container forbids it
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        context.set_forkserver_preload(["aligndet.commands.propose", "aligndet.data.labelled"])
    return context


def cores() -> int:
    """How many cores this process may use, as far as system and container tell."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, _QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or one without a bound ("max")
        return count
    return min(count, math.ceil(quota / period))


def worker_settings(workers: int) -> dict[str, Any]:
    """Settings of a DataLoader for its workers.

    Args:
        workers: Processes; 0 loads in this one.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": worker_context() if workers else None,
        "worker_init_fn": begin,
    }


def begin(_: int = 0) -> None:
    """Sets a worker up: it has one thread, as there is a worker a core, and ends when its parent does.

    Nothing else would end it if the parent is killed.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
