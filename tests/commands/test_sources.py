"""Images in tars and at addresses, through the commands."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import aligndet
from aligndet import cli
from aligndet.proposals.storage import read_proposals
from tests.commands.test_flow import SMALL


@pytest.fixture(scope="module")
def shards(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the sample in two tars."""
    folder = tmp_path_factory.mktemp("shards")
    names = sorted(path.name for path in (sample / "train").glob("*.jpg"))
    for tar, part in (("0.tar", names[:5]), ("1.tar", names[5:])):
        with tarfile.open(folder / tar, "w") as archive:
            for name in part:
                archive.add(sample / "train" / name, name)
    return folder


def test_tars_give_the_proposals_and_the_weights_that_their_files_give(
    shards: Path, sample: Path, proposals: Path, tmp_path: Path
) -> None:
    summary = aligndet.propose(shards.as_uri(), output=tmp_path / "proposals", workers=1, masks=True)
    assert summary.skipped == {}
    plain, packed = read_proposals(proposals), read_proposals(tmp_path / "proposals")
    assert packed.file_names[0] == "0.tar/00000.jpg"
    assert [name[len("0.tar/") :] for name in packed.file_names] == plain.file_names
    np.testing.assert_array_equal(packed.boxes, plain.boxes)
    runs = [
        aligndet.pretrain(images, proposals=boxes, output=tmp_path / name, **SMALL)
        for name, images, boxes in (
            ("plain", sample / "train", proposals),
            ("packed", str(shards), tmp_path / "proposals"),
        )
    ]
    first, second = (load_file(run / "pretrained" / "model.safetensors") for run in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_trunk_learns_from_some_tars(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("1.tar\n")
    with tarfile.open(shards / "1.tar") as tar:
        (tmp_path / "val.txt").write_text(f"1.tar/{tar.getnames()[0]}\n0.tar\n")
    address = shards.as_uri()
    arguments = ["--batch-size=4", "--steps=1", "--workers=0", "--crop-size=32", "--trunk=resnet18"]
    output = ["--accelerator=cpu", f"--output={tmp_path / 'run'}", f"--names={tmp_path / 'names.txt'}"]
    output.append(f"--exclude={tmp_path / 'val.txt'}")
    assert cli.main(["pretrain-backbone", address, *arguments, *output]) == 0
    assert '"images": 6' in (tmp_path / "run" / "trunk" / "manifest.json").read_text()
    assert f'"{address}"' in (tmp_path / "run" / "run.json").read_text()


def test_labels_want_local_images(shards: Path, sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--annotations: wants the images in a local folder, not at file://"):
        aligndet.propose(shards.as_uri(), output=tmp_path / "out", annotations=sample / "train.json")


def test_an_unknown_address_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["propose", "smoke://bucket/images", f"--output={tmp_path / 'out'}"]) == 2
    assert "smoke://bucket/images: Protocol not known" in capsys.readouterr().err
