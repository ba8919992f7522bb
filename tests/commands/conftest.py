from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from aligndet.commands import _cells as module
from aligndet.commands.evaluate import evaluate
from aligndet.commands.finetune import finetune
from aligndet.commands.pretrain import pretrain
from aligndet.files import atomic_write


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Commands that write no more than what shows that they are done."""

    def tune(*_: Any, output: Path, **__: Any) -> None:
        atomic_write(output / "model" / "manifest.json", "{}")

    def pre(*_: Any, output: Path, **__: Any) -> None:
        atomic_write(output / "pretrained" / "manifest.json", "{}")

    def measure(*_: Any, output: Path, **__: Any) -> None:
        output.write_text('{"AP": 0.1}')

    fakes = SimpleNamespace(
        finetune=create_autospec(finetune, side_effect=tune),
        pretrain=create_autospec(pretrain, side_effect=pre),
        evaluate=create_autospec(evaluate, side_effect=measure),
    )
    for name, fake in vars(fakes).items():
        monkeypatch.setattr(module, name, fake)
    return fakes
