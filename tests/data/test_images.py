from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.nn.functional import interpolate

from aligndet.data.images import (
    ImageError,
    Unreachable,
    first_images,
    first_readable,
    read_image,
    read_image_size,
)
from aligndet.data.listing import find_files, list_images


def picture(width: int = 20, height: int = 12) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    picture().convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 12, 20)
    assert image.dtype == torch.uint8
    assert image.float().std() > 10


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 12 * 20).reshape(12, 20).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    image = read_image(tmp_path / f"deep.{suffix}")
    expected = torch.from_numpy((ramp / 65535 * 255).round().astype(np.uint8))
    assert torch.equal(image, expected.expand(3, -1, -1))


@pytest.mark.parametrize(("largest", "top"), [(200, 255), (4000, 4095), (4096, 16383), (20000, 65535)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_as_many_bits_count_as_are_used(suffix: str, largest: int, top: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((12, 20), largest, np.uint16)).save(tmp_path / f"deep.{suffix}")
    assert read_image(tmp_path / f"deep.{suffix}").unique().tolist() == [round(largest / top * 255)]


def test_a_float_image_with_gaps_keeps_the_rest(tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 50, 16, dtype=np.float32), (16, 1))
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "gaps.tif")
    image = read_image(tmp_path / "gaps.tif")
    assert image[:, 0, :3].max() == 0
    assert image[0, 1].tolist() == np.rint(values[1] * (255 / 50)).tolist()


def test_the_size_of_a_png_is_read_without_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "picture.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("decoded"))
    assert read_image_size(tmp_path / "picture.png") == picture().size


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").max() == 0


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"\0" * 20, b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"])
def test_damaged_metadata_are_no_damaged_pixels(exif: bytes, tmp_path: Path) -> None:
    for kind in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{kind}"
        picture(40, 30).save(path, exif=exif, dpi=(72, 72))
        assert tuple(read_image(path).shape) == (3, 30, 40)
        assert read_image_size(path) == (40, 30)


