"""Query-based detectors: models of transformers, called the way torchvision's detectors are.

The model itself is transformers' own, its loss and its post-processing too. `QueryDetector` turns lists of
images of any size into its batches, and its outputs into torchvision's dicts, so that fine-tuning, evaluation
and prediction treat all detectors alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import FrozenBatchNorm2d, box_convert, clip_boxes_to_image
from torchvision.transforms.v2 import functional as transforms

from aligndet.detectors.query_families import (
    Family,
    from_transformers,
    is_head,
    norm_for_predictions_alone,
    start_as_authors,
    with_first_prediction,
)
from aligndet.processes import all_reduce_mean


class QueryTrunk(NamedTuple):
    """A trunk that transformers can build again by itself, and the width of what comes above it."""

    name: str  # timm's, whose network or weights it is
    body: nn.Module
    channels: list[int]
    width: int


class QueryDetector(nn.Module):
    """A model of transformers with torchvision's way to call a detector.

    Attributes:
        network: transformers' own model; its names are those of the weights on disk.
    """

    def __init__(
        self,
        family: Family,
        trunk: QueryTrunk,
        num_labels: int,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        settings: dict[str, Any],
        min_size: int = 800,
        max_size: int = 1333,
        resize_in_training: bool = False,
    ) -> None:
        """Builds the model with new weights above the trunk.

        Args:
            family: Of the detector.
            trunk: Its weights are copied.
            num_labels: Classes, without background.
            image_mean: Of the trunk's images.
            image_std: Likewise.
            settings: Of transformers' configuration; those of `settings_of`.
            min_size: Short side of images in eval mode; square images have it as both sides.
            max_size: Bound of the long side.
            resize_in_training: False where the images of training have their size already.

        Raises:
            ValueError: If transformers refuses the settings.
        """
        super().__init__()
        self.family = family
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.min_size, self.max_size, self.resize_in_training = min_size, max_size, resize_in_training
        self.network: Any = _network(family, trunk, num_labels, settings)
        self.processor: Any = self._image_processor()
        state = trunk.body.state_dict()
        missing = self.backbone.body.load_state_dict(state, strict=False).missing_keys
        assert not missing, f"the trunk of transformers has {missing[0]}, ours not"

    @property
    def backbone(self) -> Any:
        """The trunk as ``backbone.body``, where torchvision's detectors have theirs."""
        backbone = self.network.model.backbone
        if self.family.windowed:
            return SimpleNamespace(body=backbone.backbone)
        modules: Iterator[nn.Module] = backbone.modules()
        return SimpleNamespace(body=next(m for m in modules if hasattr(m, "feature_info")))

    @property
    def prediction_heads(self) -> list[nn.Module]:
        """Modules that give class scores or boxes, or the maps whose type the first boxes take."""
        found = [m for name, m in self.network.named_modules() if is_head(name.rpartition(".")[2])]
        found.append(getattr(self.network.model, "decoder_input_proj", nn.ModuleList()))
        if self.family.windowed:
            found.append(self.network.model.backbone.projector.layer_norm)
        return [head for entry in found for head in (entry if isinstance(entry, nn.ModuleList) else [entry])]

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, predictions in eval mode.

        Args:
            images: (3, H_i, W_i) each, in [0, 1].
            targets: In training, of each image: boxes (n, 4) xyxy pixels, labels (n,) from 1 on.

        Returns:
            The weighted losses by kind, each over all layers; or of each image boxes (n, 4) xyxy pixels,
            labels (n,) and scores (n,), best first.
        """
        if self.training:
            assert targets is not None
            labels = [
                relative_targets(image, target["boxes"], target["labels"] - 1)
                for image, target in zip(images, targets, strict=True)
            ]
            return self.losses(self.run(images, labels), labels)
        return self._predictions(self.run(images), [tuple(image.shape[-2:]) for image in images])

    def run(self, images: Sequence[Tensor], labels: list[dict[str, Tensor]] | None = None) -> Any:
        """Calls transformers' model.

        Args:
            images: (3, H_i, W_i) each, in [0, 1].
            labels: transformers' targets, for losses.

        Returns:
            What the model returns.

        Raises:
            FloatingPointError: If predicted boxes are not finite, so that none can be matched.
        """
        pixels, mask = self._batch(images)
        # the fused kernel's backward pass on a CPU takes many times as long in bfloat16 as matrix products do
        slow = pixels.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        try:
            with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
                return self.network(pixel_values=pixels, pixel_mask=mask, labels=labels)
        except ValueError as error:  # transformers matches before it returns, and does not say what is wrong
            if hasattr(next(self.parameters()), "full_tensor"):  # split: others would have to take part
                raise FloatingPointError(f"the predicted boxes cannot be matched ({error})") from error
            self.network.eval()  # batch norms would wait for the other processes
            with torch.no_grad():
                boxes = self.network(pixel_values=pixels, pixel_mask=mask).pred_boxes
            if torch.isfinite(boxes).all():
                raise
            raise FloatingPointError("the predicted boxes are not finite") from error

    def losses(self, outputs: Any, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """transformers' losses, summed by kind, with the weights of the detectors' authors.

        transformers divides by the number of boxes of this process; here it is the mean over all processes,
        as with the detectors' authors, so that every box weighs the same.

        Args:
            outputs: Of `run` with labels.
            labels: The same labels.
        """
        config, found = self.network.config, outputs.loss_dict
        boxes = outputs.logits.new_tensor(sum(len(label["boxes"]) for label in labels), dtype=torch.float32)
        to_mean = boxes.clamp(min=1) / all_reduce_mean(boxes).clamp(min=1)
        sums = {}
        for kind, setting in self.family.losses.items():
            weight = float(getattr(config, setting)) if isinstance(setting, str) else setting
            parts = [loss for name, loss in found.items() if name.startswith(kind)]
            if parts:
                norm = 1.0 if kind in self.family.own_norm else to_mean
                sums[kind.removeprefix("loss_")] = weight * norm * torch.stack(parts).sum()
        unused = getattr(self.network.model, "denoising_class_embed", None)
        if unused is not None and not boxes:  # other processes, which have boxes, would wait for its gradient
            sums["bbox"] = sums["bbox"] + 0.0 * unused.weight.sum()
        return sums

    def configuration_files(self, class_names: Sequence[str] | None) -> dict[str, str]:
        """Files that transformers needs beside the weights to load and use the detector.

        Returns:
            Text by file name.
        """
        config = copy.deepcopy(self.network.config)
        config.architectures = [type(self.network).__name__]
        if self.family.feeds_norm_back:  # with it, transformers would compute another network
            config.auxiliary_loss = False
        if class_names is not None:
            config.id2label = dict(enumerate(class_names))
            config.label2id = {name: label for label, name in enumerate(class_names)}
        return {
            "config.json": config.to_json_string(),
            "preprocessor_config.json": self.processor.to_json_string(),
        }

    def _predictions(self, outputs: Any, sizes: list[tuple[int, ...]]) -> list[dict[str, Tensor]]:
        found = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        predictions = []
        for result, (height, width) in zip(found, sizes, strict=True):
            scores, order = result["scores"].float().sort(descending=True)
            boxes = clip_boxes_to_image(result["boxes"].float()[order], (height, width))
            predictions.append({"boxes": boxes, "labels": result["labels"][order] + 1, "scores": scores})
        return predictions

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Resizes, normalises and pads: (B, 3, H, W), and a mask (B, H, W) that is 1 on the images."""
        if self.family.square:
            # one size for the batch: that of its squarest image, which the bound of the long side has not
            # made smaller; so sizes are as frequent as they were drawn
            shapes = [sorted(image.shape[-2:]) for image in images]
            side = self.min_size if self._resizes else min(shapes, key=lambda s: round(s[1] / s[0], 1))[0]
            side = self._square_side(side)
            images = [transforms.resize(image, [side, side], antialias=True) for image in images]
        elif self._resizes:
            size_of = from_transformers("image_transforms.get_size_with_aspect_ratio")
            sizes = [size_of(image.shape[-2:], self.min_size, self.max_size) for image in images]
            images = [
                transforms.resize(image, list(size), antialias=True)
                for image, size in zip(images, sizes, strict=True)
            ]
        height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
        padding = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
        normalised = [transforms.normalize(image, self.image_mean, self.image_std) for image in images]
        masks = [torch.ones_like(image[0], dtype=torch.int64) for image in images]
        pixels, mask = (
            torch.stack([F.pad(item, pad) for item, pad in zip(items, padding, strict=True)])
            for items in (normalised, masks)
        )
        return pixels, mask

    @property
    def _resizes(self) -> bool:
        return self.resize_in_training or not self.training

    def _square_side(self, side: int) -> int:
        """A multiple of the coarsest stride, or of a patch in each window, with as many places as there are
        queries at least.
        """
        strides, coarsest = self.family.strides, self.family.strides[-1]
        config = self.network.config
        if self.family.windowed:
            strides = (config.backbone_config.patch_size,)
            coarsest = strides[0] * config.backbone_config.num_windows
        selects = self.family.from_encoder or self.family.windowed
        multiple = max(1, round(side / coarsest))
        while selects and sum((multiple * coarsest // s) ** 2 for s in strides) < config.num_queries:
            multiple += 1
        return multiple * coarsest

    def _image_processor(self) -> Any:
        """transformers' image processor: does with an image what `_batch` does in eval mode."""
        side = self._square_side(self.min_size)
        return from_transformers(f"{self.family.processor}ImageProcessor")(
            size={"height": side, "width": side}
            if self.family.square
            else {"shortest_edge": self.min_size, "longest_edge": self.max_size},
            do_normalize=True,
            image_mean=self.image_mean,
            image_std=self.image_std,
            do_pad=not self.family.square,
        )


def _normalised(norm: FrozenBatchNorm2d | FrozenBatchNormAct2d, x: Tensor) -> Tensor:
    """Normalises in one kernel and in the precision of x; torchvision and timm take several, in float32."""
    statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return F.batch_norm(x, *statistics, training=False, eps=norm.eps)


def _saves_input(x: Tensor) -> bool:
    """Whether the one kernel would keep its input for the backward pass, as the libraries' do not."""
    return x.requires_grad and x.dtype == torch.float32


class _FrozenNorm(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        """Normalises by the running statistics."""
        return super().forward(x) if _saves_input(x) else _normalised(self, x)


class _FrozenNormAct(FrozenBatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        """Normalises by the running statistics, and activates."""
        return super().forward(x) if _saves_input(x) else self.act(self.drop(_normalised(self, x)))


_ONE_KERNEL = {FrozenBatchNorm2d: _FrozenNorm, FrozenBatchNormAct2d: _FrozenNormAct}


def relative_targets(image: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """transformers' form of an image's targets: centres and sides as shares of the image.

    Args:
        image: (3, H, W).
        boxes: (n, 4) xyxy pixels.
        labels: (n,) from 0 on.
    """
    size = torch.tensor([image.shape[2], image.shape[1]], device=boxes.device).repeat(2)
    return {"boxes": box_convert(boxes, "xyxy", "cxcywh") / size, "class_labels": labels}


def _network(family: Family, trunk: QueryTrunk, num_labels: int, settings: dict[str, Any]) -> Any:
    """transformers' model on a trunk of timm's, or of its own."""
    settings = family.defaults | settings
    dilated = settings.pop("dilation", False)  # which transformers has only for trunks that it chooses itself
    backbone: Any = (
        trunk.body.config
        if family.windowed
        else from_transformers("TimmBackboneConfig")(
            backbone=trunk.name,
            out_indices=list(range(-len(family.strides), 0)),
            # frozen by timm: transformers would take the activations within timm's norms away
            freeze_batch_norm_2d=True,
            output_stride=16 if dilated else None,
        )
    )
    levels = settings.get("num_feature_levels")
    if levels is not None and levels < len(family.strides):
        raise ValueError(f"num_feature_levels must be at least {len(family.strides)}, not {levels}")
    own: dict[str, Any] = dict.fromkeys(family.width, trunk.width)
    if family.from_encoder:
        own |= {"encoder_in_channels": trunk.channels, "decoder_in_channels": [trunk.width] * 3}
    from huggingface_hub.errors import StrictDataclassError

    configuration = from_transformers(f"{family.model}Config")
    for name, kind in configuration.__annotations__.items():
        if kind in (float, "float") and type(settings.get(name)) is int:  # transformers takes no 0 for 0.0
            settings[name] = float(settings[name])
    try:
        config = configuration(
            backbone_config=backbone, num_labels=num_labels, auxiliary_loss=True, **own, **settings
        )
        network: Any = from_transformers(f"{family.model}ForObjectDetection")(config)
    except (StrictDataclassError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        chosen = {"width": trunk.width, **settings}
        raise ValueError(f"transformers refuses {family.model} with {chosen}: {error}") from error
    for module in network.modules():
        module.__class__ = _ONE_KERNEL.get(type(module), type(module))
    start_as_authors(family, network)
    if family.feeds_norm_back:
        norm_for_predictions_alone(network.model.decoder)
    if family.predicts_first:
        network.loss_function = partial(with_first_prediction, network.loss_function)
    return network
