"""What a method declares, what the training does for it, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trainings import stop_at_epoch

from nnunet_ssl.blocks.companion import Companion
from nnunet_ssl.blocks.teacher import EMATeacher
from nnunet_ssl.cli import main
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import TRAINERS, nnUNetTrainerDualNet
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of
from nnunet_ssl.training import HyperParameters, MethodParameters, SemiSupervisedTrainer, Step, parameter
from nnunet_ssl.training.checkpoint import STATE_KEY


@dataclasses.dataclass(frozen=True)
class Parameters(MethodParameters):
    consistency_weight: float = parameter(1.0, "weight of the consistency term", minimum=0.0)
    head_weight: float = parameter(0.5, "weight of the head's term", minimum=0.0)


class Head(Companion):
    """A head on the logits, with a learning rate of its own and a number to remember."""

    learning_rate = 0.1

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 1, 1))
        self.steps = 0

    def after_step(self) -> None:
        self.steps += 1

    def memory(self) -> dict:
        return {"steps": self.steps}

    def recall(self, memory) -> None:
        self.steps = memory["steps"]


class nnUNetTrainerToy(SemiSupervisedTrainer[Parameters]):
    """A teacher, a partner and a head at once."""

    Parameters = Parameters
    unlabeled_terms = ("consistency", "consistency_partner")
    labeled_terms = ("head",)
    statistic_names = ("distance",)
    views = ("strong", "weak")

    def build(self) -> None:
        self.teacher = self.add("teacher", EMATeacher(self.network, self.architecture, 0.9))
        self.partner = self.add("partner", self.build_partner())
        self.head = self.add("head", Head(3))

    def labeled_losses(self, labeled, outputs):
        return {"head": (self.head(outputs[0][0]) - labeled.target.float()).square().mean()}

    def unlabeled_losses(self, labeled, unlabeled, outputs):
        target = self.probabilities(self.teacher(unlabeled.weak))
        distances = [(self.probabilities(n(unlabeled.strong)) - target).square().mean() for n in self.predictors]
        self.note("distance", distances[0].detach())
        return dict(zip(self.unlabeled_terms, distances))


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def all_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: flat(companion.module) for name, companion in trainer.companions.items()} | {
        "network": flat(trainer.network)
    }


def test_terms_are_named_after_the_networks(tiny):
    trainer = tiny.initialized(nnUNetTrainerToy)
    assert trainer.term_names == (
        "supervised", "supervised_partner", "head", "consistency", "consistency_partner",
    )  # fmt: skip
    assert trainer.trains("consistency") == ("network",)
    assert trainer.trains("consistency_partner") == ("partner",)
    assert len(trainer.trained) == 3
    assert len(trainer.predictors) == 2


def test_weights_of_a_companions_terms_are_the_networks_and_follow_the_ramp(tiny):
    trainer = tiny.initialized(nnUNetTrainerToy, unlabeled_ramp=0.5, consistency_weight=2.0)
    ramp = np.exp(-5)
    assert trainer.weight("consistency") == trainer.weight("consistency_partner") == pytest.approx(2 * ramp)
    assert trainer.weight("head") == 0.5, "labels are learned from the start"


def test_schedule_and_clip_of_every_trained_companion(tiny):
    trainer = tiny.initialized(nnUNetTrainerToy, supervised_fraction=0.5)
    groups = trainer.optimizer.param_groups
    owners = [trainer.network, trainer.partner.module, trainer.head.module]
    assert [{id(p) for p in group["params"]} for group in groups] == [{id(p) for p in n.parameters()} for n in owners]
    for epoch in range(4):
        trainer.lr_scheduler.step(epoch)
        rates = [group["lr"] for group in groups]
        assert rates[0] == rates[1] == pytest.approx(0.01 * (1 - (epoch % 2) / 2) ** 0.9)
        assert rates[2] == pytest.approx(0.1 * rates[0])
    labeled, unlabeled = tiny.batches(trainer)
    made = step_of(trainer, labeled, unlabeled)
    sum(1e3 * loss for loss in made.losses.values()).backward()
    norms = [torch.nn.utils.clip_grad_norm_(n.parameters(), 12) for n in owners]
    assert all(norm > 12 for norm in norms)
    for owner in owners:
        clipped = torch.stack([p.grad.norm() for p in owner.parameters() if p.grad is not None]).norm()
        assert clipped.item() == pytest.approx(12, rel=1e-3)


def test_stage_1_trains_on_labels_alone_and_the_teacher_follows(tiny):
    trainer = tiny.trainer(nnUNetTrainerToy, supervised_fraction=1.0, num_epochs=1)
    trainer.run_training()
    logged = {n: trainer.logger.get_value(f"ssl_{n}", step=-1) for n in (*trainer.term_names, "distance")}
    assert np.isnan([logged[n] for n in ("consistency", "consistency_partner", "distance")]).all()
    assert np.isfinite([logged[n] for n in ("supervised", "supervised_partner", "head")]).all()
    assert trainer.teacher.steps == trainer.head.steps == 2


def test_companions_follow_taken_steps_only(tiny):
    trainer = tiny.initialized(nnUNetTrainerToy)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)
    step = trainer.step
    for broken in (False, True, False):
        before = all_weights(trainer), trainer.head.steps
        trainer.step = lambda *batches, broken=broken: Step(
            {name: loss * (float("nan") if broken else 1.0) for name, loss in step(*batches).losses.items()},
            step(*batches).known,
        )
        assert trainer.train_step(labeled)["finite"] != broken
        after = all_weights(trainer), trainer.head.steps
        assert (before[1] == after[1]) == broken
        for name, weights in before[0].items():
            assert torch.equal(weights, after[0][name]) == broken, name


def test_an_overflow_of_float16_moves_no_companion(tiny, monkeypatch):
    """The gradient scaler skips such a step by itself, without a word."""
    trainer = tiny.initialized(nnUNetTrainerToy)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)
    step = trainer.step
    trainer.step = lambda *batches: step(*batches)._replace(
        losses={name: 1e3 * loss for name, loss in step(*batches).losses.items()}
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = all_weights(trainer)
    assert trainer.train_step(labeled)["finite"], "not the data's fault"
    assert all(torch.equal(weights, before[name]) for name, weights in all_weights(trainer).items())
    assert trainer.head.steps == trainer.teacher.steps == 0
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.train_step(labeled)
    assert trainer.head.steps == trainer.teacher.steps == 1


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stop_and_resume(tmp_path, monkeypatch, stop_after):
    found = []
    for stops in (False, True):
        tiny = TinyDataset(tmp_path / str(stops), PATCHES["2d"])
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(variable, str(tiny.root / variable))
        trainer = tiny.trainer(nnUNetTrainerToy, supervised_fraction=0.5)
        if stops:
            stop_at_epoch(trainer, stop_after)
            with pytest.raises(KeyboardInterrupt):
                trainer.run_training()
            torch.manual_seed(99)
            trainer = tiny.trainer(nnUNetTrainerToy, supervised_fraction=0.5)
            trainer.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
            assert trainer.head.steps == trainer.teacher.steps == 2 * stop_after
        trainer.run_training()
        found.append((all_weights(trainer), trainer.head.steps, trainer.teacher.steps))
    assert found[0][1:] == found[1][1:] == (8, 8)
    for name, weights in found[0][0].items():
        assert torch.equal(weights, found[1][0][name]), name


def test_what_a_checkpoint_holds_of_companions(tiny):
    trainer = tiny.trainer(nnUNetTrainerToy, num_epochs=1)
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    companions = checkpoint[STATE_KEY]["companions"]
    assert list(companions) == ["teacher", "partner", "head"]
    assert companions["head"]["architecture"] is None
    assert companions["head"]["memory"] == {"steps": 2}
    for name, companion in companions.items():
        saved = torch.cat([v.flatten() for v in companion["weights"].values()])
        mine = torch.cat([v.flatten() for v in trainer.companions[name].module.state_dict().values()])
        assert torch.equal(saved, mine)
    names = set(checkpoint["network_weights"])
    assert names == set(trainer.network.state_dict()), "the file predicts with the plan's network alone"


@pytest.mark.parametrize("name", ["teacher", "partner"])
def test_export_of_any_network_that_predicts(tiny, capsys, name):
    trainer = tiny.trainer(nnUNetTrainerToy, num_epochs=1)
    trainer.run_training()
    words = ["export", "-d", tiny.plans["dataset_name"], "-c", "2d", "-tr", "nnUNetTrainerToy"]
    assert main(words) == 2
    assert "holds the further networks teacher, partner. Name one with --network" in capsys.readouterr().err
    assert main([*words, "--network", "head"]) == 2
    assert "holds no network 'head' that can be exported; it holds teacher, partner" in capsys.readouterr().err
    assert main([*words, "--network", name]) == 0
    folder = Path(trainer.output_folder).parent
    target = folder.with_name(f"nnUNetTrainerToy{name.capitalize()}__nnUNetPlans__2d")
    weights = torch.load(target / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    expected = trainer.companions[name].module.state_dict()
    assert weights.keys() == expected.keys() == trainer.network.state_dict().keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_checkpoints_of_the_former_layout_are_refused(tiny, capsys):
    trainer = tiny.trainer(nnUNetTrainerDualNet, num_epochs=1)
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    state = content[STATE_KEY]
    state |= {"version": "0.1.0", "partner": state.pop("companions")["partner"]}
    torch.save(content, file)
    again = tiny.trainer(nnUNetTrainerDualNet, num_epochs=2)
    with pytest.raises(UserError, match=r"written by nnunet-ssl 0\.1\.0.*nnunet-ssl==0\.1\.0.*nnUNetv2_predict"):
        again.load_checkpoint(str(file))
    words = ["export", "-d", tiny.plans["dataset_name"], "-c", "2d", "-tr", "nnUNetTrainerDualNet"]
    assert main(words) == 2
    assert "written by nnunet-ssl 0.1.0" in capsys.readouterr().err
    assert not list(file.parents[2].glob("*Partner*")), "nothing is half-written"


# ---- what is refused where it is written, not hours later ----------------------------------------------------------


def test_a_term_needs_a_weight():
    with pytest.raises(TypeError, match="has a loss term 'agreement'; declare agreement_weight in Parameters"):

        class nnUNetTrainerBad(SemiSupervisedTrainer[Parameters]):
            Parameters = Parameters
            unlabeled_terms = ("consistency", "agreement")


def test_unlabeled_images_need_the_parameters_of_methods():
    with pytest.raises(TypeError, match="loads unlabeled images: derive HyperParameters from MethodParameters"):

        class nnUNetTrainerBad(SemiSupervisedTrainer[HyperParameters]):
            Parameters = HyperParameters


def test_a_step_without_what_is_known_is_an_error_at_its_line():
    with pytest.raises(TypeError, match="known"):
        Step({"supervised": torch.zeros(())})


def test_undeclared_terms_statistics_and_names_are_errors(tiny):
    trainer = tiny.initialized(nnUNetTrainerToy)
    with pytest.raises(ValueError, match="notes 'mean'; declare it in statistic_names"):
        trainer.note("mean", 1.0)
    with pytest.raises(ValueError, match="There is a network 'teacher' already"):
        trainer.add("teacher", Head(3))
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)
    made = step_of(trainer, labeled, unlabeled)
    trainer.step = lambda *_: made._replace(losses={"consistancy": made.losses["consistency"]})
    with pytest.raises(ValueError, match=r"gives \['consistancy'\]; declare them as terms"):
        trainer.train_step(labeled)


def test_a_misspelled_hyperparameter_is_a_type_error(tmp_path):
    from mypy import api

    file = tmp_path / "method.py"
    good = Path(__file__).with_name("typed_method.txt").read_text()
    for field, expected in (("agreement_weight", 0), ("agreement_wieght", 1)):
        file.write_text(good.replace("FIELD", field))
        said, _, status = api.run([str(file), "--ignore-missing-imports", "--follow-imports=silent"])
        assert status == expected, said
    assert '"Parameters" has no attribute "agreement_wieght"; maybe "agreement_weight"?' in said


def test_statistics_of_a_former_step_are_not_told_again(tiny):
    trainer = tiny.initialized(nnUNetTrainerToy)
    labeled, unlabeled = tiny.batches(trainer)
    trainer.dataloader_unlabeled = iter(lambda: unlabeled, None)
    index = trainer.logger.local_logger.step_names.index("distance")
    assert np.isfinite(trainer.train_step(labeled)["terms"][index])
    trainer.unlabeled_losses = lambda *_: {}
    assert np.isnan(trainer.train_step(labeled)["terms"][index])


@pytest.mark.parametrize("cls", TRAINERS, ids=lambda t: t.__name__)
def test_every_method_uses_labels_alone_in_stage_1(tiny, cls):
    trainer = tiny.initialized(cls, supervised_fraction=0.5)
    labeled, _ = tiny.batches(trainer)
    assert set(step_of(trainer, labeled, None).losses) == set(trainer.supervised_terms)
