"""Detectors on a device that is not the CPU, where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as backends

from aligndet.detectors.build import DETECTORS

OTHERS = (*sorted(DETECTORS), "simsiam", "moco")


@pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="torch has no such device yet"
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "fcos" else [pytest.mark.slow]) for name in OTHERS]
)
def test_another_device(name: str) -> None:
    """A process of its own: the device stays in it."""
    command = [sys.executable, "-m", "tests.other_device", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name]
