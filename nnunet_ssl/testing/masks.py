"""The promise that voxels which nobody annotated teach nothing about labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.blocks.networks import bare, full_resolution
from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.gradients import switched_on
from nnunet_ssl.testing.tiny import TinyDataset, step_of

MASKS = "masks"
# So many voxels get a label in turn: few enough to change no sum over a batch by much.
_PROBED = 8
# What warping an image by nothing may change of it.
_ROUNDING = 1e-4
# A gradient that a label of its own voxel makes changes by about its own length.
_TOLERANCE = 0.1


class Seen(NamedTuple):
    """A labeled example that a network has seen as it is: its row in the network's output, and its number."""

    output: Tensor
    row: int
    example: int


def ignored_voxels_teach_nothing(cls: type, bench: Bench, patch: str = "2d", scenario: str = "ignore") -> int:
    """Losses on labels have no gradient at voxels with the ignore label; no term takes that label for a structure.

    What is asked is the gradient with respect to a network's prediction for a labeled image, wherever the network sees
    that image as it is; images that a method moves or mixes are passed over. Supervised terms must have none where
    voxels are ignored, and some elsewhere. Every other term may have one there, as agreement of two predictions has:
    but then it must stay what it is when these voxels get a label.

    Args:
        cls: A trainer.
        bench: Where.
        patch: One of ``tiny.PATCHES``.
        scenario: With ignored voxels.

    Returns:
        How many predictions were asked.

    Raises:
        BrokenPromise: Naming the term.
    """
    with bench.data(patch, scenario, device=bench.device) as tiny:
        plain = _gradients(cls, tiny, None)
        labels = range(tiny.num_labels)
        others: list[dict[str, list[Tensor]]] | None = None
        for term, found in plain.items():
            ignored, annotated, probed = (torch.cat(values) for values in zip(*found)) if found else _NOTHING
            if not ignored.any():
                if term.startswith("supervised") and found and not annotated.any():
                    _refuse(cls, term, "has no gradient at annotated voxels")
                continue
            if term.startswith("supervised"):
                _refuse(cls, term, "has a gradient at voxels that are ignored")
            if others is None:
                others = [_probed(_gradients(cls, tiny, label)) for label in labels]
            for other in others:
                same = other.get(term, [])
                if len(same) == len(found) and _changed(probed, torch.cat(same)):
                    _refuse(cls, term, "takes the ignore label for one of the structures or the background")
        return sum(map(len, plain.values()))


_NOTHING = (torch.zeros(0),) * 3
_Found = dict[str, list[tuple[Tensor, Tensor, Tensor]]]


def _gradients(cls: type, tiny: TinyDataset, label: int | None) -> _Found:
    """Of every term, for each prediction it depends on: at ignored, at annotated and at probed voxels, flat.

    Args:
        cls: A trainer.
        tiny: With ignored voxels.
        label: What the probed voxels, all ignored, are labeled as; None for nothing.
    """
    # Neither moved nor cut: what passes must be found among the images.
    settings = {"supervised_fraction": 0.0, "identity_probability": 1.0, "box_side": 1.0, **switched_on(cls)}
    trainer = tiny.initialized(cls, **settings)
    labeled, unlabeled = tiny.batches(trainer)
    batch = torch.randint(
        0, tiny.num_labels, labeled["target"][:, :1].shape, generator=torch.Generator().manual_seed(5)
    )
    ignored = torch.zeros_like(batch, dtype=torch.bool)
    ignored[..., : tiny.patch[-1] // 2] = True
    probed = torch.zeros_like(ignored)
    row = (0, 0, *(side // 2 for side in tiny.patch[:-1]))
    probed[row][:_PROBED] = True
    assert tiny.ignore_label is not None
    batch = torch.where(ignored, tiny.ignore_label, batch)
    batch = batch if label is None else torch.where(probed, label, batch)
    labeled["target"] = tiny.as_target(batch.to(torch.int16))
    with _passes(trainer, labeled["data"].to(trainer.device)) as seen:
        losses = step_of(trainer, labeled, unlabeled).losses
    found: _Found = {}
    for term, loss in losses.items():
        found[term] = []
        outputs = [s.output for s in seen]
        if not loss.requires_grad or not outputs:
            continue
        for s, gradient in zip(seen, torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)):
            if gradient is None:
                continue
            here, masks = gradient[s.row].cpu(), [m[s.example, 0] for m in (ignored, ~ignored, probed)]
            found[term].append(tuple(here[:, m].flatten() for m in masks))  # type: ignore[arg-type]
    return found


def _probed(found: _Found) -> dict[str, list[Tensor]]:
    return {term: [parts[2] for parts in values] for term, values in found.items()}


@contextmanager
def _passes(trainer: Any, images: Tensor) -> Iterator[list[Seen]]:
    """Inside, note where a network that learns from labels predicts one of some images."""
    seen: list[Seen] = []

    def note(module: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        logits, data = full_resolution(outputs), inputs[0]
        if not logits.requires_grad or data.shape[1:] != images.shape[1:]:
            return
        for row, image in enumerate(data):
            known = [i for i, other in enumerate(images) if torch.allclose(image, other, atol=_ROUNDING)]
            seen.extend(Seen(logits, row, example) for example in known)

    hooks = [bare(network).register_forward_hook(note) for network in trainer.predictors]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _changed(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() > _TOLERANCE * first.norm())


def _refuse(cls: type, term: str, what: str) -> None:
    raise BrokenPromise(
        MASKS,
        f"The term {term!r} {what}.",
        f"Look in {cls.__name__} where it uses labeled.target: leave out voxels with self.label_manager.ignore_label "
        f"(with regions, where the target's last channel is 1), as self.supervised_loss does.",
    )
