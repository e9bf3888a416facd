"""Views of an unlabeled image: geometry once, intensities once per strong view."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.data.cases import UnlabeledCase
from nnunet_ssl.data.loader import UnlabeledDataLoader, UnlabeledDataset
from nnunet_ssl.data.views import VIEWS, Views
from nnunet_ssl.errors import UserError
from nnunet_ssl.methods import nnUNetTrainerDualNet
from nnunet_ssl.testing.tiny import PATCHES, TinyDataset

# Two channels, of which the first is normalized inside the mask; two labels of the previous stage.
LABELS = (1, 2)
KINDS = [*PATCHES, "cascade"]
EVERY_SUBSET = [names for number in (1, 2, 3) for names in itertools.combinations(VIEWS, number)]


def nnunets(kind: str, *, geometry: float | None = None, intensities: float | None = None) -> ComposeTransforms:
    """nnU-Net's transforms for training; None leaves its probabilities as they are."""
    patch = PATCHES["3d" if kind == "cascade" else kind]
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-0.5, 0.5), None, tuple(range(len(patch))), kind == "anisotropic", use_mask_for_norm=[True, False],
        is_cascaded=kind == "cascade", foreground_labels=LABELS,
    )  # fmt: skip
    for step in transforms.transforms:
        if isinstance(step, SpatialTransform) and geometry is not None:
            step.p_rotation = step.p_scaling = geometry
        if isinstance(step, RandomTransform):
            step.apply_probability = step.apply_probability if intensities is None else intensities
            if isinstance(step.transform, GaussianBlurTransform):
                # Else it times two ways of blurring, which differ by rounding, and takes the faster one.
                step.transform.benchmark = False
    return transforms


