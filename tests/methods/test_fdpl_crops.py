"""FDPL's larger patches: what the loader cuts out, and what shifted crops show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset
from nnunet_ssl.methods import nnUNetTrainerFDPL
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset, step_of
from nnunet_ssl.transforms import mixing


def initialized(tiny: TinyDataset, **ssl) -> nnUNetTrainerFDPL:
    """In its second stage from the start."""
    return tiny.initialized(nnUNetTrainerFDPL, **{"supervised_fraction": 0.0, **ssl})


@pytest.mark.parametrize(("median", "margin"), [((64, 64), (4, 4)), ((36, 40), (2, 4)), ((31, 34.5), (0, 1))])
def test_the_shift_stays_where_images_have_room(tiny, median, margin):
    tiny.plans["configurations"]["2d"]["median_image_size_in_voxels"] = list(median)
    assert tiny.trainer(nnUNetTrainerFDPL).unlabeled_margin == margin


@pytest.mark.parametrize(("side", "warned"), [(32, True), (40, False)])
def test_the_log_says_where_dynamic_labels_equal_the_fixed_ones(tiny, side, warned):
    tiny.plans["configurations"]["2d"]["median_image_size_in_voxels"] = [side, side]
    trainer = initialized(tiny)
    assert ("dynamic pseudo-labels equal the fixed ones" in Path(trainer.log_file).read_text()) == warned


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("larger", [-5, 0, 3, 40])
def test_crops_show_what_nnunets_patches_show_and_padding_never_wraps(tmp_path, patch, larger):
    """Images of their own coordinates, smaller and larger than the patch: every voxel tells where it is."""
    tiny = TinyDataset(tmp_path, PATCHES[patch], channels=len(PATCHES[patch]))
    shape = tuple(max(2, side + larger) for side in tiny.patch)
    axes = torch.meshgrid(*[torch.arange(side) + 1.0 for side in shape], indexing="ij")
    image = torch.stack(axes).view(len(shape), *(() if len(shape) == 3 else (1,)), *shape).numpy()
    tiny._write_blosc(Path(f"{tiny.folder}_unlabeled") / "un_0.b2nd", image)
    trainer = initialized(tiny)
    dataset = UnlabeledDataset([c for c in trainer.find_unlabeled_cases() if c.identifier == "un_0"])
    margin, sizes = trainer.unlabeled_margin, trainer.unlabeled_patch_size
    loader = UnlabeledDataLoader(dataset, 1, sizes, tiny.patch, trainer.label_manager)
    stock = UnlabeledDataLoader(dataset, 1, tiny.patch, tiny.patch, trainer.label_manager)
    starts, stock_starts, generator = set(), set(), np.random.default_rng(0)
    for _ in range(60):
        data = loader.generate_train_batch()["strong"]
        center = mixing.shifted_crop(data, margin, [0] * len(margin))[0]
        origin = origin_of(center)
        starts.add(origin[-1])
        stock_starts.add(origin_of(stock.generate_train_batch()["strong"][0])[-1])
        shift = mixing.draw_shift(margin, generator)
        crop = mixing.shifted_crop(data, margin, shift)[0]
        for start, shown in ((origin, center), (tuple(o + s for o, s in zip(origin, shift)), crop)):
            places = torch.stack(
                torch.meshgrid(*[torch.arange(s) + o for s, o in zip(tiny.patch, start)], indexing="ij")
            )
            sides = torch.tensor(shape).view(-1, *[1] * len(shape))
            inside = ((places >= 0) & (places < sides)).all(0)
            assert torch.equal(shown, torch.where(inside, places + 1, 0).float())
    # The center crop lies where nnU-Net would put it, up to the border.
    if larger < 10:
        assert starts == stock_starts
    else:
        assert min(starts) < 6
        assert max(starts) > larger - 6


def origin_of(crop: torch.Tensor) -> tuple[int, ...]:
    """Where a crop of an image of coordinates starts in it, from any voxel that is not padding."""
    place = crop[0].nonzero()[0].tolist()
    return tuple(int(crop[(axis, *place)]) - 1 - q for axis, q in enumerate(place))


def test_the_loader_cuts_out_what_nnunet_would_for_the_larger_patch(tiny, monkeypatch):
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

    from nnunet_ssl.data import loader as unlabeled_data

    made = []
    monkeypatch.setattr(unlabeled_data, "in_background_workers", lambda loader, *_: made.append(loader))
    trainer = initialized(tiny, rotation_degrees=15)
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    unlabeled_data.make_unlabeled_loader(trainer.find_unlabeled_cases(), trainer.loader_settings())
    angles = [(-np.pi / 12, np.pi / 12)] * 3
    assert tuple(made[0].patch_size[1:]) == tuple(get_patch_size((40, 40), *angles, (0.85, 1.25)))
    assert tuple(made[0].final_patch_size[1:]) == tiny.patch
    assert made[0].generate_train_batch()["strong"].shape == (2, 1, 40, 40)


def test_the_shift_follows_from_seed_and_step_alone(tiny, monkeypatch):
    """So a resumed training draws as one that was not stopped, and each process draws for itself."""
    draw, drawn = mixing.draw_shift, []
    monkeypatch.setattr(mixing, "draw_shift", lambda *a: drawn.append(draw(*a)) or drawn[-1])

    def shifts(seed: int) -> list[tuple[int, ...]]:
        drawn.clear()
        trainer = initialized(tiny)
        trainer.generator.manual_seed(seed)
        for epoch, iteration in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)):
            trainer.current_epoch, trainer._iterations_done_in_epoch = epoch, iteration
            step_of(trainer, *tiny.batches(trainer))
            # What else has been drawn does not matter.
            torch.rand(3, generator=trainer.generator)
        return list(drawn)

    assert shifts(1) == shifts(1)
    assert len(set(shifts(1))) > 1
    assert shifts(1) != shifts(2)
