"""The contrastive term: against loops, on its gradient, and on what it does to a toy feature space."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.losses.contrastive import class_prototypes, contrastive_loss, draw_voxels

SHAPES = [(6, 5), (3, 4, 5)]


def scene(shape, groups=1, classes=3, channels=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, channels, *shape, generator=generator, dtype=dtype)
    labels = torch.randint(0, classes, (2, groups, *shape), generator=generator)
    drawn = torch.rand(2, *shape, generator=generator)
    # Some voxels are neither.
    reliable, uncertain = drawn > 0.4, drawn < 0.3
    table = 0.2 + torch.rand(groups, classes, generator=generator, dtype=dtype)
    return features, labels, reliable, uncertain, table


def by_hand(features, labels, reliable, uncertain, table, margin):
    """The whole term in loops over voxels and classes, with every uncertain voxel."""
    f, y, r, u, w = (values.numpy() for values in (features, labels, reliable, uncertain, table))
    places = [(b, *place) for b in range(len(f)) for place in np.ndindex(*f.shape[2:])]
    unit = {p: f[(p[0], slice(None), *p[1:])] / np.linalg.norm(f[(p[0], slice(None), *p[1:])]) for p in places}
    total = 0.0
    for g in range(y.shape[1]):
        label = {p: y[(p[0], g, *p[1:])] for p in places}
        centers = {}
        for k in range(w.shape[1]):
            members = [unit[p] for p in places if r[p] and label[p] == k]
            if members:
                centers[k] = np.mean(members, axis=0)
        pulled = [p for p in places if u[p] and label[p] in centers]
        pulls = [w[g, label[p]] * np.sum((unit[p] - centers[label[p]]) ** 2) for p in pulled]
        pairs = [(j, k) for j in centers for k in centers if j < k]
        pushes = [max(0, margin - np.linalg.norm(centers[j] - centers[k])) ** 2 for j, k in pairs]
        total += (np.mean(pulls) if pulls else 0) + (np.mean(pushes) if pushes else 0)
    return total / y.shape[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("absent", [None, 1])
def test_equals_loops(shape, groups, absent):
    features, labels, reliable, uncertain, table = scene(shape, groups)
    if absent is not None:
        # The class is there, but nowhere reliable: it has no prototype.
        reliable &= (labels != absent).all(1)
    ours = contrastive_loss(features, labels, reliable, uncertain, table, num_points=10_000, margin=1.5)
    assert ours.item() == pytest.approx(by_hand(features, labels, reliable, uncertain, table, 1.5), rel=1e-9)
    assert ours.item() > 0


def test_prototypes_of_absent_classes_are_marked():
    features, labels, reliable, *_ = scene((6, 5))
    prototypes, present = class_prototypes(features, labels, reliable & (labels[:, 0] != 2), 4)
    assert present.tolist() == [[True, True, False, False]]
    assert not prototypes[0, 2:].any()


@pytest.mark.parametrize("case", ["nothing reliable", "nothing uncertain", "one class", "zero features"])
def test_degenerate_scenes_are_finite(case):
    features, labels, reliable, uncertain, table = scene((6, 5), dtype=torch.float32)
    if case == "nothing reliable":
        reliable[:] = False
    if case == "nothing uncertain":
        uncertain[:] = False
    if case == "one class":
        labels[:] = 0
    if case == "zero features":
        features[:] = 0
    features.requires_grad_()
    loss = contrastive_loss(features, labels, reliable, uncertain, table[:, : 1 if case == "one class" else 3], 50, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
    if case == "nothing reliable":
        assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_touch_the_sums(dtype):
    """More voxels per class than float16 can count, and features of zero."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 400, 400, generator=generator)
    features[..., :10] = 0
    labels = torch.arange(400).expand(2, 1, 400, 400) // 200
    reliable = torch.rand(2, 400, 400, generator=generator) > 0.2
    values, table = [], torch.ones(1, 2)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            generator = torch.Generator().manual_seed(1)
            values.append(contrastive_loss(features, labels, reliable, ~reliable, table, 50, 1.0, generator))
    assert torch.isfinite(values[1])
    assert torch.equal(*values)


