"""Companions: everything with weights that a training owns besides the plan's network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.runtime.distributed import data_parallel


class Companion:
    """A second network, an averaged one, a further decoder, a head, a discriminator.

    The training moves it to the device, compiles and wraps it as the plan's network, optimizes and clips what is
    trained, switches between training and evaluation, tells it of steps that were taken, saves and resumes it. None of
    this is the method's business, which calls it like the module that it holds.

    Args:
        module: What it holds. Its parameters must not be another network's: an extra decoder that keeps the encoder
            it was built with would own, save and optimize that twice.

    Attributes:
        module: The module, once it is added to a training on its device, compiled and wrapped like the plan's network.
        trained: Whether the optimizer changes it.
        learning_rate: Factor on the plan's learning rate, which nnU-Net's schedule keeps.
        predicts: Whether its outputs are those of the plan's network: then it is trained on labels too.
    """

    trained: ClassVar[bool] = True
    learning_rate: float = 1.0
    predicts: ClassVar[bool] = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any) -> Any:
        """What the module returns."""
        return self.module(*arguments)

    def place(self, device: torch.device, compiled: bool, is_ddp: bool) -> None:
        """Bring the module to the training's device, compiled and wrapped for several processes where asked."""
        module = self.module.to(device)
        if compiled:
            module = torch.compile(module)  # type: ignore[assignment]
        self.module = data_parallel(module) if is_ddp and self.trained else module

    def start_epoch(self) -> None:
        """Put the module into the mode it trains in."""
        self.module.train(self.trained)

    def set_deep_supervision(self, enabled: bool) -> None:
        """Called where the training switches deep supervision on or off."""

    def after_step(self) -> None:
        """Called after every step that changed the weights; not after one that was skipped."""

    def architecture(self) -> dict[str, Any] | None:
        """Its architecture as plans describe one; then ``nnunet-ssl export`` can make a model of it. None otherwise."""
        return None

    def memory(self) -> dict[str, Any]:
        """What besides weights must outlive a stop: tensors and plain values."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Undo everything since ``memory``."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "weights": bare(self.module).state_dict(),
            "architecture": self.architecture(),
            "memory": self.memory(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        bare(self.module).load_state_dict(state["weights"])
        self.recall(state["memory"])
