from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aligndet.detectors.weights import save_weights


def test_where_there_is_a_manifest_there_are_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("aligndet.detectors.weights.atomic_write", lambda path, _: written.append(path.name))
    save_weights(tmp_path, {"weight": torch.zeros(2)}, {})
    assert written == ["model.safetensors", "manifest.json"]
