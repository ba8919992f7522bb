"""A small labelled data set out of photographs that scikit-image and scikit-learn carry in their wheels.

Pieces of photographed matter (brick, grass, fur, coins, ...) are cut out along an outline typical of their
class and composed over other photographs, with rotation, blur, noise, changing light and occlusion. Classes
differ in texture and outline, both blurred by variation; validation takes its pieces from other pixels and
its backgrounds from other photographs than training does.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

Colour = tuple[int, int, int]


class Matter(NamedTuple):
    """A class of objects: a photographed texture and an outline."""

    name: str
    photograph: str
    outline: str  # a key of the function _radius, or "coin"
    tint: Colour | None = None  # for grey photographs
    piece: tuple[int, int] = (90, 200)  # side of a piece in the photograph's pixels


MATTERS = (
    Matter("brick", "skimage/brick.png", "rectangle", (214, 120, 92)),
    Matter("leaf", "skimage/grass.png", "leaf", (116, 190, 84)),
    Matter("stone", "skimage/gravel.png", "blob", (196, 190, 182)),
    Matter("fur", "skimage/chelsea.png", "star", None, (70, 140)),
    Matter("tissue", "skimage/ihc.png", "flower", None, (90, 180)),
    Matter("page", "skimage/page.png", "square", None, (60, 90)),
    Matter("retina", "skimage/retina.jpg", "ellipse", None, (240, 480)),
    Matter("coin", "skimage/coins.png", "coin", (226, 196, 128), (40, 56)),
)
BACKGROUNDS = {
    "train": (
        "sklearn/china.jpg",
        "skimage/motorcycle_left.png",
        "skimage/astronaut.png",
        "skimage/rocket.jpg",
    ),
    "val": (
        "sklearn/flower.jpg",
        "skimage/coffee.png",
        "skimage/camera.png",
        "skimage/hubble_deep_field.jpg",
    ),
}
_COINS = {  # column, row and radius of the photographed coins: the upper two rows, the lower two
    "train": (
        (155, 51, 23),
        (215, 51, 24),
        (276, 52, 21),
        (44, 54, 21),
        (271, 119, 25),
        (45, 124, 21),
        (205, 124, 20),
    ),
    "val": (
        (212, 193, 24),
        (274, 194, 23),
        (102, 196, 22),
        (172, 261, 27),
        (301, 263, 25),
        (244, 263, 25),
        (46, 260, 28),
    ),
}


class Scene(NamedTuple):
    """A composed image and what is to be seen in it."""

    image: Image.Image
    labels: list[int]  # from 1, into MATTERS
    masks: list[npt.NDArray[np.bool_]]  # (H, W) visible part of each object


def compose_scene(part: str, size: int, rng: np.random.Generator) -> Scene:
    """Composes one image.

    Args:
        part: "train" or "val": which photographs and which of their pixels to use.
        size: Longer side; the shorter one varies between 3/4 of it and all.
        rng: Source of all chance.

    Raises:
        ValueError: If scikit-image or scikit-learn is not installed.
    """
    sides = sorted((size, int(size * rng.uniform(0.75, 1.0))), reverse=bool(rng.random() < 0.7))
    canvas = _background(part, (sides[0], sides[1]), rng)
    labels: list[int] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for _ in range(int(rng.integers(3, 9))):
        label = int(rng.integers(len(MATTERS))) + 1
        side = int(size * np.exp(rng.uniform(np.log(0.16), np.log(0.5))))
        piece, alpha = _object(MATTERS[label - 1], part, side, rng)
        x = int(rng.uniform(0.05, 0.95) * canvas.width - piece.width / 2)
        y = int(rng.uniform(0.05, 0.95) * canvas.height - piece.height / 2)
        stamp = Image.new("L", canvas.size)
        stamp.paste(alpha, (x, y))
        mask = np.asarray(stamp) > 127
        hidden = [(earlier & mask).sum() / max(1, earlier.sum()) for earlier in masks]
        if mask.sum() < 0.35 * (np.asarray(alpha) > 127).sum() or max(hidden, default=0.0) > 0.4:
            continue  # mostly outside, or it would cover another object
        layer = Image.new("RGB", canvas.size)
        layer.paste(piece, (x, y))
        canvas = Image.composite(layer, canvas, stamp)
        masks = [earlier & ~mask for earlier in masks]
        masks.append(mask)
        labels.append(label)
    noise = rng.normal(0, rng.uniform(1, 6), (canvas.height, canvas.width, 3))
    noisy = np.clip(np.asarray(canvas, np.float32) + noise, 0, 255).astype(np.uint8)
    return Scene(Image.fromarray(noisy), labels, masks)


def _background(part: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    names = BACKGROUNDS[part]
    image = _photograph(names[int(rng.integers(len(names)))])
    scale = rng.uniform(1.0, 1.7) * max(size[0] / image.width, size[1] / image.height)
    image = image.resize((round(image.width * scale) + 1, round(image.height * scale) + 1))
    x = int(rng.integers(image.width - size[0] + 1))
    y = int(rng.integers(image.height - size[1] + 1))
    image = image.crop((x, y, x + size[0], y + size[1]))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _light(image, rng, 0.3)


def _object(
    matter: Matter, part: str, side: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """An object of about `side` pixels: its colours, and how much of it covers each pixel."""
    big = 2 * side  # drawn twice as large, for smooth edges
    if matter.outline == "coin":
        piece, alpha = _coin(matter, part, big, rng)
    else:
        piece, alpha = _texture(matter, part, big, rng), _outline(matter.outline, big, rng)
    if matter.tint:
        piece = ImageChops.multiply(piece, Image.new("RGB", piece.size, matter.tint))
        piece = ImageEnhance.Brightness(piece).enhance(1.5)
    angle = rng.uniform(-30, 30)
    piece, alpha = (image.rotate(angle, Image.Resampling.BICUBIC) for image in (piece, alpha))
    stretch = np.exp(rng.uniform(-0.25, 0.25))
    size = (max(8, round(side * stretch)), max(8, round(side / stretch)))
    piece, alpha = (image.resize(size, Image.Resampling.LANCZOS) for image in (piece, alpha))
    if rng.random() < 0.3:
        piece = piece.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2))))
    return _light(piece, rng, 0.25), alpha


def _texture(matter: Matter, part: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A square from the left (training) or right (validation) part of the photograph, with a gap between."""
    image = _photograph(matter.photograph)
    low, high = (0.0, 0.6) if part == "train" else (0.62, 1.0)
    left, right = int(low * image.width), int(high * image.width)
    most = min(right - left, image.height)
    length = int(rng.integers(min(matter.piece[0], most - 1), min(matter.piece[1], most) + 1))
    x = int(rng.integers(left, right - length + 1))
    y = int(rng.integers(image.height - length + 1))
    return image.crop((x, y, x + length, y + length)).resize((side, side), Image.Resampling.BICUBIC)