@pytest.mark.parametrize("kind", ["png", "exif behind the pixels.png", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_exif_orientation_is_applied(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    picture().save(path, exif=exif)
    if "behind" in kind:
        chunks = path.read_bytes()
        start = chunks.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(chunks[start : start + 4], "big")
        path.write_bytes(chunks[:start] + chunks[end:-12] + chunks[start:end] + chunks[-12:])
    turns = {1: 0, 3: 2, 5: 0, 6: -1, 7: 2, 8: 1}[orientation]
    pixels = np.asarray(picture())
    if orientation in (5, 7):  # are mirrored
        pixels = pixels.swapaxes(0, 1)
    upright = torch.from_numpy(np.rot90(pixels, turns).copy()).permute(2, 0, 1)
    assert torch.equal(read_image(path), upright)
    assert read_image_size(path) == (upright.shape[2], upright.shape[1])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_but_no_smaller_than_asked(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "large.jpg"
    picture(8, 5).resize((803, 480)).save(path, quality=95, exif=exif)
    whole = read_image(path)[None].float()
    for long_side, expected in ((100, (60, 101)), (101, (120, 201)), (401, (240, 402)), (402, (480, 803))):
        image = read_image(path, long_side=long_side)
        assert sorted(image.shape[1:]) == list(expected)
        assert (image.shape[1] > image.shape[2]) == (orientation == 6)
        resized = interpolate(whole, image.shape[1:], mode="bilinear", antialias=True)[0]
        assert (resized - image).abs().mean() < 3
    picture(803, 480).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png", long_side=100).shape == (3, 480, 803)


def broken(folder: Path) -> dict[str, Path]:
    paths = {
        name: folder / f"{name}.jpg"
        for name in ("empty", "text", "postscript", "truncated", "tiny", "missing", "folder")
    }
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("no image at all")
    picture(200, 200).save(paths["postscript"], "EPS")  # which would be run, not read
    picture(200, 200).save(paths["truncated"], "JPEG")
    paths["truncated"].write_bytes(paths["truncated"].read_bytes()[:2000])
    picture(1, 1).save(paths["tiny"])
    paths["folder"].mkdir()
    return paths


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "empty"),
        ("text", "no image"),
        ("postscript", "no image that Pillow knows"),
        ("truncated", "truncated"),
        ("tiny", "too small"),
        ("missing", "no such image"),
        ("folder", "folder"),
    ],
)
def test_a_broken_image_is_named_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    path = broken(tmp_path)[name]
    for read in (read_image, read_image_size)[: 1 if name == "truncated" else 2]:  # whose header is whole
        with pytest.raises(ImageError, match=rf"{name}\.jpg.*{reason}"):
            read(path)


def test_a_file_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "fine.jpg")
    (tmp_path / "fine.jpg").rename(tmp_path / os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(ValueError, match=r"caf.*\.jpg' is no UTF-8; rename the file"):
        list_images(tmp_path)


def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligndet.data.images.MAX_PIXELS", 100)
    picture().save(tmp_path / "huge.png")
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "huge.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)  # Pillow's own bound is half of ours
    with pytest.raises(ImageError, match=r"huge\.png: is too large; scale it down first"):
        read_image(tmp_path / "huge.png")


def test_list_images_is_recursive_sorted_follows_links_and_leaves_hidden_ones_out(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", ".hidden/d.png", "note.txt", "VOC2012/SegmentationClass/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert list_images(tmp_path) == ["a/c.png", "b.JPG"]
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "0").symlink_to(tmp_path / "a")  # has its own name in the labels
    (tmp_path / "z").symlink_to(tmp_path / ".hidden")
    assert list_images(tmp_path) == ["a/c.png", "b.JPG", "z/d.png"]
    with pytest.raises(ValueError, match="no such folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        list_images(tmp_path / "none")


def test_images_that_are_not_read_are_named_not_missed(tmp_path: Path) -> None:
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    picture(20, 20).save(tmp_path / "named.heic", "JPEG")  # as some phones export
    assert list_images(tmp_path) == ["gone.jpg", "named.heic", "photo.HEIC"]
    assert read_image(tmp_path / "named.heic").shape == (3, 20, 20)
    picture(20, 20).save(tmp_path / "raw.NEF", "TIFF")  # the preview that a raw photo begins with
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    reasons = {
        "photo.HEIC": "this format is not read",
        "raw.NEF": "this format is not read",
        "gone.jpg": "no such image",
        "loop.jpg": "broken or truncated",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=rf"{name}: {reason}"):
            read_image(tmp_path / name)
    assert [name for name, _ in first_images(tmp_path, 5)] == ["named.heic"]
    (tmp_path / "named.heic").unlink()
    with pytest.raises(ImageError, match=r"gone\.jpg: no such image"):
        first_images(tmp_path, 5)
    (tmp_path / "gone.xml").symlink_to(tmp_path / "nothing")
    assert find_files(tmp_path, {".xml"}) == []


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path: Path) -> None:
    picture(40, 30).save(tmp_path / "a.avif")
    assert read_image(tmp_path / "a.avif").shape == (3, 30, 40)


def test_a_missing_block_is_not_all_replaced_by_its_neighbour() -> None:
    def read(position: int) -> int:
        if position < 50:
            raise ImageError(f"{position}: no such image")
        return position

    found = [first_readable(read, index, 100, strict=False) for index in range(50)]
    assert all(item == position >= 50 for item, position, _ in found)
    assert len({position for _, position, _ in found}) > 20
    assert found[0] == first_readable(read, 0, 100, strict=False)
    for length in (1, 2, 12):  # all are tried
        with pytest.raises(ImageError, match=f"none of the {length} images"):
            first_readable(read, length - 1, length, strict=False)


def test_an_outage_ends_the_run_and_a_hiccup_does_not() -> None:
    asked: list[int] = []

    def read(position: int) -> int:
        asked.append(position)
        raise Unreachable("s3://bucket/a.jpg: 5 attempts have failed")

    with pytest.raises(Unreachable, match="5 attempts have failed"):
        first_readable(read, 3, 1000, strict=False)
    assert len(asked) == 3

    def now_and_then(position: int) -> int:
        asked.append(position)
        if len(asked) % 3 == 0:
            raise ImageError("broken")
        if len(asked) < 9:
            raise Unreachable("no answer")
        return position

    asked.clear()
    found, position, skipped = first_readable(now_and_then, 3, 1000, strict=False)
    assert (found, len(asked), len(skipped)) == (position, 10, 9)
