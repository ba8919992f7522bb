"""AlignDet: pre-train every module of an object detector on your own unlabelled images.

The commands are plain functions, such as ``aligndet.pretrain``; ``aligndet.load_detector`` and
``aligndet.read_detections`` read what they write.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligndet.commands.check_data import check_data
    from aligndet.commands.cluster import cluster
    from aligndet.commands.compare import compare
    from aligndet.commands.evaluate import evaluate
    from aligndet.commands.export import export
    from aligndet.commands.finetune import finetune
    from aligndet.commands.predict import predict
    from aligndet.commands.pretrain import pretrain
    from aligndet.commands.pretrain_backbone import pretrain_backbone
    from aligndet.commands.propose import propose
    from aligndet.commands.quickstart import quickstart
    from aligndet.commands.recipes import recipes
    from aligndet.commands.report import report
    from aligndet.commands.sample_data import sample_data
    from aligndet.commands.split import split
    from aligndet.detectors.weights import load_detector
    from aligndet.evaluation.detections import read_detections

__all__ = [
    "check_data",
    "cluster",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "load_detector",
    "predict",
    "pretrain",
    "pretrain_backbone",
    "propose",
    "quickstart",
    "read_detections",
    "recipes",
    "report",
    "sample_data",
    "split",
]
__version__ = version("aligndet")

_READERS = {
    "load_detector": "aligndet.detectors.weights",
    "read_detections": "aligndet.evaluation.detections",
}


def __getattr__(name: str) -> Any:
    """Imports a command when it is asked for: ``import aligndet`` itself does not load torch."""
    if name not in __all__:
        raise AttributeError(f"module 'aligndet' has no attribute {name!r}")
    return getattr(import_module(_READERS.get(name, f"aligndet.commands.{name}")), name)


def __dir__() -> list[str]:
    """All names, so that completion finds the commands."""
    return sorted({*globals(), *__all__})
