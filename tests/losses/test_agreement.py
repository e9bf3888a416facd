"""Losses between two networks: against numpy, closed forms and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy as scipy_entropy

from nnunet_ssl.losses.agreement import (
    cosine_distance,
    entropy,
    kl_divergence,
    masked_mean,
    normalized_entropy,
    pseudo_label_cross_entropy,
    squared_distance,
    tempered_by_doubt,
    upper_threshold,
)
from nnunet_ssl.losses.predictions import grouped_labels, log_probabilities, target_maps

SHAPES = [(5, 7), (3, 4, 5)]
REGIONS = [False, True]


def logits_of(shape, channels=3, seed=0, scale=3.0):
    return torch.randn(2, channels, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def grouped(logits, regions, temperature=1.0):
    """Probabilities (B, G, K, *S) by scipy."""
    z = logits.numpy() / temperature
    if not regions:
        return softmax(z, axis=1)[:, None]
    sigmoid = 1 / (1 + np.exp(-z))
    return np.stack([1 - sigmoid, sigmoid], axis=2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regions", REGIONS)
def test_every_voxelwise_loss_equals_scipy(shape, regions):
    z, w = logits_of(shape), logits_of(shape, seed=1)
    log_p, log_q = log_probabilities(z, regions), log_probabilities(w, regions, temperature=0.5)
    p, q = grouped(z, regions), grouped(w, regions, 0.5)
    np.testing.assert_allclose(log_p.exp(), p, atol=1e-12)
    np.testing.assert_allclose(log_q.exp(), q, atol=1e-12)
    np.testing.assert_allclose(entropy(log_p), scipy_entropy(p, axis=2).mean(1), atol=1e-10)
    share = scipy_entropy(p, axis=2).mean(1) / np.log(p.shape[2])
    np.testing.assert_allclose(normalized_entropy(log_p), share, atol=1e-10)
    np.testing.assert_allclose(squared_distance(log_p, log_q), ((p - q) ** 2).sum(2).mean(1) / 2, atol=1e-10)
    np.testing.assert_allclose(kl_divergence(log_p, log_q), rel_entr(p, q).sum(2).mean(1), atol=1e-9)
    flat = [a.reshape(2, -1, *shape) for a in (p, q)]
    cosine = (flat[0] * flat[1]).sum(1) / np.linalg.norm(flat[0], axis=1) / np.linalg.norm(flat[1], axis=1)
    np.testing.assert_allclose(cosine_distance(log_p, log_q), 1 - cosine, atol=1e-10)
    labels = q.argmax(2)
    expected = np.zeros((2, *shape))
    for b in range(2):
        for place in np.ndindex(*shape):
            picked = [p[(b, g, labels[(b, g, *place)], *place)] for g in range(p.shape[1])]
            expected[(b, *place)] = -np.mean(np.log(picked))
    np.testing.assert_allclose(pseudo_label_cross_entropy(log_p, torch.from_numpy(labels)), expected, atol=1e-10)


@pytest.mark.parametrize("regions", REGIONS)
def test_gradients_in_float64(regions):
    z, w = (logits_of((2, 3), seed=s, scale=1.0).requires_grad_() for s in (0, 1))
    labels = log_probabilities(w.detach(), regions).argmax(2)
    mask = torch.rand(2, 2, 3) > 0.4

    def everything(a, b):
        log_p, log_q = log_probabilities(a, regions), log_probabilities(b, regions, 0.5)
        return (
            masked_mean(pseudo_label_cross_entropy(log_p, labels), mask)
            + cosine_distance(log_p, log_q).mean()
            + kl_divergence(log_p, log_q).mean()
            + entropy(log_p).mean()
            + squared_distance(log_p, log_q).mean()
            + normalized_entropy(log_p).mean()
        )

    assert torch.autograd.gradcheck(everything, (z, w))


@pytest.mark.parametrize("classes", [2, 3, 50])
def test_distance_and_entropy_do_not_fade_with_many_classes(classes):
    sure = torch.full((1, classes, 1, 1), -1e4)
    first, second = sure.clone(), sure.clone()
    first[:, 0] = second[:, 1] = 1e4
    first, second, even = (log_probabilities(z, False) for z in (first, second, torch.zeros_like(sure)))
    assert squared_distance(first, second).item() == pytest.approx(1)
    assert squared_distance(first, first).item() == 0
    assert normalized_entropy(even).item() == pytest.approx(1)
    assert normalized_entropy(first).item() == 0


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_threshold_equals_numpys_empirical_quantile(fraction, size):
    values = torch.rand(size, generator=torch.Generator().manual_seed(size))
    values[: size // 3] = values[0]
    expected = np.quantile(values.numpy(), fraction, method="inverted_cdf")
    assert upper_threshold(values, fraction).item() == expected


def test_threshold_of_more_voxels_than_float32_counts():
    count = 2**24 + 1000
    # A permutation of 0 .. count - 1, whose quantiles are known; steps through it hit every value once.
    values = (torch.arange(count, dtype=torch.int64) * 48271 % count).float()
    assert np.gcd(48271, count) == 1
    # float32 holds whole numbers of this size to +-1.
    assert upper_threshold(values.view(2, -1), 0.8).item() == pytest.approx(np.ceil(0.8 * count) - 1, abs=1)


def test_masked_mean_of_nothing_is_zero_without_gradient():
    values = torch.tensor([1.0, float("inf"), 3.0], requires_grad=True)
    mean = masked_mean(values, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0
    assert not values.grad.any()
    assert masked_mean(values.detach(), torch.tensor([True, False, True])).item() == 2


def test_target_maps_of_labels_and_regions_with_ignored_voxels():
    labels = torch.tensor([[[[0, 1], [2, 3]]]])
    maps, mask = target_maps(labels, 3, has_regions=False, ignore_label=3)
    assert maps[0, :, 0, 0].tolist() == [1, 0, 0]
    assert maps[0, :, 1, 0].tolist() == [0, 0, 1]
    assert mask[0, 0].tolist() == [[True, True], [True, False]]
    regions = torch.tensor([[[[1, 1]], [[0, 1]], [[0, 1]]]])
    maps, mask = target_maps(regions, 2, has_regions=True, ignore_label=9)
    assert maps.shape == (1, 2, 1, 2)
    assert mask[0, 0].tolist() == [[True, False]]
    assert target_maps(regions, 3, has_regions=True, ignore_label=None)[1] is None


def test_grouped_labels_are_those_of_the_target_maps():
    """Of classes and regions, with ignored voxels and without."""
    labels = torch.randint(0, 4, (2, 1, 5, 4))
    regions = torch.randint(0, 2, (2, 3, 5, 4))
    for target, has_regions, ignore in ((labels, False, 3), (labels, False, None), (regions, True, 9)):
        found, annotated = grouped_labels(target, has_regions, ignore)
        maps, mask = target_maps(target, 2 if has_regions else 4, has_regions, ignore)
        wanted = maps.long() if has_regions else maps.argmax(1, keepdim=True)
        assert torch.equal(annotated, torch.ones_like(annotated) if mask is None else mask[:, 0])
        assert torch.equal(found, torch.where(annotated[:, None], wanted, 0))


EXTREME = {
    "constant": lambda z: z * 0 + 5,
    "+-1e4": lambda z: torch.sign(z) * 1e4,
    "one hot": lambda z: (z > 0) * 1e4,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("channels", [1, 2, 100])
@pytest.mark.parametrize("regions", REGIONS)
def test_extreme_logits_give_finite_values_and_gradients(dtype, name, channels, regions):
    z = EXTREME[name](logits_of((4, 5), channels)).to(dtype).requires_grad_()
    w = EXTREME[name](logits_of((4, 5), channels, seed=1)).to(dtype)
    log_p, log_q = log_probabilities(z, regions), log_probabilities(w, regions, 0.5)
    assert log_p.dtype == torch.float32
    labels = log_q.argmax(2)
    values = [
        entropy(log_p).mean(),
        pseudo_label_cross_entropy(log_p, labels).mean(),
        cosine_distance(log_p, log_q).mean(),
        kl_divergence(log_p, log_q).mean(),
        squared_distance(log_p, log_q).mean(),
        *([normalized_entropy(log_p).mean()] if log_p.shape[2] > 1 else []),
    ]
    sum(values).backward()
    assert all(torch.isfinite(v) for v in values)
    assert torch.isfinite(z.grad).all()


def test_log_softmax_agrees_with_scipy_where_probabilities_underflow():
    z = torch.tensor([[500.0, -500.0, 0.0]]).view(1, 3, 1, 1)
    np.testing.assert_allclose(log_probabilities(z, False)[0, 0, :, 0, 0], log_softmax([500.0, -500.0, 0.0]))


# Student's and teacher's probability of the class that the teacher takes for right, and the weight exp(-KL(q || p)).
DOUBT = [
    (0.9, 0.9, 1.00), (0.9, 0.99, 0.93), (0.5, 0.99, 0.53), (0.5, 0.9, 0.69), (0.1, 0.99, 0.11), (0.9, 0.6, 0.73),
    (0.2, 0.9, 0.32), (0.99, 0.9, 0.87),
]  # fmt: skip


def pair(first: float) -> torch.Tensor:
    """Logarithms of the probabilities of two classes at one voxel, (1, 1, 2, 1)."""
    return torch.tensor([first, 1 - first], dtype=torch.float64).log().view(1, 1, 2, 1)


@pytest.mark.parametrize(("student", "teacher", "weight"), DOUBT)
def test_doubt_is_the_divergence_of_the_student_from_the_teacher(student, teacher, weight):
    doubt = kl_divergence(pair(teacher), pair(student))
    assert torch.exp(-doubt).item() == pytest.approx(weight, abs=0.006)
    with_loss, without = (tempered_by_doubt(torch.full_like(doubt, loss), doubt) for loss in (1.0, 0.0))
    assert (with_loss - without).item() == pytest.approx(weight, abs=0.006)
    assert without.item() == pytest.approx(doubt.item())


def test_a_sure_teacher_weighs_more_the_nearer_the_student_is():
    weights = [torch.exp(-kl_divergence(pair(0.99), pair(p))).item() for p in (0.05, 0.2, 0.5, 0.8, 0.95)]
    assert weights == sorted(weights)
    # Beside one who is not sure, with a student who is.
    sure, unsure = (torch.exp(-kl_divergence(pair(q), pair(0.95))).item() for q in (0.99, 0.6))
    assert sure > unsure


@pytest.mark.parametrize("start", [0.02, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("teacher", [0.6, 0.9, 0.999])
def test_doubt_does_not_keep_a_student_from_the_teachers_label(start, teacher):
    """Gradient steps on one voxel's logit lead to the right answer, never away from it."""
    logit = torch.tensor(np.log(start / (1 - start)), requires_grad=True)
    values = []
    for _ in range(400):
        log_p = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0).view(1, 1, 2, 1)
        loss = tempered_by_doubt(-log_p[:, 0, 0], kl_divergence(pair(teacher), log_p)).sum()
        (gradient,) = torch.autograd.grad(loss, logit)
        logit = (logit - 0.5 * gradient).detach().requires_grad_()
        values.append(torch.sigmoid(logit).item())
    assert values[-1] > max(0.6, teacher - 0.03)
    assert values[0] > start or start >= teacher
