"""The loss that passes over voxels: against nnU-Net's own with an ignore label, and against numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from reference_loss import arrays, reference_loss

from nnunet_ssl.nnunet.loss import with_ignored_voxels

SHAPES = {"2d": (8, 10), "3d": (4, 6, 8)}
K = 3


def own_loss(shape: tuple[int, ...], has_regions: bool, ignore: bool, **weights: float) -> torch.nn.Module:
    """As nnU-Net's trainer builds it, with the Dice of a batch in 2D."""
    dice = {"batch_dice": len(shape) == 2, "smooth": 1e-5, "ddp": False, "do_bg": has_regions}
    if has_regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss, **weights)
    label = K if ignore else None
    return DC_and_CE_loss(dice, {}, ignore_label=label, dice_class=MemoryEfficientSoftDiceLoss, **weights)


def case(shape: tuple[int, ...], has_regions: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, target with ignored voxels, and which count."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, K, *shape, generator=generator)
    counted = torch.rand(2, 1, *shape, generator=generator) > 0.4
    if has_regions:
        regions = torch.randint(0, 2, (2, K, *shape), generator=generator)
        return logits, torch.cat([regions, (~counted).long()], 1).to(torch.int16), counted
    labels = torch.randint(0, K, (2, 1, *shape), generator=generator)
    return logits, torch.where(counted, labels, K).to(torch.int16), counted


def value_and_gradient(loss: torch.nn.Module, logits: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.item(), leaf.grad


@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_nnunets_own_with_an_ignore_label(shape, has_regions):
    weights = {"weight_ce": 0.7, "weight_dice": 1.3}
    own = own_loss(shape, has_regions, True, **weights)
    masked = with_ignored_voxels(copy.deepcopy(own), has_regions, K)
    logits, target, _ = case(shape, has_regions)
    (expected, slope), (found, gradient) = (value_and_gradient(loss, logits, target) for loss in (own, masked))
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_ignored_voxels_it_equals_the_loss_of_a_data_set_without_an_ignore_label(shape, has_regions):
    own = own_loss(shape, has_regions, False)
    masked = with_ignored_voxels(copy.deepcopy(own), has_regions, K)
    logits, target, counted = case(shape, has_regions)
    target = target[:, :K] if has_regions else torch.where(counted, target, 1)
    (expected, slope) = value_and_gradient(own, logits, target)
    if has_regions:
        target = torch.cat([target, torch.zeros_like(target[:, :1])], 1)
    (found, gradient) = value_and_gradient(masked, logits, target)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_numpy_at_all_resolutions(shape, has_regions):
    own = DeepSupervisionWrapper(own_loss(shape, has_regions, False), (2 / 3, 1 / 3, 0.0))
    masked = with_ignored_voxels(own, has_regions, K)
    logits, target, counted = case(shape, has_regions)
    half = torch.randn(2, K, *(side // 2 for side in shape))
    index = (..., *[slice(1, None, 2)] * len(shape))
    value = masked([logits, half, half], [target, target[index], target[index]]).item()
    regions = target[:, :K] if has_regions else target
    expected = reference_loss(arrays([logits, half, half]), regions.numpy(), counted.numpy(), has_regions)
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_where_nothing_counts_it_is_zero_without_gradient(shape, has_regions, dtype):
    masked = with_ignored_voxels(own_loss(shape, has_regions, False), has_regions, K)
    logits, target, _ = case(shape, has_regions)
    nothing = torch.cat([target[:, :K], torch.ones_like(target[:, :1])], 1) if has_regions else target * 0 + K
    leaf = logits.to(dtype).requires_grad_()
    value = masked(leaf, nothing)
    # Times the scale that nnU-Net's gradient scaler starts from.
    (value * 2.0**16).backward()
    assert value.item() == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
def test_it_never_asks_for_a_value_of_the_device(has_regions):
    """Tensors of the meta device have none: whoever asks for one fails, as nnU-Net's own loss does."""
    shape = SHAPES["2d"]
    logits, target, _ = (t.to("meta") for t in case(shape, has_regions))
    own = own_loss(shape, has_regions, True)
    assert with_ignored_voxels(copy.deepcopy(own), has_regions, K)(logits.requires_grad_(), target).requires_grad
    if not has_regions:
        with pytest.raises((RuntimeError, NotImplementedError)):
            own(logits, target)


@pytest.mark.parametrize("has_regions", [False, True], ids=["labels", "regions"])
def test_a_step_moves_counted_voxels_to_their_labels_and_no_others(has_regions):
    masked = with_ignored_voxels(own_loss((8, 10), has_regions, False), has_regions, K)
    logits, target, counted = case((8, 10), has_regions)
    _, gradient = value_and_gradient(masked, logits, target)
    moved = -gradient
    assert not moved[(~counted).expand_as(moved)].any()
    labels = torch.where(counted, target, 0)[:, :1].long()
    wanted = target[:, :K] > 0 if has_regions else torch.zeros_like(moved).scatter_(1, labels, 1.0) > 0
    inside = counted.expand_as(moved)
    assert (moved[wanted & inside] > 0).all()
    assert np.all(moved[~wanted & inside].numpy().mean() < 0)