def _coin(matter: Matter, part: str, side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    x, y, radius = _COINS[part][int(rng.integers(len(_COINS[part])))]
    piece = _photograph(matter.photograph).crop((x - radius, y - radius, x + radius, y + radius))
    piece = piece.resize((side, side), Image.Resampling.BICUBIC)
    return piece, _outline("ellipse", side, rng)


def _outline(kind: str, side: int, rng: np.random.Generator) -> Image.Image:
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    radius = _radius(kind, angle)
    for waves in (2, 3, 5):  # no two alike
        radius = radius * (1 + rng.uniform(0, 0.04) * np.sin(waves * angle + rng.uniform(0, 2 * np.pi)))
    radius *= 0.48 * side / radius.max()
    points = [
        (side / 2 + r * np.cos(a), side / 2 + r * np.sin(a)) for r, a in zip(radius, angle, strict=True)
    ]
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def _radius(kind: str, angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
    shapes = {
        "rectangle": np.minimum(1.0 / np.maximum(cos, 1e-6), 0.5 / np.maximum(sin, 1e-6)),
        "square": np.minimum(1.0 / np.maximum(cos, 1e-6), 1.0 / np.maximum(sin, 1e-6)),
        "leaf": 0.3 + 0.7 * cos**3,
        "blob": 1 + 0.12 * np.sin(3 * angle) + 0.1 * np.sin(5 * angle + 1),
        "star": 1 + 0.3 * np.cos(5 * angle),
        "flower": 1 + 0.16 * np.cos(8 * angle),
        "ellipse": 1.0 / np.sqrt(cos**2 + (sin / 0.9) ** 2),
    }
    return shapes[kind]


def _light(image: Image.Image, rng: np.random.Generator, amount: float) -> Image.Image:
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(float(rng.uniform(1 - amount, 1 + amount)))
    return image


@cache
def _photograph(name: str) -> Image.Image:
    package, _, file = name.partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f'the sample data need the photographs of {package}: pip install "aligndet[quickstart]"'
        )
    folder = {"skimage": "data", "sklearn": "datasets/images"}[package]
    with Image.open(Path(found.submodule_search_locations[0]) / folder / file) as image:
        return image.convert("RGB")