def test_gradient_in_float64_reaches_reliable_and_uncertain_voxels():
    features, *others = scene((3, 4))
    features.requires_grad_()
    # All voxels are drawn, so the order of drawing does not matter.
    assert torch.autograd.gradcheck(lambda f: contrastive_loss(f, *others, 100, 1.9), (features,))
    contrastive_loss(features, *others, 100, 1.9).backward()
    size, (_, reliable, uncertain, _) = features.grad.norm(dim=1), others
    assert (size[reliable | uncertain] > 0).all()
    assert not size[~reliable & ~uncertain].any()


@pytest.mark.parametrize("count", [0, 3, 30])
def test_draws_candidates_only_and_each_once(count):
    candidates = torch.zeros(2, 50, dtype=torch.bool)
    candidates.view(-1)[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:count]] = True
    positions, valid = draw_voxels(candidates, 20, torch.Generator().manual_seed(1))
    chosen = positions[valid]
    assert len(chosen) == min(count, 20)
    assert candidates.view(-1)[chosen].all()
    assert len(chosen.unique()) == len(chosen)
    again = draw_voxels(candidates, 20, torch.Generator().manual_seed(1))[0]
    assert torch.equal(positions, again)


def test_drawing_is_uniform():
    candidates = torch.ones(1, 40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(40)
    for _ in range(2000):
        hits[draw_voxels(candidates, 10, generator)[0]] += 1
    # 500 expected, with a standard deviation of 19.
    assert (hits - 500).abs().max() < 100


def test_pulls_uncertain_points_to_their_class_and_pushes_prototypes_apart():
    """A few hundred steps on a toy feature space: three overlapping classes in the plane."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(60).view(1, 1, 1, -1)
    angles = 0.25 * labels[0, 0, 0] + 0.15 * torch.randn(180, generator=generator)
    features = torch.stack([angles.cos(), angles.sin()]).view(1, 2, 1, -1).clone().requires_grad_()
    reliable = (torch.arange(180) % 2 == 0).view(1, 1, -1)

    def state():
        centers, _ = class_prototypes(features, labels, reliable, 3)
        unit = (features / features.norm(dim=1, keepdim=True))[0, :, 0].T
        uncertain = ~reliable[0, 0]
        to_own = (unit - centers[0][labels[0, 0, 0]])[uncertain].norm(dim=1).mean().item()
        nearest = torch.cdist(unit, centers[0]).argmin(1)
        right = (nearest == labels[0, 0, 0])[uncertain].float().mean().item()
        return to_own, torch.pdist(centers[0]).min().item(), right

    before = state()
    optimizer = torch.optim.SGD([features], lr=5.0)
    for _ in range(300):
        optimizer.zero_grad()
        contrastive_loss(features, labels, reliable, ~reliable, torch.ones(1, 3), 64, 1.0, generator).backward()
        optimizer.step()
    after = state()
    assert before[1] < 0.3
    assert after[1] > 0.9, "prototypes are a margin of 1 apart"
    assert after[0] < 0.7 * before[0], "uncertain points are near their class"
    assert after[2] > max(0.95, before[2])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_class_that_only_an_annotated_image_shows_pulls_the_uncertain_voxels_of_another(groups):
    """Where every voxel of the unlabeled image is uncertain, true labels alone form prototypes."""
    features, _, _, _, table = scene((6, 5), groups)
    labels = torch.full((2, groups, 6, 5), 2)
    labels[0, :, :3] = 1
    annotated = torch.tensor([True, False]).view(2, 1, 1).expand(2, 6, 5)
    features.requires_grad_()
    contrastive_loss(features, labels, annotated, ~annotated, table, 100, 1.0).backward()
    assert (features.grad[1].norm(dim=0) > 0).all()
    features.grad = None
    contrastive_loss(features, labels, torch.zeros_like(annotated), ~annotated, table, 100, 1.0).backward()
    assert not features.grad.any()
