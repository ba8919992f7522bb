"""Fully sharded training: of every parameter, each device holds a part (FSDP2, torch's `fully_shard`)."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from aligndet.training import networks

_LARGE = 500_000
"""Parameters of a layer that is gathered when it is called; what is smaller is gathered once a step."""


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits all parameters along their first dimension over the devices, in place.

    Large layers that stand in a row are gathered when they are called and given back after it, everything
    else is gathered for the length of a step. Both detectors of pre-training are split alike, so that the
    momentum detector follows the online one part by part.

    Args:
        module: Whose step is its `forward`.
        mesh: Of the devices, in one dimension.

    Raises:
        ValueError: Naming a parameter that is a single number.
    """
    for name, parameter in module.named_parameters():
        if not parameter.ndim:
            raise ValueError(f"--strategy fsdp: {name} is a single number and cannot be split; take ddp")
    owners = Counter(id(p) for part in module.modules() for p in part._parameters.values())
    layers = (layer for network in networks(module) for layer in _layers(network))
    for layer in dict.fromkeys(layers):  # the trunk is in both detectors
        if all(owners[id(p)] == 1 for p in layer.parameters()):  # or it is needed outside, too
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh)


def _layers(network: nn.Module, in_a_row: bool = False) -> list[nn.Module]:
    """The innermost large layers of rows, which are called as they stand; what is around them may not be."""
    row = isinstance(network, nn.Sequential | nn.ModuleList)
    inner = [layer for part in network.children() for layer in _layers(part, row)]
    large = sum(p.numel() for p in network.parameters()) >= _LARGE
    return inner or [network] * (in_a_row and large and not isinstance(network, nn.ModuleList))


class FullyShardedStrategy(DDPStrategy):
    """Splits the module where Lightning's DDP would wrap it; processes start and end as with DDP, and
    checkpoints hold whole tensors under the same names, so that a run goes on with either.

    Lightning's `ModelParallelStrategy` writes checkpoints of another kind, beside the plugin that flushes
    them.
    """

    def configure_ddp(self) -> None:
        """Splits the module, after all processes have taken over the first one's weights."""
        assert self.lightning_module is not None
        for tensor in chain(self.lightning_module.parameters(), self.lightning_module.buffers()):
            distributed.broadcast(tensor.detach(), 0)
        shard(self.lightning_module, init_device_mesh(self.root_device.type, (self.world_size,)))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's `forward`, which is what gathers the parameters."""
        with self.precision_plugin.train_step_context():
            return self._as_forward("training_step", *args, **kwargs)

    def on_validation_start(self) -> None:
        """Gathers everything: processes may have different numbers of images, and none waits for another.

        Statistics of batch norms are the first process's, which are saved.
        """
        assert self.lightning_module is not None
        for statistics in self.lightning_module.buffers():
            distributed.broadcast(statistics, 0)
        for part in self._split():
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's `forward`, as in training."""
        with self.precision_plugin.val_step_context():
            return self._as_forward("validation_step", *args, **kwargs)

    def on_validation_end(self) -> None:
        """Gives everything back."""
        for part in self._split():
            part.reshard()
            part.set_reshard_after_forward(part is not self.lightning_module, recurse=False)

    def _split(self) -> list[Any]:
        assert self.lightning_module is not None
        return [part for part in self.lightning_module.modules() if isinstance(part, FSDPModule)]

    def _as_forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        return self._forward_redirection(module, module, name, *args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the whole module; on all processes but the first, empty tensors."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict(keep_vars=True)  # one object where names share a tensor
        return _gathered(state, self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the whole optimizer; on all processes but the first, empty tensors."""
        return _gathered(super().optimizer_state(optimizer), self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Splits a whole optimizer's state as the parameters are split."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {i: _like(parameters[i], values) for i, values in state["state"].items()}
            states.append({**state, "state": parts})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def teardown(self) -> None:
        """Puts the module together again, if the run has come to its end: alone, a process would wait."""
        if (module := self.lightning_module) is not None:
            # what `fully_shard` has added looks for parts where weights are moved or loaded
            for part in self._split():
                part.reshard()
                part.__class__ = type(part).__bases__[1]
            for part in module.modules():
                part._load_state_dict_post_hooks.clear()
            if module._trainer is not None and module.trainer.state.status != TrainerStatus.INTERRUPTED:
                _unshard(module)
        super().teardown()


def _unshard(module: nn.Module) -> None:
    """Gives a module whole parameters, on the CPU; every process has to call it."""
    whole: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    full = parameter.full_tensor().detach().cpu()
                    whole[parameter] = nn.Parameter(full, parameter.requires_grad)
                part._parameters[name] = whole[parameter]


def _gathered(state: Any, wanted: bool) -> Any:
    """A state with whole tensors on the CPU in it; every process has to call it."""
    known: dict[int, Tensor] = {}

    def gather(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            full = value.detach()
            full = full.full_tensor() if isinstance(full, DTensor) else full
            known[id(value)] = full.cpu() if wanted else full.new_empty(0)
        return known[id(value)]

    return tree_map(gather, state)


def _like(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer knows of a parameter, split as the parameter is; counters stay whole."""
    if not isinstance(parameter, DTensor):
        return values

    def split(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    return {name: split(value) for name, value in values.items()}
