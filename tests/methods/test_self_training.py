"""What SelfTraining alone does; leaks are in tests/cli/test_pseudo_label.py, its loss in tests/nnunet/test_loss.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.data.pseudo_labels import UNCERTAIN, PseudoLabels, as_stored
from nnunet_ssl.methods import nnUNetTrainerSelfTraining
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.networks import weights_of
from nnunet_ssl.testing.steps import feed
from nnunet_ssl.testing.tiny import TinyDataset, step_of
from nnunet_ssl.testing.whole import train


def rewritten(tiny: TinyDataset, change) -> None:
    """Other pseudo-labels: what ``change`` makes of the stored ones."""
    tiny.write_pseudo_labels(0, "round_1")
    labels = PseudoLabels.of(str(tiny.folder), 0, "round_1")
    for file in labels.folder.glob("*.b2nd"):
        stored = change(labels.load(file.stem)[:])
        labels.write_case(file.stem, stored, labels.scores(file.stem), tiny.patch)


def trained(bench: Bench, change=None) -> dict[str, torch.Tensor]:
    with bench.data() as tiny:
        if change is not None:
            rewritten(tiny, change)
        return train(tiny.trainer(nnUNetTrainerSelfTraining, num_epochs=2))


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scenario", ["labels", "regions", "ignore", "regions and ignore"])
def test_pseudo_labels_train_and_uncertain_ones_do_not(tmp_path, scenario):
    """A step on uncertain voxels alone is one that gives pseudo-labels no weight."""
    bench, found = Bench(tmp_path / "bench"), []
    for weight, uncertain in ((0.0, False), (1.0, True), (1.0, False)):
        with bench.data(scenario=scenario) as tiny:
            trainer = tiny.initialized(nnUNetTrainerSelfTraining, pseudo_label_weight=weight)
        labeled, unlabeled = tiny.batches(trainer)
        if uncertain:
            unlabeled["pseudo_labels"][...] = UNCERTAIN
        feed(trainer, unlabeled)
        trainer.train_step(labeled)
        found.append(weights_of(trainer))
    without, all_uncertain, with_labels = found
    assert equal(without, all_uncertain)
    assert not equal(without, with_labels)


def test_what_is_stored_under_uncertain_voxels_changes_nothing(tmp_path):
    bench = Bench(tmp_path / "bench")
    others = trained(bench, lambda stored: np.where(stored < 0, -1 - (-stored) % 3, stored).astype(np.int16))
    assert equal(trained(bench), others)
    assert not equal(trained(bench), trained(bench, lambda stored: np.where(stored < 0, stored, (stored + 1) % 3)))


def test_the_share_of_voxels_that_count_is_told(tiny):
    trainer = tiny.initialized(nnUNetTrainerSelfTraining)
    labeled, unlabeled = tiny.batches(trainer)
    unlabeled["pseudo_labels"][...] = 1
    unlabeled["pseudo_labels"][..., : tiny.patch[-1] // 4] = UNCERTAIN
    step_of(trainer, labeled, unlabeled)
    assert float(trainer._statistics["certain"]) == pytest.approx(0.75)


def test_true_labels_as_pseudo_labels_are_learned_like_labels(tmp_path):
    """The same images, target and network: the same loss."""
    with Bench(tmp_path).data() as tiny:
        trainer = tiny.initialized(nnUNetTrainerSelfTraining, strength=0.0)
    labeled, unlabeled = tiny.batches(trainer)
    size = min(len(labeled["data"]), len(unlabeled["strong"]))
    labeled = {name: labeled[name][:size] for name in ("data", "target", "keys")}
    unlabeled |= {"strong": labeled["data"], "pseudo_labels": labeled["target"]}
    losses = step_of(trainer, labeled, unlabeled).losses
    torch.testing.assert_close(losses["pseudo_label"], losses["supervised"])


def test_pseudo_labels_of_a_name_are_those_of_the_hyper_parameter(tiny):
    tiny.write_pseudo_labels(0, "mine")
    cases = PseudoLabels.of(str(tiny.folder), 0, "mine")
    kept = cases.manifest()
    empty = as_stored(np.zeros(tiny.shape), np.zeros(tiny.shape, bool))
    for case in kept["cases"]:
        cases.write_case(case, empty, {"kept": case == "un_2", "why": ""}, tiny.patch)
    cases.finish(list(kept["cases"]), kept["preprocessing"], kept["learned_from"])
    trainer = tiny.trainer(nnUNetTrainerSelfTraining, labels="mine", num_epochs=1)
    trainer.on_train_start()
    assert [case.identifier for case in trainer.unlabeled_cases] == ["un_2"]
    assert trainer.record()["pseudo_labels_know"] == sorted(tiny.labeled)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_pseudo_labeled_images_alone_are_changed_further(tmp_path, strength):
    with Bench(tmp_path / "bench").data() as tiny:
        trainer = tiny.initialized(nnUNetTrainerSelfTraining, strength=strength)
    labeled, unlabeled = tiny.batches(trainer)
    feed(trainer, unlabeled)
    seen = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    trainer.step(*trainer.batches(labeled))
    assert torch.equal(seen[0], labeled["data"])
    assert torch.equal(seen[1], unlabeled["strong"]) == (strength == 0.0)
