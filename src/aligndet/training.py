"""What box-domain pre-training, image-domain pre-training and fine-tuning share: order of the data,
optimizer, schedule, losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler

from aligndet.processes import all_gather_items, all_reduce_mean

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "step", "constant"]
DROPS = (0.6667, 0.9167)
"""Shares of a run: after 8 and 11 of 12 epochs, as is the custom."""


def seed_of(seed: int, position: int) -> int:
    """A seed for one of the many draws of a run.

    torch's generator on a CPU uses the low 32 bits alone, so these have to differ between runs, too: the
    golden ratio spreads the runs' seeds over all numbers (a Weyl sequence).

    Args:
        seed: The run's.
        position: Number of the draw within the run.
    """
    return (seed * 0x9E3779B97F4A7C15 + position) % 2**63


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) for every step of a run, from any step on.

    A run is one long pass: epoch after epoch in an order that depends on the seed alone, and with a seed for
    each sample's augmentation. A resumed run therefore sees what the unbroken run would have seen, and
    `world` processes together see what one process with a `world` times larger batch sees.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        batches: int,
        seed: int = 0,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        tall: Tensor | None = None,
    ) -> None:
        """Plans the run.

        Args:
            length: Number of images.
            batch_size: Images of a batch of one process.
            batches: Batches of one process in the whole run.
            seed: For the order and the samples.
            first: Batches that are done already.
            rank: This process's.
            world: Number of processes.
            accumulate: Batches a step.
            tall: (length,) bool, which images are taller than wide. A step then seldom mixes both kinds, as
                all its images are padded to one size.
        """
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.first, self.rank, self.world = first, rank, world
        self.step_size, self.tall = batch_size * world * accumulate, tall

    def __len__(self) -> int:
        # of the whole run: Lightning counts the batches of a resumed run from where it stopped
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = torch.empty(0), -1
        for batch in range(self.first, self.batches):
            start = (batch * self.world + self.rank) * self.batch_size
            items = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = self._order(epoch)
                items.append((int(order[position % self.length]), seed_of(self.seed, position)))
            yield items

    def _order(self, epoch: int) -> Tensor:
        """All images in random order; of steps that are all tall or all others, the order is random, too."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        if self.tall is None or bool((self.tall == self.tall[0]).all()):
            return order
        # images that complete the step begun in the previous epoch
        started = -epoch * self.length % self.step_size
        begun, rest = order[:started], order[started:]
        whole = len(rest) // self.step_size
        sorted_, last = rest[: whole * self.step_size], rest[whole * self.step_size :]
        sorted_ = sorted_[self.tall[sorted_].int().argsort(stable=True)]
        steps = sorted_.view(whole, self.step_size)[torch.randperm(whole, generator=generator)]
        return torch.cat([begun, steps.flatten(), last])


_POSITIONS = {  # timm's names, and transformers' for RF-DETR's trunk
    *("pos_embed", "absolute_pos_embed", "relative_position_bias_table", "cls_token", "reg_token"),
    *("pos_embed_abs", "pos_embed_win", "rel_pos_h", "rel_pos_w", "logit_scale", "position_embeddings"),
}


