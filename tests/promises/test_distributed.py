"""Training in two processes over gloo, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from day import QUICK, Day
from torch import distributed as dist
from torch import multiprocessing

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.cli import main
from nnunet_ssl.demo.synthetic import Sizes, write_dataset
from nnunet_ssl.methods import TRAINERS, nnUNetTrainerICT
from nnunet_ssl.nnunet.trainers_folder import trainers_folder
from nnunet_ssl.runtime.distributed import device_of_process, local_rank, mean_over_ranks
from nnunet_ssl.testing.networks import differing, weights_of
from nnunet_ssl.testing.processes import free_port
from nnunet_ssl.testing.rank import part
from nnunet_ssl.testing.steps import break_losses, feed
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of, weighted
from nnunet_ssl.training.logger import TermLogger

NAMES = [t.__name__ for t in TRAINERS]
# What leaves a loss that is a mean over samples, or a Dice over the whole batch: without random draws and thresholds
# over a rank's own batch.
SEPARABLE = {
    "supervised_fraction": 0.0, "unlabeled_ramp": 0.0, "identity_probability": 1.0,
    "pseudo_label_weight": 0.0, "contrastive_weight": 0.0, "cutmix": "none", "dynamic_weight": 0.0,
    "feature_weight": 0.0, "noise_std": 0.0, "dropout": 0.0, "first_threshold": 1.0,
}  # fmt: skip
STEPS = 5


def separable(cls: type) -> dict[str, Any]:
    """``SEPARABLE``, and without mixtures of images of a rank's own batch."""
    return SEPARABLE | ({"consistency_weight": 0.0} if cls is nnUNetTrainerICT else {})


def gradients(trainer: Any, labeled: dict, unlabeled: dict) -> torch.Tensor:
    """Of one step, all networks' in a row."""
    weighted(trainer, step_of(trainer, labeled, unlabeled).losses).backward()
    parameters = [p for network in trainer.trained for p in bare(network).parameters()]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def train_whole(tiny: TinyDataset, cls: type, rank: int) -> dict[str, Any]:
    """A whole training with loaders; what rank 1 may not write fails."""
    import nnunet_ssl.training.monitor
    import nnunet_ssl.training.trainer as module

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a second process writes")

    if rank == 1:
        for name in ("write_checkpoint", "write_record", "note_validation", "note_costs", "Monitor"):
            setattr(module, name, refuse)
        nnunet_ssl.training.monitor._draw = refuse
        TermLogger.plot_progress_png = refuse
    trainer = tiny.trainer(cls, supervised_fraction=0.5, num_epochs=2, picture_every=1, learned_dice=0.1)
    steps: list[np.ndarray] = []
    train_step = trainer.train_step

    def recording(batch: dict) -> dict:
        output = train_step(batch)
        steps.append(output["terms"])
        return output

    trainer.train_step = recording
    trainer.run_training()
    names = trainer.logger.local_logger.step_names
    logged = [[trainer.logger.get_value(TermLogger.key(name), epoch) for name in names] for epoch in range(2)]
    resumed = tiny.trainer(cls, supervised_fraction=0.5, num_epochs=2, learned_dice=0.1)
    resumed.initialize()
    resumed.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    counts = {"whole": trainer.learned.counts, "resumed": resumed.learned.counts}
    return {
        "whole": weights_of(trainer), "resumed": weights_of(resumed), "steps": np.stack(steps), "logged": logged,
        "counts": counts,
    }  # fmt: skip


