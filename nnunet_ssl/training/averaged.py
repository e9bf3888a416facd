"""nnU-Net's trainer whose running average of weights may predict, instead of the weights of the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.errors import UserError
from nnunet_ssl.training.configured import ConfiguredTrainer

# The average's name while training, and that of the trained weights in a checkpoint, whose network is the average.
_AVERAGE, UNAVERAGED = "average", "unaveraged"


class AveragedTrainer(ConfiguredTrainer):
    """Keeps an average of the plan's network where ``averaged_decay`` asks for one, and lets that predict.

    Validation, pictures and checkpoints show the average: stock nnU-Net predicts with it. The optimizer's weights go on
    beside it, in checkpoints as a companion, so that resuming goes on from them.
    """

    companions: dict[str, Companion]
    architecture: Any
    add: Any

    def build_average(self) -> None:
        """Add the average; before any hook is registered on the network."""
        if self.hp.averaged_decay > 0:
            self.add(_AVERAGE, EMATeacher(self.network, self.architecture, self.hp.averaged_decay))

    @contextlib.contextmanager
    def weights_that_predict(self) -> Iterator[None]:
        """The network holds the average inside, and its companion the weights of the last step."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def companion_states(self) -> dict[str, Any]:
        """What a checkpoint keeps of the companions; called with ``weights_that_predict``."""
        return {UNAVERAGED if name == _AVERAGE else name: c.state() for name, c in self.companions.items()}

    def restore_companions(self, states: dict[str, Any]) -> None:
        """Go on from a checkpoint whose network is loaded already.

        Raises:
            UserError: Where the checkpoint has others.
        """
        names = {UNAVERAGED if name == _AVERAGE else name: name for name in self.companions}
        if set(names) != set(states):
            raise UserError(
                f"The checkpoint holds the further networks {sorted(states) or 'none'}, this training has "
                f"{sorted(names) or 'none'}: it was trained with other hyper-parameters (averaged_decay, or the "
                f"method's). Set them as they were, or train anew."
            )
        for saved, name in names.items():
            self.companions[name].restore(states[saved])
        self._swap()

    def on_validation_epoch_start(self) -> None:
        """Validate what predicts."""
        self._swap()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Go on with the weights of the last step."""
        super().on_validation_epoch_end(val_outputs)
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if _AVERAGE not in self.companions:
            return
        first, second = bare(self.network), bare(self.companions[_AVERAGE].module)
        for mine, its in zip([*first.parameters(), *first.buffers()], [*second.parameters(), *second.buffers()]):
            kept = mine.clone()
            mine.copy_(its)
            its.copy_(kept)