def build_optimizer(
    groups: Iterable[tuple[Iterable[tuple[str, nn.Parameter]], float]],
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """Builds AdamW, or SGD with momentum 0.9; biases, norms and embeddings of positions do not decay.

    Args:
        groups: Named parameters, and the factor of their learning rate.
        name: Of the optimizer.
        learning_rate: Of factor 1.
        weight_decay: Of matrices and kernels.
    """
    settings: list[dict[str, Any]] = []
    for parameters, factor in groups:
        trainable = [(name.rpartition(".")[2], p) for name, p in parameters if p.requires_grad]
        for decays, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [p for name, p in trainable if (p.ndim > 1 and name not in _POSITIONS) == decays]
            if chosen:
                settings.append({"params": chosen, "lr": learning_rate * factor, "weight_decay": decay})
    if not settings:
        raise ValueError("no parameter is trainable")
    if name == "sgd":
        return SGD(settings, momentum=0.9)
    # None leaves the choice to torch: another device may have no fused kernel
    fusible = all(p.device.type in ("cpu", "cuda") for setting in settings for p in setting["params"])
    optimizer = AdamW(settings, fused=fusible or None)
    # a fused step would unscale 16-bit gradients itself, too late for clipping, which Lightning refuses;
    # without this mark they are unscaled before
    optimizer._step_supports_amp_scaling = False
    return optimizer


def build_schedule(
    optimizer: Optimizer, name: ScheduleName, steps: int, warmup_steps: int, drops: Sequence[float] = DROPS
) -> LambdaLR:
    """Linear warm-up, then a cosine to zero, drops to a tenth, or nothing.

    Args:
        optimizer: Whose learning rates are scaled.
        name: Of the schedule.
        steps: Of the run.
        warmup_steps: Of them for the warm-up.
        drops: Of "step": after which shares of the run.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
        return 0.1 ** sum(step >= steps * part for part in drops) if name == "step" else 1.0

    return LambdaLR(optimizer, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], bound: float) -> None:
    """Scales gradients down to a norm.

    Gradients within it stay as they are: torch would multiply them by 1, which takes longer than the norm.

    Args:
        parameters: With their gradients, some perhaps without.
        bound: Of the norm of all gradients together.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm: Any = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if hasattr(norm, "full_tensor"):  # of parameters that are split over devices
        norm = norm.full_tensor()
    if norm > bound:
        clip_grads_with_norm_(parameters, bound, norm)


_NETWORKS = (
    *(".backbone.body", ".backbone.fpn", ".head", ".box_head", ".mask_head"),
    *(".model.backbone", ".model.encoder", ".model.decoder"),
    ".trunk",
)
"""How the names of trunk, pyramid and heads end: torchvision's, transformers', a trunk's alone."""


def compile_networks(module: nn.Module) -> None:
    """Compiles trunks, pyramids and heads; assignment and losses, whose shapes change with every batch, stay
    as they are. So do names in state dicts.

    Args:
        module: With one or more detectors in it.
    """
    for network in networks(module):
        network.compile()


def networks(module: nn.Module) -> list[nn.Module]:
    """Finds trunks (CBNet's by stages), pyramids, heads, encoders and decoders.

    Args:
        module: With one or more detectors in it.

    Returns:
        Modules that are called as they stand.
    """
    parts = (part for name, part in module.named_modules() if f".{name}".endswith(_NETWORKS))
    return [network for part in parts for network in _called(part)]


def _called(part: nn.Module) -> Iterator[nn.Module]:
    """The modules of a part that are called: itself, or its stages if it is a container (CBNet's trunks)."""
    if type(part) is not nn.ModuleDict:  # torchvision's trunks are a subclass that can be called
        yield part
        return
    for child in part.values():
        yield from _called(child)


class TrainingModule(LightningModule):
    """A LightningModule whose randomness depends on (seed, step, process) alone, and whose errors name the
    step and the images.
    """

    def __init__(
        self,
        *,
        steps: int,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 5e-4,
        weight_decay: float = 0.05,
        schedule: ScheduleName = "cosine",
        lr_drops: Sequence[float] = DROPS,
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.steps, self.seed = steps, seed
        self.optimizer_settings = optimizer, learning_rate, weight_decay
        self.schedule_settings = schedule, steps, min(warmup_steps, steps // 4), lr_drops

    def parameter_groups(self) -> list[tuple[Iterable[tuple[str, nn.Parameter]], float]]:
        """What is trained, each group with the factor of its learning rate."""
        return [(self.named_parameters(), 1.0)]

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule from the settings."""
        optimizer = build_optimizer(self.parameter_groups(), *self.optimizer_settings)
        scheduler = build_schedule(optimizer, *self.schedule_settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm, see `clip_gradients`."""
        if gradient_clip_val:
            clip_gradients(
                [p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes a resumed step draw what the unbroken run would have drawn."""
        # of this batch among those of all processes
        position = batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(seed_of(self.seed, position))

    @contextmanager
    def naming(self, names: Sequence[str]) -> Iterator[None]:
        """Adds the step, the images and advice to errors about numbers that are not finite.

        Raises:
            FloatingPointError: If one is raised within.
        """
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {self.global_step}: {error} on the images {', '.join(names)}; lower the learning rate,"
                " clip gradients or look at these images"
            ) from error

    def total_loss(self, losses: dict[str, Tensor], names: Sequence[str]) -> Tensor:
        """Adds up the losses, logs each, and stops the run at the first that is not finite.

        Args:
            losses: Scalars by name.
            names: This batch's images.

        Raises:
            FloatingPointError: Naming the step, the losses and the images.
        """
        total = torch.stack(tuple(losses.values())).sum()
        # all at once: Lightning would wait for the other processes with each of them
        means = all_reduce_mean(torch.stack([*losses.values(), total]).detach())
        if not torch.isfinite(means[-1]):  # in all processes at once: none is left waiting
            values = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            found = all_gather_items([] if torch.isfinite(total) else [(values, list(names))])
            values, names = found[0] if found else (values, names)
            with self.naming(names):
                raise FloatingPointError(f"the loss is not finite ({values})")
        for name, mean in zip([*losses, "total"], means, strict=True):
            self.log(f"loss/{name}", mean, prog_bar=len(losses) <= 3 or name == "total")
        return total
