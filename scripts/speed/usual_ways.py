"""Each piece of the methods beside the way the field usually does it.

The usual ways are written here from the published descriptions: elastic deformation with SciPy (Simard et al. 2003) and
with batchgeneratorsv2, the threshold of an entropy map by numpy on the host, uncertainty from repeated passes with
dropout one by one (Gal and Ghahramani 2016; Yu et al. 2019 for segmentation), and a forward pass for each view.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from scipy import ndimage
from setups import Case, make_trainer
from timing import header, row, time_in_turns
from torch import nn

from nnunet_ssl.blocks.networks import full_resolution
from nnunet_ssl.losses.agreement import entropy, upper_threshold
from nnunet_ssl.losses.predictions import log_probabilities
from nnunet_ssl.methods import nnUNetTrainerSupervised
from nnunet_ssl.transforms.alignment import align_displacements, solver_grid, without_margin
from nnunet_ssl.transforms.displacement import sample_displacement, warp

_SMOOTHNESS, _DISPLACEMENT = 0.1, 0.02
_FRACTION = 0.8
_NUM_PASSES = 8
_DROPOUT = 0.5
# Displacements beyond a few sigma do not matter to a Gaussian filter.
_TRUNCATE = 3.0

Functions = dict[str, Callable[[], object]]


def compare_usual_ways(cases: Sequence[Case], device: torch.device, repetitions: int) -> None:
    """Print every piece: ours, the usual ways, and how many times faster ours is."""
    header("piece", "case", "ours", "", "usual way", "", "times faster (quartiles)")
    for case in cases:
        for piece, make in (
            ("two elastic transforms of an image and its labels", elastic_transforms),
            ("voxels of low entropy, from logits", entropy_thresholds),
            ("uncertainty of an unlabeled batch", uncertainties),
            ("two views through one network, with gradient", two_views),
        ):
            functions = make(case, device)
            names = list(functions)
            threads = torch.get_num_threads()
            # SciPy and the workers of nnU-Net's loaders have one.
            torch.set_num_threads(1 if make is elastic_transforms else threads)
            times = time_in_turns([functions[name] for name in names], repetitions, device)
            torch.set_num_threads(threads)
            ours = np.median(times[:, 0])
            for column, name in enumerate(names[1:], start=1):
                low, ratio, high = np.percentile(times[:, column] / times[:, 0], [25, 50, 75])
                seconds = 1e3 * np.median(times[:, column])
                said = f"{ratio:.1f} ({low:.1f} to {high:.1f})"
                row(piece, case.name, names[0], f"{1e3 * ours:.1f} ms", name, f"{seconds:.1f} ms", said)


def elastic_transforms(case: Case, device: torch.device) -> Functions:
    """Two random elastic transforms of one example; ours finds besides how the two views lie to each other.

    Ours run on the training's device, the usual ones on the CPU; one thread. Images are interpolated linearly, by SciPy
    with cubic splines too, as nnU-Net's older augmentation does; labels by nearest neighbor.
    """
    patch = case.patch
    image = torch.randn(1, 1, *patch)
    labels = torch.randint(0, case.num_labels, (1, 1, *patch)).to(torch.int16)
    on_device = image.to(device), labels.to(device)
    side = math.prod(patch) ** (1 / len(patch))
    grid = solver_grid(patch, _SMOOTHNESS * side)
    generator = torch.Generator(device).manual_seed(0)
    strength = {"sigma": _SMOOTHNESS * side, "std": _DISPLACEMENT * side}
    rng = np.random.default_rng(0)
    sides = np.array(patch)
    stock = SpatialTransform(
        patch,
        0,
        False,
        p_elastic_deform=1.0,
        elastic_deform_scale=(0.1, 0.1),
        elastic_deform_magnitude=(5.0, 5.0),
        mode_seg="nearest",
    )

    def ours() -> None:
        fields = [sample_displacement(1, patch, **strength, margin=grid.margin, generator=generator) for _ in range(2)]
        for field in fields:
            on_patch = without_margin(field, grid.margin)
            warp(on_device[0], on_patch, "linear")
            warp(on_device[1], on_patch, "nearest")
        align_displacements(*fields, grid=grid)

    def batchgenerators() -> None:
        for _ in range(2):
            stock(image=image[0], segmentation=labels[0])

    def with_scipy(order: int) -> None:
        for _ in range(2):
            noise = rng.uniform(-1, 1, (len(patch), *patch)).astype(np.float32)
            field = np.stack([ndimage.gaussian_filter(u, _SMOOTHNESS * sides, truncate=_TRUNCATE) for u in noise])
            # Scaled to the asked standard deviation, in voxels per axis.
            field *= (_DISPLACEMENT * sides / field.std(axis=tuple(range(1, field.ndim)))).reshape(
                -1, *[1] * len(patch)
            )
            places = np.indices(patch, dtype=np.float32) + field
            ndimage.map_coordinates(image[0, 0].numpy(), places, order=order, mode="nearest")
            ndimage.map_coordinates(labels[0, 0].numpy(), places, order=0, mode="nearest")

    return {
        "with alignment": ours,
        "batchgeneratorsv2, no alignment": batchgenerators,
        "SciPy, linear, no alignment": functools.partial(with_scipy, 1),
        "SciPy, cubic splines, no alignment": functools.partial(with_scipy, 3),
    }


def entropy_thresholds(case: Case, device: torch.device) -> Functions:
    """Which voxels of a batch lie below a percentile of the entropy."""
    logits = torch.randn(2, case.num_labels, *case.patch, device=device)

    def ours() -> torch.Tensor:
        uncertain = entropy(log_probabilities(logits, False))
        return uncertain <= upper_threshold(uncertain, _FRACTION)

    def on_host() -> torch.Tensor:
        p = torch.softmax(logits, 1)
        uncertain = -(p * torch.log(p + 1e-16)).sum(1)
        bound = np.percentile(uncertain.detach().cpu().numpy().flatten(), 100 * _FRACTION)
        return uncertain <= float(bound)

    return {"on the device": ours, "numpy's percentile on the host": on_host}


def uncertainties(case: Case, device: torch.device) -> Functions:
    """How sure a method is of an unlabeled batch; DualNet's training has passed it through both networks anyway."""
    trainer = make_trainer(nnUNetTrainerSupervised, case, device)
    network = nn.Sequential(nn.Dropout(_DROPOUT), trainer.network)
    images = torch.randn(2, trainer.num_input_channels, *case.patch, device=device)
    with torch.no_grad():
        logits = [full_resolution(network(images)) for _ in range(2)]

    def ours() -> torch.Tensor:
        sure = [h <= upper_threshold(h, _FRACTION) for h in (entropy(log_probabilities(z, False)) for z in logits)]
        return sure[0] & sure[1]

    def one_by_one() -> torch.Tensor:
        with torch.no_grad(), trainer.autocast():
            p = sum(torch.softmax(full_resolution(network(images)), 1) for _ in range(_NUM_PASSES)) / _NUM_PASSES
            return -(p * torch.log(p + 1e-6)).sum(1)

    return {"from outputs at hand": ours, f"{_NUM_PASSES} passes with dropout, one by one": one_by_one}


def two_views(case: Case, device: torch.device) -> Functions:
    """Both views of a Siamese network in one pass, or in a pass each."""
    trainer = make_trainer(nnUNetTrainerSupervised, case, device)
    views = [torch.randn(2, trainer.num_input_channels, *case.patch, device=device) for _ in range(2)]

    def ours() -> None:
        trainer.optimizer.zero_grad(set_to_none=True)
        with trainer.autocast():
            loss = full_resolution(trainer.network(torch.cat(views))).square().mean()
        loss.backward()

    def separate() -> None:
        trainer.optimizer.zero_grad(set_to_none=True)
        with trainer.autocast():
            loss = sum(full_resolution(trainer.network(view)).square().mean() for view in views) / 2
        loss.backward()

    return {"one pass": ours, "a pass each": separate}