def work(rank: int, port: int, folder: str, tiny: TinyDataset, large: TinyDataset, name: str) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    cls = next(t for t in TRAINERS if t.__name__ == name)
    found: dict[str, Any] = {"mean": mean_over_ranks(torch.tensor([0.2, 0.9][rank]))}
    for dataset in (large, tiny):
        os.environ["nnUNet_preprocessed"] = str(dataset.root / "nnUNet_preprocessed")
        batches = torch.load(dataset.root / "batches.pt")
        trainer = dataset.initialized(cls, **separable(cls))
        found[f"gradients {len(dataset.patch)}"] = gradients(trainer, *(part(b, rank) for b in batches))
    trainer = tiny.initialized(cls, supervised_fraction=0.0)
    for step in range(STEPS):
        labeled, unlabeled = tiny.batches(trainer, seed=2 * step + rank)
        feed(trainer, unlabeled)
        trainer.train_step(labeled)
    found["after steps"] = weights_of(trainer)
    if rank == 1:
        # A broken image on one of them.
        break_losses(trainer)
    labeled, unlabeled = tiny.batches(trainer, seed=rank)
    feed(trainer, unlabeled)
    found["finite"] = trainer.train_step({**labeled, "keys": [f"case_of_rank_{rank}"]})["finite"]
    found["after a broken step"] = weights_of(trainer)
    if rank == 0:
        found["told"] = Path(trainer.log_file).read_text()
    found["draws"] = torch.rand(3, generator=trainer.generator)
    found |= train_whole(tiny, cls, rank)
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(f"pair of {name}")) for name in NAMES],
    ids=lambda name: name.removeprefix("nnUNetTrainer"),
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer's name, what both processes found, the gradients of one process, and the training's folder."""
    cls = next(t for t in TRAINERS if t.__name__ == request.param)
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(variable, str(folder / variable))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("nnUNet_compile", "0")
        tiny = TinyDataset(folder, PATCHES["2d"])
        large = TinyDataset(folder / "large", PATCHES["3d"])
        alone = {}
        for dataset in (tiny, large):
            patch.setenv("nnUNet_preprocessed", str(dataset.root / "nnUNet_preprocessed"))
            trainer = dataset.initialized(cls, **separable(cls))
            batches = dataset.batches(trainer)
            torch.save(batches, dataset.root / "batches.pt")
            alone[len(dataset.patch)] = gradients(trainer, *batches)
        patch.setenv("nnUNet_preprocessed", str(tiny.root / "nnUNet_preprocessed"))
        multiprocessing.spawn(work, (free_port(), str(folder), tiny, large, request.param), nprocs=2)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    (results,) = (folder / "nnUNet_results" / "Dataset900_Tiny").glob(f"{request.param}__*__2d/fold_0")
    return cls, found, alone, results


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_are_those_of_one_process_on_the_joined_batch(pair, dims):
    _, found, alone, _ = pair
    expected = alone[dims]
    assert expected.abs().max() > 0
    for rank in range(2):
        torch.testing.assert_close(found[rank][f"gradients {dims}"], expected, rtol=1e-3, atol=1e-6)


def test_both_processes_hold_the_same_weights(pair):
    _, found, _, _ = pair
    for state in ("after steps", "whole", "resumed"):
        assert not differing(found[0][state], found[1][state])
    assert not differing(found[0]["whole"], found[0]["resumed"])
    assert found[0]["mean"] == found[1]["mean"] == pytest.approx(0.55)


def test_both_processes_know_of_the_same_learned_structures(pair):
    cls, found, _, _ = pair
    for state in ("whole", "resumed"):
        counts = [f["counts"][state] for f in found]
        np.testing.assert_array_equal(counts[0], counts[1])
        assert counts[0].any() == bool(cls.unlabeled_terms)


def test_a_step_that_is_broken_on_one_is_skipped_by_both(pair):
    _, found, _, _ = pair
    assert [f["finite"] for f in found] == [False, False]
    for state in found:
        assert not differing(state["after a broken step"], state["after steps"])
    assert "case_of_rank_1" in found[0]["told"]
    assert "case_of_rank_0" not in found[0]["told"]


def test_the_number_on_this_machine_is_known_before_processes_join(monkeypatch):
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert not dist.is_initialized()
    assert local_rank() == 1
    assert device_of_process(torch.device("cuda")) == torch.device("cuda", 1)


def test_processes_draw_different_random_numbers(pair):
    _, found, _, _ = pair
    assert not torch.equal(found[0]["draws"], found[1]["draws"])


def test_logged_terms_are_means_over_both(pair):
    cls, found, _, _ = pair
    steps = np.stack([f["steps"] for f in found])
    expected = steps.reshape(2, 2, 2, -1).mean((0, 2))
    for rank in range(2):
        np.testing.assert_allclose(found[rank]["logged"], expected, rtol=1e-4, atol=1e-6)
    if cls.unlabeled_terms:
        assert not np.allclose(steps[0], steps[1], equal_nan=True)


def test_one_process_writes(pair):
    """The second one would have failed; and the first one has written."""
    cls, _, _, results = pair
    files = {p.name for p in results.iterdir()}
    assert {"checkpoint_final.pth", "nnunet_ssl.json"} <= files
    assert ("unlabeled_epoch_0001.png" in files) == cls.uses_unlabeled


@pytest.mark.slow
def test_torchrun_trains_on_two_nodes(tmp_path, executables):
    """Two torchrun "nodes" of one process each, as on two machines, with the whole of nnU-Net's training."""
    day = Day(tmp_path, 903, "Dataset903_Chest", executables)
    write_dataset(day.raw, Sizes(labeled=6, unlabeled=3, test=2, side=32))
    day.run("nnUNetv2_plan_and_preprocess", "-d", "903", "-c", "2d", "-np", "1", "-npfp", "1")
    small = ("-c", "2d", "--batch-size", "4", "--base-features", "4", "--max-features", "8")
    options = [w for setting in (*QUICK, "supervised_fraction=0") for w in ("--set", setting)]
    day.run("nnunet-ssl", "configure", "-d", "903", "-o", "Quick", *small, *options)
    day.run("nnunet-ssl", "preprocess", "-d", "903", "-c", "2d", "-p", "Quick", "-np", "1")
    train = ("nnunet-ssl", "train", "903", "2d", "0", "-p", "Quick", "-tr", "nnUNetTrainerDualNet", "-device", "cpu")
    assert "processes that torchrun starts" in day.run(*train, status=2)

    def start(program: Path, *options: str) -> list[str]:
        where = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
        port = ("--master-port", str(free_port()))
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *where, *port, "--node-rank", str(rank), "--no-python",
                 str(program), *train[1:], *options],
                env=day.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
            )
            for rank in range(2)
        ]  # fmt: skip
        outputs = [node.communicate(timeout=600)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
        return outputs

    outputs = start(Path(sys.executable).with_name(train[0]))
    folder = day.results / "nnUNetTrainerDualNet__Quick__2d" / "fold_0"
    assert {"checkpoint_final.pth", "nnunet_ssl.json", "progress.png"} <= {p.name for p in folder.iterdir()}
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    # Each had half of the plan's batch of 4.
    assert all("1 labeled + 1 unlabeled" in output for output in outputs)
    outputs = start(executables / train[0], "-pretrained_weights", str(folder / "checkpoint_final.pth"), "--val_best")
    assert all("Loading" in output for output in outputs)
    assert json.loads((folder / "nnunet_ssl.json").read_text())["validated_with"] == "checkpoint_best.pth"


def test_train_refuses_a_fold_that_is_none(tiny, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    (tiny.base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans))
    assert main(["train", "Dataset900_Tiny", "2d", "first", "-tr", "nnUNetTrainerSemiTC"]) == 2
    assert "The fold is 'first'" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (("-tr", "nnUNetTrainer", "-device", "cpu"), "is not a trainer of this package"),
    (("-tr", "nnUNetTrainerNone", "-device", "cpu"), "nnunet-ssl env"),
    (("-tr", "nnUNetTrainerSemiTC", "-p", "None"), "None.json is missing"),
])  # fmt: skip
def test_train_refuses_what_it_cannot_do(tiny, monkeypatch, capsys, words, message):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    assert main(["train", "Dataset900_Tiny", "2d", "0", *words]) == 2
    assert message in capsys.readouterr().err
