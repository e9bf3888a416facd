"""A network whose weights are an average over the steps of another one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.blocks.networks import bare, full_resolution, set_deep_supervision


class EMATeacher(Companion):
    """The exponential moving average of a network's weights.

    theta' <- alpha theta' + (1 - alpha) theta after every step that was taken, with alpha = min(1 - 1 / (t + 1), decay)
    and t = 0 at the first: a plain mean to begin with, in which the initial weights do not count. Tarvainen and
    Valpola, "Mean teachers are better role models" (NeurIPS 2017). Buffers (of BatchNorm) are copied, and it predicts
    in evaluation mode. Every process of a training in several follows the same weights, so nothing is communicated.

    Args:
        student: The network it follows, wrapped or not; no hook may be registered on it yet.
        architecture: The student's, see ``Partner``.
        decay: Largest alpha, in [0, 1).
    """

    trained: ClassVar[bool] = False

    def __init__(self, student: nn.Module, architecture: dict[str, Any], decay: float) -> None:
        super().__init__(copy.deepcopy(bare(student)).requires_grad_(False))
        set_deep_supervision(self.module, False)
        self._student = student
        self._architecture = architecture
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K, *S) at full resolution, without gradient."""
        logits: Tensor = full_resolution(self.module(images))
        return logits

    @torch.no_grad()
    def after_step(self) -> None:
        """Follow the student."""
        self.steps += 1
        alpha = min(1.0 - 1.0 / self.steps, self.decay)
        teacher, student = bare(self.module), bare(self._student)
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - alpha)
        for mine, its in zip(teacher.buffers(), student.buffers()):
            mine.copy_(its)

    def architecture(self) -> dict[str, Any]:
        """As the plans describe it."""
        return self._architecture

    def memory(self) -> dict[str, Any]:
        """How many steps it has followed."""
        return {"steps": self.steps}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.steps = memory["steps"]
