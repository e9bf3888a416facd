"""UniMatch: both strong views and the dropped features against an independent computation."""

from __future__ import annotations

import pytest
import torch
from reference_loss import arrays, reference_loss
from scipy.special import expit, softmax
from told_networks import Spy, has_gradient

from nnunet_ssl.methods import fix_match, nnUNetTrainerUniMatch
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of
from nnunet_ssl.transforms import mixing


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerUniMatch:
    return tiny.initialized(nnUNetTrainerUniMatch, **ssl)


@pytest.mark.parametrize("scenario", ["labels", "regions"])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@torch.no_grad()
def test_terms_equal_an_independent_computation(tmp_path, monkeypatch, patch, scenario):
    tiny = TinyDataset(tmp_path, PATCHES[patch], scenario=scenario)
    regions, threshold = tiny.has_regions, 0.6 if scenario == "regions" else 0.5
    trainer = initialized(tiny, sure_from=threshold)
    labeled, unlabeled = tiny.batches(trainer)
    boxes = [mixing.cutmix_boxes(2, tiny.patch, 0.5, torch.Generator().manual_seed(s)) for s in (1, 2)]
    drawn, order = iter(boxes), []
    monkeypatch.setattr(mixing, "cutmix_boxes", lambda *a: next(drawn))
    monkeypatch.setattr(fix_match, "strong_intensities", lambda x, *a, **k: order.append(x) or 2 * x)
    perturbed = torch.randn(2, 3 - regions, *tiny.patch)
    seen = []
    lower = [perturbed[(..., *[slice(step // 2, None, step) for _ in tiny.patch])] for step in (1, 2)]
    if patch != "anisotropic":
        outputs = [*lower, lower[1]]
        monkeypatch.setattr(trainer, "dropout", lambda *a: seen.append(a) or outputs)
    losses = step_of(trainer, labeled, unlabeled).losses

    assert [torch.equal(x, unlabeled[v]) for x, v in zip(order, ("strong", "strong_2"))] == [True, True]
    z = trainer.network(unlabeled["weak"])[0].numpy()
    p = expit(abs(z)).min(1, keepdims=True) if regions else softmax(z, 1).max(1, keepdims=True)
    labels = torch.from_numpy(z > 0) if regions else torch.from_numpy(z.argmax(1)[:, None])
    if regions:
        labels[:, 0] |= labels[:, 1]
    sure = torch.from_numpy(p >= threshold)
    assert 0.02 < sure.float().mean() < 0.98
    total = 0.0
    for view, box in zip(("strong", "strong_2"), boxes):
        mixed, wanted, counted = (torch.where(box, x.flip(0), x) for x in (2 * unlabeled[view], labels, sure))
        total += reference_loss(arrays(trainer.network(mixed)), wanted.numpy(), counted.numpy(), regions)
    assert losses["pseudo_label"].item() == pytest.approx(total, rel=1e-4)
    if patch != "anisotropic":
        ((images, generator),) = seen
        assert torch.equal(images, unlabeled["weak"])
        assert generator is trainer.generator
        expected = reference_loss(arrays(outputs), labels.numpy(), sure.numpy(), regions)
        assert losses["feature"].item() == pytest.approx(expected, rel=1e-4)


def test_every_skip_loses_about_half_of_its_channels_in_one_pass_alone(tiny):
    trainer = initialized(tiny, sure_from=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    skips: list[list[torch.Tensor]] = []
    trainer.network.decoder.register_forward_pre_hook(lambda m, inputs: skips.append(inputs[0]))
    spy = Spy(trainer.network)
    step_of(trainer, labeled, unlabeled)
    # Labels, both strong views, dropped features; then labels of the weak view.
    assert [kept for _, kept in spy.passes] == [True, True, True, True, False]
    assert [torch.equal(spy.passes[i][0], unlabeled["weak"]) for i in (3, 4)] == [True, True]
    dropped = [torch.cat([(s == 0).flatten(2).all(2).flatten() for s in features]) for features in skips]
    assert [bool(d.any()) for d in dropped] == [False, False, False, True, False]
    assert 0.25 < dropped[3].float().mean() < 0.75
    assert all((s == 0).flatten(2).all(2).any() for s in skips[3])


@pytest.mark.parametrize("term", nnUNetTrainerUniMatch.unlabeled_terms)
def test_the_network_learns_from_each_term_and_an_averaged_one_never(tiny, term):
    trainer = initialized(tiny, sure_from=0.0, teacher_decay=0.9)
    labeled, unlabeled = tiny.batches(trainer)
    step_of(trainer, labeled, unlabeled).losses[term].backward()
    assert has_gradient(trainer.network)
    assert not has_gradient(trainer.teacher.module)


def test_weights_are_those_of_the_paper_over_one_half(tiny):
    trainer = initialized(tiny, unlabeled_ramp=0.0)
    assert [trainer.weight(name) for name in trainer.unlabeled_terms] == [0.25, 0.5]


def test_what_is_set_for_fixmatch_is_read(tiny):
    tiny.plans["ssl"] |= {"FixMatch": {"sure_from": 0.6, "pseudo_label_weight": 0.1}, "UniMatch": {"dropout": 0.2}}
    trainer = initialized(tiny)
    assert (trainer.hp.sure_from, trainer.hp.pseudo_label_weight, trainer.dropout.rate) == (0.6, 0.1, 0.2)
