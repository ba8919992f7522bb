from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import aligndet


def test_import_is_light() -> None:
    code = "import sys, aligndet; assert not {'torch', 'cv2', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there() -> None:
    for name in aligndet.__all__:
        assert callable(getattr(aligndet, name))
        assert name in dir(aligndet)
    with pytest.raises(AttributeError, match="nonsense"):
        aligndet.__getattr__("nonsense")


def test_version_is_the_distributions() -> None:
    assert aligndet.__version__ == version("aligndet")
