"""Derive a plans file from another one: hyper-parameters in the block "ssl", and smaller networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError

# Where hyper-parameters stand in a plans file; nnU-Net leaves alone what it does not know.
PLANS_KEY = "ssl"

# The two families of U-Nets that nnU-Net plans, and how many residual blocks it gives to each stage of the second.
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
_RESIDUAL_BLOCKS = (1, 3, 4, 6)

# InstanceNorm needs more than one voxel per channel; nnU-Net plans no bottleneck smaller than this either.
SMALLEST_BOTTLENECK = 4
_FEWEST_STAGES = 3


def with_hyperparameters(plans: Mapping[str, Any], name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the plans under a new name, with hyper-parameters added to those it has.

    Args:
        plans: nnU-Net's plans.
        name: Name of the new plans.
        values: Shared hyper-parameters by name, and an object of them by the name of a method.
    """
    derived = copy.deepcopy(dict(plans))
    derived["plans_name"] = name
    derived[PLANS_KEY] = merged(derived.get(PLANS_KEY, {}), values)
    return derived


def merged(hyperparameters: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters with others added, which win; the objects of a method are merged too."""
    result = dict(hyperparameters)
    for name, value in others.items():
        before = result.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = merged(before, value)
        result[name] = copy.deepcopy(value)
    return result


def with_partner_network(plans: Mapping[str, Any], name: str, configuration: str) -> dict[str, Any]:
    """A copy of the plans under a new name, in which one configuration has its partner network.

    The partner has the same patch, batch, stages, strides, kernels and features, but belongs to the other family: the
    residual-encoder U-Net with the depths that nnU-Net plans (one decoder convolution per stage and 1, 3, 4, 6, 6, ...
    blocks), or, where the plans have one already, the plain U-Net (two convolutions per stage).

    Args:
        plans: nnU-Net's plans.
        name: Name of the new plans.
        configuration: Which one to change.

    Raises:
        UserError: For a network of neither family.
    """
    derived = copy.deepcopy(dict(plans))
    derived["plans_name"] = name
    architecture = copy.deepcopy(PlansManager(derived).get_configuration(configuration).configuration["architecture"])
    settings, family = architecture["arch_kwargs"], architecture["network_class_name"]
    stages = settings["n_stages"]
    # By class name, as nnU-Net finds it: older plans name another module.
    kind = family.rpartition(".")[2]
    if kind == PLAIN.rpartition(".")[2]:
        del settings["n_conv_per_stage"]
        deeper = [_RESIDUAL_BLOCKS[-1]] * stages
        settings["n_blocks_per_stage"] = [*_RESIDUAL_BLOCKS, *deeper][:stages]
        settings["n_conv_per_stage_decoder"] = [1] * (stages - 1)
        architecture["network_class_name"] = RESIDUAL
    elif kind == RESIDUAL.rpartition(".")[2]:
        architecture["network_class_name"] = PLAIN
        del settings["n_blocks_per_stage"]
        settings["n_conv_per_stage"] = [2] * stages
        settings["n_conv_per_stage_decoder"] = [2] * (stages - 1)
    else:
        raise UserError(
            f"No partner is known for the network {family} of {configuration}; expected {PLAIN.rpartition('.')[2]} or "
            f"{RESIDUAL.rpartition('.')[2]}, as nnU-Net's planners write."
        )
    derived["configurations"][configuration]["architecture"] = architecture
    return derived


def shrink(
    plans: Mapping[str, Any],
    configuration: str,
    *,
    downscale: float = 1.0,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    base_features: int | None = None,
    max_features: int | None = None,
) -> dict[str, Any]:
    """A copy of the plans with one configuration made smaller.

    A downscaled configuration gets a preprocessed folder of its own, so nnUNetv2_preprocess must run for it.

    Args:
        plans: nnU-Net's plans, already under their new name.
        configuration: Which one to change.
        downscale: Factor on the spacing; 4 turns 512 pixels into 128.
        patch_size: New patch, in voxels; by default the old one divided by ``downscale``. Rounded up to what the
            network's strides divide.
        batch_size: New batch size.
        base_features: Features of the first stage, doubled from stage to stage.
        max_features: Upper bound on the features of a stage.

    Raises:
        UserError: For an unknown configuration or sizes that leave no network.
    """
    derived = copy.deepcopy(dict(plans))
    if configuration not in derived["configurations"]:
        known = ", ".join(derived["configurations"])
        raise UserError(f"The plans have no configuration {configuration}; they have {known}.")
    settings = derived["configurations"][configuration]
    if "inherits_from" in settings:
        raise UserError(
            f"{configuration} inherits from {settings['inherits_from']}; change that configuration instead."
        )
    sizes = {"batch size": batch_size, "base features": base_features, "max features": max_features}
    for what, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"The {what} must be at least 1, got {size}.")
    if downscale < 1:
        raise UserError(f"--downscale must be at least 1, got {downscale}.")
    if downscale > 1:
        settings["spacing"] = [s * downscale for s in settings["spacing"]]
        settings["median_image_size_in_voxels"] = [s / downscale for s in settings["median_image_size_in_voxels"]]
        settings["data_identifier"] = f"{derived['plans_name']}_{configuration}"
    wanted = patch_size or [math.ceil(s / downscale) for s in settings["patch_size"]]
    if len(wanted) != len(settings["patch_size"]) or min(wanted) < 1:
        raise UserError(f"The patch of {configuration} has {len(settings['patch_size'])} sides, got {list(wanted)}.")
    network = settings["architecture"]["arch_kwargs"]
    _drop_stages(network, wanted)
    _set_features(network, base_features, max_features)
    total_stride = [math.prod(axis) for axis in zip(*network["strides"])]
    settings["patch_size"] = [math.ceil(w / t) * t for w, t in zip(wanted, total_stride)]
    if batch_size is not None:
        settings["batch_size"] = batch_size
    return derived


def _drop_stages(network: dict[str, Any], patch_size: Sequence[int]) -> None:
    """Keep the stages whose feature maps are large enough."""
    sides: list[float] = [float(s) for s in patch_size]
    keep = 0
    for stride in network["strides"]:
        sides = [side / s for side, s in zip(sides, stride)]
        if any(side < SMALLEST_BOTTLENECK and s > 1 for side, s in zip(sides, stride)):
            break
        keep += 1
    # nnU-Net gives the lowest output no weight in its loss: of a network with two stages, that is the only one.
    if keep < _FEWEST_STAGES:
        raise UserError(
            f"A patch of {list(patch_size)} voxels leaves {keep} stages; nnU-Net's loss needs at least "
            f"{_FEWEST_STAGES}. Use a larger one."
        )
    network["n_stages"] = keep
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"):
        if isinstance(network.get(name), list):
            network[name] = network[name][:keep]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: keep - 1]


def _set_features(network: dict[str, Any], base: int | None, largest: int | None) -> None:
    old = network["features_per_stage"]
    start = base or old[0]
    bound = largest or max(old)
    network["features_per_stage"] = [min(start * 2**i, bound) for i in range(len(old))]
