"""Views of an unlabeled image: geometry is drawn once for all of them, intensities once for every strong one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from nnunet_ssl.errors import UserError

STRONG, WEAK, STRONG_2 = VIEWS = ("strong", "weak", "strong_2")
# Asked for like a view: the stored pseudo-labels of the same patch, moved with it.
PSEUDO_LABELS = "pseudo_labels"


def check_views(names: Sequence[str]) -> tuple[str, ...]:
    """Views in the order of ``VIEWS``, and pseudo-labels last.

    Raises:
        UserError: Where there is none, one has another name, or one is named twice.
    """
    known = (*VIEWS, PSEUDO_LABELS)
    if not set(names) & set(VIEWS) or not set(names) <= set(known) or len(set(names)) < len(names):
        raise UserError(
            f"The views of unlabeled images are {list(names)}; expected one or more of {list(VIEWS)}, and maybe "
            f"{PSEUDO_LABELS!r} besides."
        )
    return tuple(name for name in known if name in names)


class Views(BasicTransform):
    """nnU-Net's augmentation, once for all views of an image.

    A transform that changes nothing but the image (noise, blur, brightness, and what nnU-Net does to the previous
    stage's segmentation in a cascade) belongs to a strong view: each draws its own. Every other one (rotation, scaling,
    mirroring, the mask of the normalization) is drawn once and applied to every view alike; before the first strong
    view differs there is but one image to move. The weak view is what is left without the former.

    With one strong view, random numbers and results are those of nnU-Net's transforms.

    Args:
        transforms: As nnUNetTrainer.get_training_transforms makes them; None for none.
        names: The wanted views, of ``VIEWS``; with pseudo-labels, which are the last channel of the segmentation, these
            are moved as the views are.

    Raises:
        UserError: For other names, and for transforms that cannot be drawn once.
    """

    def __init__(self, transforms: BasicTransform | None, names: Sequence[str]) -> None:
        super().__init__()
        names = check_views(names)
        self.names = tuple(name for name in names if name in VIEWS)
        self._with_labels = PSEUDO_LABELS in names
        steps = _steps(transforms)
        own = [_changes_intensities(step) for step in steps]
        first = own.index(True) if True in own else len(steps)
        self._before, self._after = steps[:first], list(zip(steps[first:], own[first:]))
        for step, is_own in self._after:
            if not is_own and not _is_drawn_at_once(step):
                raise UserError(
                    f"{type(step).__name__} draws random numbers while it changes an image, so that views of one image "
                    f"would move apart. Put it before the transforms of intensities."
                )

    def __call__(self, **data: Any) -> dict[str, Tensor]:
        """The views by name, each (C, *S); pseudo-labels (1, *S).

        Args:
            data: ``image`` (C, *S) and, where a transform asks for one or there are pseudo-labels, ``segmentation``
                (K, *S).
        """
        for step in self._before:
            data = step(**data)
        first, *others = self.names
        views = {first: data, **{name: _copy(data) for name in others}}
        for step, is_own in self._after:
            if is_own:
                views |= {name: step(**view) for name, view in views.items() if name != WEAK}
            else:
                parameters = step.get_parameters(**views[first])
                views = {name: step.apply(view, **parameters) for name, view in views.items()}
        images: dict[str, Tensor] = {name: view["image"] for name, view in views.items()}
        return images | ({PSEUDO_LABELS: views[first]["segmentation"][-1:]} if self._with_labels else {})


def _steps(transforms: BasicTransform | None) -> list[BasicTransform]:
    if isinstance(transforms, ComposeTransforms):
        return [step for part in transforms.transforms for step in _steps(part)]
    return [] if transforms is None else [transforms]


def _changes_intensities(step: BasicTransform) -> bool:
    return isinstance(step.transform if isinstance(step, RandomTransform) else step, ImageOnlyTransform)


def _is_drawn_at_once(step: BasicTransform) -> bool:
    """Whether its parameters are all that is random: batchgeneratorsv2's wrappers draw later, or all by themselves."""
    return type(step).__call__ is BasicTransform.__call__ and not isinstance(step, RandomTransform)


def _copy(data: dict[str, Any]) -> dict[str, Any]:
    """Transforms change tensors in place."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in data.items()}
