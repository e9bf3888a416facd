"""nnU-Net's local logger with one more curve per loss term."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from nnunet_ssl.files import replace_atomically


class TermLogger(LocalLogger):
    """Knows a key per loss term and draws them below nnU-Net's panels in progress.png.

    Args:
        term_names: As the trainer declares them.
        statistic_names: Likewise; they are drawn in a panel of their own.
    """

    def __init__(self, term_names: Sequence[str], statistic_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.term_names = tuple(term_names)
        self.statistic_names = tuple(statistic_names)
        for name in (*self.term_names, *self.statistic_names):
            self.my_fantastic_logging[self.key(name)] = []

    @staticmethod
    def key(term_name: str) -> str:
        """The logger's key of a term or statistic."""
        return f"ssl_{term_name}"

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw progress.png: nnU-Net's panels, then loss terms and statistics by epoch."""
        super().plot_progress_png(output_folder)
        file = os.path.join(output_folder, "progress.png")
        with Image.open(file) as image:
            panels = np.asarray(image.convert("RGB"))
        picture = Image.fromarray(np.concatenate([panels, self._draw_terms(width=panels.shape[1])], axis=0))
        # The picture is written after every epoch: compressing it well would cost more than drawing it.
        replace_atomically(file, lambda temporary: picture.save(temporary, format="PNG", compress_level=1))

    def _draw_terms(self, width: int) -> np.ndarray:
        dpi = 100
        panels = {"loss term": self.term_names, "statistic": self.statistic_names}
        drawn = {title: names for title, names in panels.items() if names}
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
