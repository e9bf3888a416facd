"""nnU-Net's local logger with one more curve per loss term, weight and statistic."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from nnunet_ssl.files import replace_atomically


class TermLogger(LocalLogger):
    """Knows a key per loss term, weight and statistic, and draws them below nnU-Net's panels in progress.png.

    Args:
        term_names: As the trainer declares them.
        weighted_terms: Those whose weights follow a schedule.
        step_statistics: What the trainer tells about every step.
        epoch_statistics: What it tells once per epoch.
    """

    def __init__(
        self,
        term_names: Sequence[str],
        weighted_terms: Sequence[str] = (),
        step_statistics: Sequence[str] = (),
        epoch_statistics: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.panels = {
            "loss term": tuple(term_names),
            "weight": tuple(self.weight(name) for name in weighted_terms),
            "statistic": (*step_statistics, *epoch_statistics),
        }
        # What a step gives, in this order.
        self.step_names = (*self.panels["loss term"], *self.panels["weight"], *step_statistics)
        for names in self.panels.values():
            self.my_fantastic_logging.update({self.key(name): [] for name in names})

    @staticmethod
    def key(name: str) -> str:
        """The logger's key of a loss term, weight or statistic."""
        return f"ssl_{name}"

    @staticmethod
    def weight(term_name: str) -> str:
        """The name of a loss term's weight."""
        return f"weight_{term_name}"

    def lines(self) -> list[str]:
        """What the log says of the epoch that has just ended; nothing of what was not computed in it."""
        said = []
        for title, names in self.panels.items():
            series = [(name, self.my_fantastic_logging[self.key(name)]) for name in names]
            # Under DDP, what one rank alone looks at is missing on the others.
            values = [(name, logged[-1]) for name, logged in series if logged]
            text = ", ".join(
                f"{name.removeprefix(self.weight(''))} {value:.4f}" for name, value in values if not math.isnan(value)
            )
            said += [f"{title}s: {text}"] if text else []
        return said

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw progress.png: nnU-Net's panels, then loss terms, weights and statistics by epoch."""
        super().plot_progress_png(output_folder)
        file = os.path.join(output_folder, "progress.png")
        with Image.open(file) as image:
            panels = np.asarray(image.convert("RGB"))
        picture = Image.fromarray(np.concatenate([panels, self._draw_terms(width=panels.shape[1])], axis=0))
        # The picture is written after every epoch: compressing it well would cost more than drawing it.
        replace_atomically(file, lambda temporary: picture.save(temporary, format="PNG", compress_level=1))

    def _draw_terms(self, width: int) -> np.ndarray:
        dpi = 100
        drawn = {title: names for title, names in self.panels.items() if names}
        figure = Figure(figsize=(width / dpi, width / dpi * 0.6 * len(drawn)), dpi=dpi)
        canvas = FigureCanvasAgg(figure)
        for axes, (title, names) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn.items()):
            for name in names:
                values = self.my_fantastic_logging[self.key(name)]
                axes.plot(range(len(values)), values, label=name, linewidth=4)
            axes.set_xlabel("epoch")
            axes.set_ylabel(title)
            axes.legend(loc=(0, 1), ncols=3)
        figure.tight_layout()
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]
