"""Arms that start from weights that are there already."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet.commands._arms import Source, check_trunks, read_arms, remarks_on_images
from aligndet.data.coco import image_files
from aligndet.detectors.weights import save_weights
from tests.commands.test_compare import _compare

FCOS = {"detector": "fcos", "trunk": "resnet18", "fpn_channels": 64, "fpn_norm": "none"}


def _weights(folder: Path, value: float = 0.0, **manifest: Any) -> str:
    given = {"architecture": FCOS, "trunk": {"weights": "none", "trained": False}, **manifest}
    save_weights(folder / "pretrained", {"weight": torch.tensor([value])}, given)
    return f"from:{folder}"


def test_an_arm_is_known_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = _weights(tmp_path / "run")
    ((name, source),) = read_arms([arm])
    assert re.fullmatch(r"from-run-[0-9a-f]{8}", name)
    assert source is not None
    assert source.path == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert read_arms(["from:run", "scratch"]) == [(name, source), ("scratch", None)]
    _weights(tmp_path / "run", 1.0)
    assert read_arms([arm])[0][0] != name
    with pytest.raises(ValueError, match="holds no weights"):
        read_arms([f"from:{tmp_path}"])


@pytest.mark.usefixtures("asked")
def test_weights_made_anew_are_a_row_of_their_own(sample: Path, proposals: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"fractions": (1.0,)}
    for value, seeds in ((0.0, (0,)), (1.0, (0, 1))):
        arm = _weights(tmp_path / "run", value)
        output = _compare(sample, proposals, tmp_path / "out", arms=(arm,), seeds=seeds, **changes)
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert sorted(row["n"] for row in rows) == [1, 2]


def _sources(**manifest: Any) -> dict[str, Source]:
    return {"from-run-1": Source(Path("run"), manifest)}


def test_frozen_trunks_have_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trunk.pth").write_text("")
    monkeypatch.chdir(tmp_path)
    for theirs, ours in (("none", "none"), ("trunk.pth", str(tmp_path / "trunk.pth"))):
        assert check_trunks(_sources(trunk={"weights": theirs, "trained": False}), ours) == []
    message = "run: its trunk has the weights 'none', .* 'default': not comparable; give --trunk-weights none"
    with pytest.raises(ValueError, match=message):
        check_trunks(_sources(trunk={"weights": "none", "trained": False}), "default")
    assert check_trunks(_sources(trunk={"weights": "none", "trained": True}), "default") == []
    assert check_trunks(_sources(initialised_from={"weights": None}), "default") == []
    for unknown in ({}, {"trunk": {"weights": "gone.pth", "trained": False}}):
        (remark,) = check_trunks(_sources(**unknown), "default")
        assert "from-run-1: it is not known" in remark


def test_validation_images_in_a_pretraining_are_counted(
    sample: Path, proposals: Path, tmp_path: Path
) -> None:
    names = sorted(path.name for path in (sample / "train").iterdir())
    measured = frozenset(image_files(sample / "train", [*names[:3], "another.jpg"]))
    given: dict[str, Any] = {"images": str(sample / "train"), "proposals": str(proposals), "names": None}
    assert remarks_on_images(_sources(pretraining=given), measured) == [
        "from-run-1: was pre-trained on 3 of 4 validation images."
    ]
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(names[2:]))
    (remark,) = remarks_on_images(_sources(pretraining={**given, "names": str(listed)}), measured)
    assert "on 1 of 4" in remark
    listed.write_text("\n".join(names[3:]))
    assert remarks_on_images(_sources(pretraining={**given, "names": str(listed)}), measured) == []
    left_out = {**given, "exclude": str(listed)}
    assert "on 3 of 4" in remarks_on_images(_sources(pretraining=left_out), measured)[0]
    listed.write_text("\n".join(names[:3]))
    assert remarks_on_images(_sources(pretraining=left_out), measured) == []
    for lost in ({"images": "gone"}, {"proposals": "gone"}, {"names": "gone"}, {"images": "s3://bucket/a"}):
        assert "not known" in remarks_on_images(_sources(pretraining=given | lost), measured)[0]
    assert "not known" in remarks_on_images(_sources(), measured)[0]


@pytest.mark.usefixtures("asked")
def test_remarks_stand_in_the_results(
    sample: Path, proposals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = _weights(tmp_path / "run")
    output = tmp_path / "out"
    changes: dict[str, Any] = {"fractions": (1.0,), "val_annotations": sample / "train.json"}
    _compare(sample, proposals, output, arms=(arm,), **changes)
    _compare(sample, proposals, output, arms=("scratch",), **changes)  # the earlier arm stays in the table
    said, remarks = capsys.readouterr().out, json.loads((output / "results.json").read_text())["remarks"]
    assert remarks[0] == "12 of 12 validation images are trained on, not new to the detector."
    assert remarks[1].endswith(": it is not known whether it was pre-trained on validation images.")
    assert len(remarks) == 2
    for remark in remarks:
        assert remark in said
        assert remark in (output / "table.md").read_text()
