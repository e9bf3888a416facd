"""How the cost of a step grows with the patch and with the number of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from setups import Case, planned
from steps import make_pair
from timing import header, ratio_of, row, time_in_turns

# Small networks: what a method adds weighs more beside them, and large patches fit into little memory.
_FEATURES = (8, 64)


def growth_with_patch(
    sides: Sequence[int], names: Sequence[str], device: torch.device, repetitions: int, bfloat16: bool
) -> None:
    """Seconds per step by the volume of a 3D patch."""
    cases = [planned(f"3D {side} x {side} x {side}", (side,) * 3, 2, features=_FEATURES) for side in sides]
    _grow(cases, names, device, repetitions, bfloat16, [side**3 for side in sides])


def growth_with_classes(
    numbers: Sequence[int], side: int, names: Sequence[str], device: torch.device, repetitions: int, bfloat16: bool
) -> None:
    """Seconds per step of a square patch by the number of labels, the background included."""
    cases = [planned(f"{k} labels", (side, side), 4, features=_FEATURES, num_labels=k) for k in numbers]
    _grow(cases, names, device, repetitions, bfloat16, numbers)


def _grow(
    cases: Sequence[Case],
    names: Sequence[str],
    device: torch.device,
    repetitions: int,
    bfloat16: bool,
    sizes: Sequence[int],
) -> None:
    """A line per trainer, a cell per case; last, the exponent with which the step grows from the first to the last."""
    header("step, over its floor", *(case.name for case in cases), "grows with the power")
    for name in names:
        cells, medians = [], []
        for case in cases:
            trainer, functions = make_pair(name, case, device, bfloat16 and name != "stock")
            times = time_in_turns(functions, repetitions, device)
            medians.append(float(np.median(times[:, 1])))
            cells.append(f"{medians[-1]:.3f} s, {ratio_of(times).split()[0]}")
            del trainer, functions
        power = math.log(medians[-1] / medians[0]) / math.log(sizes[-1] / sizes[0])
        row(name, *cells, f"{power:.2f}")
