"""Stored pseudo-labels, and how they come into a batch."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_ssl.data.batches import Unlabeled
from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset, make_unlabeled_loader
from nnunet_ssl.data.preprocessing import UNLABELED_SUFFIX
from nnunet_ssl.data.pseudo_labels import UNCERTAIN, PseudoLabels, as_learned, as_stored, likeliest
from nnunet_ssl.data.views import PSEUDO_LABELS, VIEWS, Views, check_views
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerSelfTraining
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

_spec = importlib.util.spec_from_file_location("of_views", Path(__file__).with_name("test_views.py"))
of_views = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(of_views)


def test_a_stored_map_knows_labels_and_where_they_are_uncertain():
    rng = np.random.default_rng(0)
    labels, uncertain = rng.integers(0, 200, (4, 5, 6)), rng.random((4, 5, 6)) < 0.3
    stored = as_stored(labels, uncertain)
    assert stored.dtype == np.int16
    np.testing.assert_array_equal(likeliest(stored), labels)
    np.testing.assert_array_equal(as_learned(stored), np.where(uncertain, UNCERTAIN, labels))


# ---- in a batch -----------------------------------------------------------------------------------------------------


def with_labels(kind: str, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An example of test_views, with pseudo-labels as the segmentation's last channel, partly uncertain."""
    data = of_views.example(kind)
    rng = np.random.default_rng(seed)
    blocks = [max(1, side // 8) for side in data["image"].shape[1:]]
    coarse = rng.integers(-1, 4, [-(-side // b) for side, b in zip(data["image"].shape[1:], blocks)])
    labels = np.where(coarse < 0, UNCERTAIN, coarse)
    for axis, block in enumerate(blocks):
        labels = labels.repeat(block, axis)
    labels = labels[tuple(slice(side) for side in data["image"].shape[1:])]
    channel = torch.from_numpy(labels[None].astype(np.int16))
    return data | {"segmentation": torch.cat([data["segmentation"], channel])}, channel


def seeded(make, data: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    np.random.seed(seed)
    torch.manual_seed(seed)
    return make(**{name: value.clone() for name, value in data.items()})


@pytest.mark.parametrize("kind", of_views.KINDS)
def test_pseudo_labels_are_moved_as_nnunet_moves_labels(kind):
    """To the bit, and the views stay what they are without them."""
    for seed in range(8):
        data, _ = with_labels(kind, seed)
        expected = seeded(of_views.nnunets(kind, geometry=0.7), data, seed)
        made = seeded(Views(of_views.nnunets(kind, geometry=0.7), ("strong", "weak", PSEUDO_LABELS)), data, seed)
        assert list(made) == ["strong", "weak", PSEUDO_LABELS]
        assert torch.equal(made[PSEUDO_LABELS], expected["segmentation"][-1:])
        assert torch.equal(made["strong"], expected["image"])
        assert set(made[PSEUDO_LABELS].unique().tolist()) <= {UNCERTAIN, 0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["2d", "3d", "anisotropic"])
def test_pseudo_labels_lie_where_the_image_shows_them(kind):
    """An image of the labels themselves: most voxels of the moved image still show the moved label."""
    for seed in range(5):
        data, labels = with_labels(kind, seed)
        data["image"] = labels.float().repeat(2, *[1] * (labels.ndim - 1))
        made = seeded(Views(of_views.nnunets(kind, geometry=1.0), ("weak", PSEUDO_LABELS)), data, seed)
        image, moved = made["weak"][1], made[PSEUDO_LABELS][0]
        assert ((image - moved).abs() < 0.5).float().mean() > (0.75 if kind == "2d" else 0.6)
        shifted = moved.roll(moved.shape[-1] // 3, -1)
        assert ((image - shifted).abs() < 0.5).float().mean() < 0.5


def test_views_know_pseudo_labels_but_not_alone():
    assert check_views((PSEUDO_LABELS, "strong")) == ("strong", PSEUDO_LABELS)
    with pytest.raises(UserError, match="and maybe 'pseudo_labels' besides"):
        check_views((PSEUDO_LABELS,))


@pytest.mark.parametrize("patch", PATCHES)
def test_the_loader_cuts_labels_out_where_it_cuts_out_the_image(tmp_path, patch):
    """The image shows which voxel is which; outside of it is background, as in nnU-Net's labels."""
    tiny = TinyDataset(tmp_path, PATCHES[patch])
    larger = tuple(side if side == 1 else side + 7 for side in tiny.shape)
    numbers = np.arange(1, np.prod(larger) + 1).reshape(larger)
    labels = PseudoLabels(tmp_path / "labels")
    labels.start({})
    stored = as_stored(numbers % 3, numbers % 7 == 0)
    labels.write_case("hid_0", stored, {}, tiny.patch)
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", numbers[None].astype(np.float32))
    dataset = UnlabeledDataset([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")])
    manager = tiny.trainer(nnUNetTrainerSelfTraining).label_manager
    size = tuple(side + 4 for side in tiny.patch)
    loader = UnlabeledDataLoader(
        dataset, 2, size, tiny.patch, manager, views=("strong", PSEUDO_LABELS), pseudo_labels=labels
    )
    padded = 0
    for _ in range(10):
        batch = next(loader)
        assert batch[PSEUDO_LABELS].shape == (2, 1, *size)
        seen = batch["strong"].numpy().astype(int)
        expected = np.where(seen % 7 == 0, UNCERTAIN, seen % 3)
        expected[seen == 0] = 0
        np.testing.assert_array_equal(batch[PSEUDO_LABELS].numpy(), expected)
        padded += (seen == 0).any()
    assert padded, "no patch hangs over the border"


@pytest.mark.parametrize("patch", PATCHES)
def test_a_training_gets_labels_of_its_patches(tmp_path, patch):
    tiny = TinyDataset(tmp_path, PATCHES[patch], channels=2)
    tiny.plans["configurations"][tiny.configuration]["use_mask_for_norm"] = [True, False]
    # They were preprocessed without a mask.
    shutil.rmtree(f"{tiny.folder}{UNLABELED_SUFFIX}")
    trainer = tiny.trainer(nnUNetTrainerSelfTraining)
    trainer.on_train_start()
    settings = dataclasses.replace(trainer.loader_settings(), views=(*VIEWS, PSEUDO_LABELS))
    loader = make_unlabeled_loader(trainer.unlabeled_cases, settings)
    for _ in range(5):
        batch = Unlabeled.of(next(loader)).to(torch.device("cpu"))
        assert batch.pseudo_labels.shape == (len(batch.keys), 1, *tiny.patch)
        assert batch.pseudo_labels.dtype == torch.int16
        assert set(batch.pseudo_labels.unique().tolist()) <= {UNCERTAIN, 0, 1, 2}
        assert list(batch.views) == [*VIEWS, PSEUDO_LABELS]
