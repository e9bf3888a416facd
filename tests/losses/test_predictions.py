"""Losses against numpy and against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnunet_ssl.losses.overlap import SMOOTH, SoftIoULoss, found_classes, soft_iou_loss, tanimoto_loss
from nnunet_ssl.losses.predictions import downsample_target, likeliest, probabilities

SHAPES = [(6, 5), (4, 3, 5)]


def random_probabilities(shape, classes=3, seed=0):
    logits = torch.randn(2, classes, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return probabilities(logits, has_regions=False)


def soft_iou_by_hand(p, q, mask, counted=None):
    """Mean over images of 1 - mean over classes, in plain loops."""
    of_images = []
    for b in range(p.shape[0]):
        values = []
        for k in range(p.shape[1]):
            if counted is not None and not counted[b][k]:
                continue
            overlap = union = 0.0
            for x, y, m in zip(p[b, k].ravel(), q[b, k].ravel(), mask[b, 0].ravel()):
                if m:
                    overlap += x * y
                    union += x + y - x * y
            values.append((overlap + SMOOTH) / (union + SMOOTH))
        of_images.append(1 - np.mean(values) if values else 0.0)
    return np.mean(of_images)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_iou_equals_loops(shape):
    p, q = random_probabilities(shape), random_probabilities(shape, seed=1)
    mask = torch.rand(2, 1, *shape) > 0.3
    everything = np.ones_like(mask.numpy())
    assert soft_iou_loss(p, q).item() == pytest.approx(soft_iou_by_hand(p.numpy(), q.numpy(), everything))
    assert soft_iou_loss(p, q, mask).item() == pytest.approx(soft_iou_by_hand(p.numpy(), q.numpy(), mask.numpy()))


def test_soft_iou_closed_forms():
    one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 8, 8)), 3).movedim(-1, 1).double()
    assert soft_iou_loss(one_hot, one_hot).item() == pytest.approx(0.0)
    half = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    half[:, 0, :2], half[:, 1, 2:] = 1.0, 1.0
    shifted = half.roll(1, dims=2)
    # Per class 4 voxels agree of a union of 12.
    assert soft_iou_loss(half, shifted).item() == pytest.approx(1 - (4 + SMOOTH) / (12 + SMOOTH))
    absent = torch.zeros(1, 1, 4, 4)
    assert soft_iou_loss(absent, absent).item() == 0.0


def test_soft_iou_gradient_is_correct_and_symmetric():
    p, q = random_probabilities((3, 3)).requires_grad_(), random_probabilities((3, 3), seed=1).requires_grad_()
    mask = torch.rand(2, 1, 3, 3) > 0.3
    assert torch.autograd.gradcheck(lambda a, b: soft_iou_loss(a, b, mask), (p, q))
    assert soft_iou_loss(p, q, mask).item() == pytest.approx(soft_iou_loss(q, p, mask).item())


def test_soft_iou_of_counted_classes_equals_loops():
    p, q = random_probabilities((4, 3, 5)).requires_grad_(), random_probabilities((4, 3, 5), seed=1)
    mask = torch.rand(2, 1, 4, 3, 5) > 0.3
    counted = torch.tensor([[True, False, True], [True, False, False]])
    loss = soft_iou_loss(p, q, mask, counted)
    by_hand = soft_iou_by_hand(p.detach().numpy(), q.numpy(), mask.numpy(), counted.tolist())
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    assert torch.equal(p.grad.flatten(2).any(2), counted)
    # Images on two devices, each with a mean of its own, are worth what they are worth in one batch.
    alone = [soft_iou_loss(p[i : i + 1], q[i : i + 1], mask[i : i + 1], counted[i : i + 1]) for i in range(2)]
    assert loss.item() == pytest.approx(sum(alone).item() / 2)
    counted[1] = False
    by_hand = soft_iou_by_hand(p.detach().numpy(), q.numpy(), mask.numpy(), counted.tolist())
    assert soft_iou_loss(p, q, mask, counted).item() == pytest.approx(by_hand)
    nothing = soft_iou_loss(p, q, mask, torch.zeros_like(counted))
    assert nothing.item() == 0.0
    (gradient,) = torch.autograd.grad(nothing, p)
    assert not gradient.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_tanimoto_equals_numpy_and_is_one_minus_iou_of_hard_predictions(shape):
    p, q = random_probabilities(shape), random_probabilities(shape, seed=1)
    mask = torch.rand(2, 1, *shape) > 0.3
    counted = torch.tensor([[True, False, True], [True, False, False]])
    a, b, m = (t.flatten(2).numpy() for t in (p, q, mask))
    overlap, extent = (a * b * m).sum(2), ((a**2 + b**2 - a * b) * m).sum(2)
    losses = 1 - (overlap + SMOOTH) / (extent + SMOOTH)
    assert tanimoto_loss(p, q, mask).item() == pytest.approx(losses.mean())
    by_hand = np.mean([losses[i][counted[i].numpy()].mean() for i in range(2)])
    assert tanimoto_loss(p, q, mask, counted).item() == pytest.approx(by_hand)
    first, second = ((t == t.amax(1, keepdim=True)).double() for t in (p, q))
    assert tanimoto_loss(first, second).item() == pytest.approx(soft_iou_loss(first, second).item())


def pushes(loss, structure, piece):
    """Gradients for the logits of branch 1, in the middle of a structure and of a false piece.

    Both are given by their probabilities in both branches.
    """
    z = torch.full((2, 1, 2, 32, 32), 0.0, dtype=torch.float64)
    z[:, :, 0] = 6.0
    for branch in range(2):
        for probability, place in ((structure[branch], np.s_[4:16, 4:16]), (piece[branch], np.s_[22:26, 22:26])):
            z[(branch, 0, 0, *place)] = -np.log(probability / (1 - probability))
    first, second = z[0].requires_grad_(), z[1]
    (gradient,) = torch.autograd.grad(loss(first.softmax(1), second.softmax(1)), first)
    # What descending does to the structure's channel.
    return -gradient[0, 1, 8, 8].item(), -gradient[0, 1, 24, 24].item()


def test_tanimoto_leaves_alone_what_both_predict_and_brings_together_what_they_do_not():
    """A false piece of 0.45 beside a structure of 0.9: a soft IoU makes it grow, although both agree on it."""
    assert pushes(soft_iou_loss, (0.9, 0.9), (0.45, 0.45))[1] > 1e-6, "this tests nothing"
    assert pushes(tanimoto_loss, (0.9, 0.9), (0.45, 0.45)) == (0.0, 0.0)
    structure, piece = pushes(tanimoto_loss, (0.7, 0.9), (0.45, 0.45))
    assert structure > 1e-6
    assert piece == 0.0
    assert pushes(tanimoto_loss, (0.9, 0.9), (0.45, 0.2))[1] < -1e-6
    assert pushes(tanimoto_loss, (0.9, 0.9), (0.2, 0.45))[1] > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest_is_the_first_of_the_largest(dtype):
    values = torch.randint(0, 4, (3, 5, 40, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    for dim in range(4):
        assert np.array_equal(likeliest(values, dim).numpy(), values.float().numpy().argmax(dim))


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_found_classes_equal_numpy(shape, has_regions):
    """A class that is likeliest at a single voxel is found, unless that voxel does not count."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = rng.normal(size=(2, 6, *shape)) - np.linspace(0, 4, 6).reshape(1, 6, *[1] * len(shape))
        mask = rng.random((2, 1, *shape)) > 0.5
        p = probabilities(torch.from_numpy(logits), has_regions)
        one_hot = logits > 0 if has_regions else logits == logits.max(1, keepdims=True)
        for m, expected in ((None, one_hot), (mask, one_hot & mask)):
            found = found_classes(p, has_regions, None if m is None else torch.from_numpy(m))
            assert np.array_equal(found.numpy(), expected.any(axis=tuple(range(2, logits.ndim))))
    assert not found.all(), "all classes are found: this tests nothing"
    assert found_classes(torch.full_like(p, torch.nan), has_regions).all()


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_soft_iou_module_on_label_maps(ignore_label):
    logits = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    target = torch.randint(0, 3 if ignore_label is None else 4, (2, 1, 6, 6)).to(torch.int16)
    keep = (target != 3).numpy()
    one_hot = np.stack([(target[:, 0] == k).numpy() for k in range(3)], 1).astype(float)
    p = np.exp(logits.numpy())
    expected = soft_iou_by_hand(p / p.sum(1, keepdims=True), one_hot, keep)
    assert SoftIoULoss(False, ignore_label)(logits, target).item() == pytest.approx(expected)


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_soft_iou_module_on_regions(ignore_label):
    logits = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    target = torch.rand(2, 2 + (ignore_label is not None), 6, 6) > 0.5
    keep = ~target[:, -1:].numpy() if ignore_label is not None else np.ones((2, 1, 6, 6), bool)
    expected = soft_iou_by_hand(1 / (1 + np.exp(-logits.numpy())), target[:, :2].numpy().astype(float), keep)
    assert SoftIoULoss(True, ignore_label)(logits, target).item() == pytest.approx(expected)


def test_probabilities_are_float32_under_autocast():
    logits = torch.randn(1, 3, 4, 4).to(torch.bfloat16)
    for regions in (True, False):
        assert probabilities(logits, regions).dtype == torch.float32


@pytest.mark.parametrize("shape", [(16, 24), (8, 16, 12)])
def test_downsampled_targets_equal_those_of_nnunets_loader(shape):
    target = torch.randint(0, 5, (2, 1, *shape)).to(torch.int16)
    scales = [[1.0] * len(shape), [0.5] * len(shape), [0.25] * len(shape)]
    shapes = [tuple(round(side * s) for side, s in zip(shape, scale)) for scale in scales]
    ours = downsample_target(target, shapes)
    transform = DownsampleSegForDSTransform(scales)
    for b in range(2):
        theirs = transform(segmentation=target[b])["segmentation"]
        for level in range(3):
            assert torch.equal(ours[level][b], theirs[level])