def example(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """An image larger than the patch, with a mask, and in a cascade a previous segmentation."""
    rng = np.random.default_rng(seed)
    shape = [2 * side for side in PATCHES["3d" if kind == "cascade" else kind]]
    mask = np.zeros(shape, np.int16)
    mask[..., : shape[-1] // 2] = -1
    segmentation = [mask]
    if kind == "cascade":
        segmentation.append(np.kron(rng.integers(0, 3, (8, 8, 8)), np.ones([side // 8 for side in shape], int)))
    image = torch.from_numpy(rng.normal(size=(2, *shape)).astype(np.float32))
    return {"image": image, "segmentation": torch.from_numpy(np.stack(segmentation).astype(np.int16))}


def drawn(make: Views | ComposeTransforms, kind: str, seed: int, number: int = 0, **more) -> dict[str, torch.Tensor]:
    np.random.seed(seed)
    torch.manual_seed(seed)
    return make(**example(kind, number), **more)


class Spy(SegOnlyTransform):
    """Keeps the segmentations that the views of an image are masked with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **_) -> torch.Tensor:
        self.seen.append(segmentation.clone())
        return segmentation


def spied(transforms: ComposeTransforms) -> Spy:
    (place,) = [i for i, step in enumerate(transforms.transforms) if isinstance(step, MaskImageTransform)]
    spy = Spy()
    transforms.transforms.insert(place, spy)
    return spy


class Shift(ImageOnlyTransform):
    """Adds a random number to the whole image: what else differs between views was moved differently."""

    def get_parameters(self, **_) -> dict:
        return {"by": torch.rand(1) + 1}

    def _apply_to_image(self, img: torch.Tensor, by: torch.Tensor, **_) -> torch.Tensor:
        return img.add_(by)


@pytest.mark.parametrize("kind", KINDS)
def test_without_changes_of_intensities_all_views_are_equal(kind):
    views = Views(nnunets(kind, geometry=0.5, intensities=0.0), VIEWS)
    moved = 0
    for seed in range(12):
        strong, weak, strong_2 = (drawn(views, kind, seed)[name] for name in VIEWS)
        assert torch.equal(strong, weak)
        assert torch.equal(strong_2, weak)
        image = example(kind)["image"]
        middle = (slice(None), *[slice(side // 4, side // 4 + side // 2) for side in image.shape[1:]])
        moved += not torch.equal(weak[1], image[middle][1])
    assert moved > 8


@pytest.mark.parametrize("kind", ["2d", "3d", "anisotropic"])
def test_views_share_their_geometry_where_intensities_differ(kind):
    transforms = nnunets(kind, geometry=1.0, intensities=0.0)
    place = next(i for i, step in enumerate(transforms.transforms) if isinstance(step, RandomTransform))
    transforms.transforms.insert(place, Shift())
    views = Views(transforms, VIEWS)
    for seed in range(8):
        strong, weak, strong_2 = (drawn(views, kind, seed)[name] for name in VIEWS)
        # The second channel knows no mask.
        shifts = [(view - weak)[1] for view in (strong, strong_2)]
        assert all(1 <= shift.mean() <= 2 for shift in shifts)
        assert all((shift - shift.mean()).abs().max() < 1e-5 for shift in shifts)
        assert (shifts[0] - shifts[1]).abs().min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_strong_view_all_is_as_nnunets_transforms_make_it(kind):
    """To the bit: what is drawn, the strong view, and the weak one where nnU-Net would move a regression target."""
    for seed in range(12):
        expected = drawn(nnunets(kind), kind, seed, regression_target=example(kind)["image"])
        after = torch.rand(1), np.random.rand()
        for names in (("strong",), ("strong", "weak")):
            views = drawn(Views(nnunets(kind), names), kind, seed)
            assert (torch.rand(1), np.random.rand()) == after
            assert torch.equal(views["strong"], expected["image"])
            if "weak" in names:
                # nnU-Net does not mask regression targets.
                assert torch.equal(views["weak"][1], expected["regression_target"][1])


def test_intensities_of_two_strong_views_are_independent():
    """Noise alone, of nearly equal strength: what the one adds says nothing about what the other does."""
    transforms = nnunets("2d", geometry=0.0, intensities=0.0)
    noise = next(step for step in transforms.transforms if isinstance(step, RandomTransform))
    noise.apply_probability, noise.transform.noise_variance = 1.0, (0.9, 1.0)
    views = Views(transforms, VIEWS)
    for seed in range(5):
        strong, weak, strong_2 = (drawn(views, "2d", seed)[name][1] for name in VIEWS)
        first, second = (strong - weak).flatten().numpy(), (strong_2 - weak).flatten().numpy()
        assert 0.8 < first.std() < 1.1
        assert 0.8 < second.std() < 1.1
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(len(first))


def test_what_changes_one_strong_view_says_nothing_about_the_other():
    views = Views(nnunets("2d"), VIEWS)
    changed = np.empty((400, 2))
    np.random.seed(0)
    torch.manual_seed(0)
    for row in changed:
        strong, weak, strong_2 = views(**example("2d")).values()
        row[:] = not torch.equal(strong, weak), not torch.equal(strong_2, weak)
    assert 0.5 < changed.mean() < 0.95
    assert abs(np.corrcoef(changed.T)[0, 1]) < 0.2


@pytest.mark.parametrize("names", EVERY_SUBSET, ids="-".join)
def test_the_weak_view_is_the_image_itself(names):
    """Neither moved nor masked nor changed: nothing is left to do for it, whatever else is wanted."""
    transforms = nnunets("2d", geometry=0.0, intensities=1.0)
    transforms.transforms = [
        step for step in transforms.transforms if not isinstance(step, (MirrorTransform, MaskImageTransform))
    ]
    views = Views(transforms, names)
    image = example("2d")["image"][:, 16:48, 16:48]
    for seed in range(5):
        made = drawn(views, "2d", seed)
        assert sorted(made) == sorted(names)
        for name, view in made.items():
            assert torch.equal(view, image) == (name == "weak")


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_moved_with_every_view(kind):
    transforms = nnunets(kind, geometry=0.7, intensities=1.0)
    spy = spied(transforms)
    views = Views(transforms, VIEWS)
    for seed in range(6):
        spy.seen.clear()
        made = drawn(views, kind, seed)
        assert len(spy.seen) == 3
        outside = spy.seen[0][0] < 0
        assert 0.02 < outside.float().mean() < 0.98
        for view, segmentation in zip(made.values(), spy.seen):
            assert torch.equal(segmentation, spy.seen[0])
            assert (view[0][outside] == 0).all()
            assert (view[0][~outside] != 0).float().mean() > 0.99
            assert (view[1][outside] != 0).float().mean() > 0.9


def test_strong_views_of_a_cascade_get_channels_of_their_own_and_the_weak_one_clean_ones():
    transforms = nnunets("cascade", intensities=1.0)
    spy = spied(transforms)
    views = Views(transforms, VIEWS)
    different = 0
    for seed in range(12):
        spy.seen.clear()
        strong, weak, strong_2 = (drawn(views, "cascade", seed, seed)[name] for name in VIEWS)
        assert strong.shape == weak.shape == strong_2.shape == (4, *PATCHES["3d"])
        clean = torch.stack([spy.seen[0][1] == label for label in LABELS]).float()
        assert torch.equal(weak[2:], clean)
        for view in (strong, strong_2):
            assert set(view[2:].unique().tolist()) <= {0.0, 1.0}
            different += not torch.equal(view[2:], clean)
        different += not torch.equal(strong[2:], strong_2[2:])
    assert different > 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", EVERY_SUBSET, ids="-".join)
def test_an_image_is_resampled_once_and_changed_once_per_strong_view(kind, names, monkeypatch):
    calls = dict.fromkeys(("image", "segmentation", "intensities"), 0)

    def counted(cls, method, name):
        real = getattr(cls, method)

        def call(self, *arguments, **keywords):
            calls[name] += 1
            return real(self, *arguments, **keywords)

        monkeypatch.setattr(cls, method, call)

    counted(SpatialTransform, "_apply_to_image", "image")
    counted(SpatialTransform, "_apply_to_segmentation", "segmentation")
    counted(RandomTransform, "__call__", "intensities")
    transforms = nnunets(kind, geometry=1.0)
    drawn(Views(transforms, names), kind, 0)
    per_view = sum(isinstance(step, RandomTransform) for step in transforms.transforms)
    assert per_view == (9 if kind == "cascade" else 7)
    strong = sum(name != "weak" for name in names)
    assert calls == {"image": 1, "segmentation": 1, "intensities": strong * per_view}


@pytest.mark.parametrize("names", [(), ("data",), ("strong", "weaker"), ("weak", "weak")])
def test_other_views_are_refused(names):
    with pytest.raises(UserError, match=r"expected one or more of \['strong', 'weak', 'strong_2'\]"):
        Views(None, names)


def test_without_transforms_every_view_is_the_image():
    image = torch.rand(1, 4, 4)
    views = Views(None, ("strong_2", "weak", "strong"))(image=image)
    assert list(views) == list(VIEWS)
    assert all(torch.equal(view, image) for view in views.values())


@pytest.mark.parametrize("wrapper", [lambda step: RandomTransform(step, 0.5), lambda step: OneOfTransform([step])])
def test_geometry_that_would_be_drawn_for_every_view_is_refused(wrapper):
    """Wrappers draw while they are applied; before the intensities there is one image, and no harm in that."""
    mirror = wrapper(MirrorTransform((0, 1)))
    with pytest.raises(UserError, match="Transform draws random numbers while it changes an image"):
        Views(ComposeTransforms([RandomTransform(Shift()), mirror]), VIEWS)
    views = Views(ComposeTransforms([mirror, RandomTransform(Shift())]), VIEWS)
    for _ in range(10):
        strong, weak, _ = views(image=torch.rand(1, 8, 8)).values()
        assert (strong - weak).std() < 1e-5


def straight(image: torch.Tensor) -> bool:
    """Whether a plane (H, W) has no curvature anywhere, as a ramp that was rotated, scaled or mirrored."""
    return all(torch.diff(image, n=2, dim=axis).abs().max() < 1e-3 for axis in (0, 1))


def test_the_weak_view_is_moved_like_the_image_and_keeps_its_intensities(tmp_path):
    """A ramp stays a ramp under nnU-Net's spatial transforms, and not under those of intensity."""
    tiny = TinyDataset(tmp_path, PATCHES["2d"])
    ramp = torch.linspace(-3, 3, 160) + 0.5 * torch.linspace(-3, 3, 160)[:, None]
    tiny._write_blosc(tiny.folder / "hid_0.b2nd", ramp[None, None].numpy())
    trainer = tiny.initialized(nnUNetTrainerDualNet)
    rotation, _, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(tiny.patch, rotation, None, axes, False)
    dataset = UnlabeledDataset([UnlabeledCase("hid_0", str(tiny.folder), "hidden label")])
    loader = UnlabeledDataLoader(dataset, 1, size, tiny.patch, trainer.label_manager, transforms, views=VIEWS[:2])
    batches = [next(loader) for _ in range(80)]
    pairs = [(batch["strong"][0, 0], batch["weak"][0, 0]) for batch in batches]
    # Patches at the image's border are padded.
    inside = [(strong, weak) for strong, weak in pairs if (weak != 0).all()]
    assert len(inside) > 20
    assert all(straight(weak) for _, weak in inside)
    assert any(not straight(strong) for strong, _ in inside)
    # Where no intensity was changed both are the same, moved alike.
    assert 5 < sum(torch.equal(strong, weak) for strong, weak in inside) < len(inside)
    # Mirrored along both axes: the ramp rises and falls along each.
    steps = torch.stack([weak[[1, 0], [0, 1]] - weak[0, 0] for _, weak in inside])
    assert all(set(axis.sign().tolist()) == {-1.0, 1.0} for axis in steps.T)
