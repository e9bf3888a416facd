"""Promises about gradients: what a loss term trains, and that unlabeled images matter to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.testing.bench import Bench
from nnunet_ssl.testing.broken import BrokenPromise
from nnunet_ssl.testing.networks import fill_zeros, networks_of, scale_heads
from nnunet_ssl.testing.tiny import TinyDataset, step_of
from nnunet_ssl.training.hyperparameters import SHARED
from nnunet_ssl.training.method import NETWORK, SUPERVISED, Losses

GRADIENTS, SIGNAL = "gradients", "signal"
# Times what an untrained network says: of three classes it is then sure of a part of the voxels.
_SURER = 5.0


def terms_train_their_networks(
    cls: type, bench: Bench, patch: str = "2d", before_head: Collection[str] | None = None, **ssl: Any
) -> None:
    """The gradient of every loss term reaches all parameters of the networks it names, and no other network.

    Args:
        cls: A trainer.
        bench: Where.
        patch: One of ``tiny.PATCHES``.
        before_head: Terms on features, which do not reach the last head; None where these are not known.
        ssl: Hyper-parameters.

    Raises:
        BrokenPromise: Naming the term.
    """
    with bench.data(patch, device=bench.device) as tiny:
        trainer = _ready(cls, tiny, **ssl)
        fill_zeros(trainer)
        losses = step_of(trainer, *tiny.batches(trainer)).losses
        _check_names(trainer, losses)
        for term, loss in losses.items():
            _check_term(trainer, term, loss, before_head)


def unlabeled_images_matter(cls: type, bench: Bench, patch: str = "2d", **ssl: Any) -> None:
    """Other unlabeled images, with everything else equal, give every unlabeled term another gradient.

    Raises:
        BrokenPromise: Naming the term.
    """
    if not getattr(cls, "uses_unlabeled", False):
        return
    found = []
    for seed in (1, 2):
        with bench.data(patch, device=bench.device) as tiny:
            trainer = _ready(cls, tiny, **ssl)
            labeled, _ = tiny.batches(trainer)
            _, unlabeled = tiny.batches(trainer, seed)
            losses = step_of(trainer, labeled, unlabeled).losses
            found.append({term: _gradient(trainer, losses[term]) for term in trainer.unlabeled_terms if term in losses})
    dead = [term for term in found[0] if torch.allclose(found[0][term], found[1][term])]
    if dead:
        raise BrokenPromise(
            SIGNAL,
            f"{_terms(dead)} with the same gradient, whatever the unlabeled images show.",
            f"Look in {cls.__name__} for what is made of unlabeled.strong, .weak or .strong_2. A term that needs no "
            f"unlabeled image belongs to labeled_terms.",
        )


def untouched(network: nn.Module, *, past_head: bool | None = None) -> list[str]:
    """Parameters that did not get the gradient of a term.

    Left out are the segmentation heads of lower resolutions, which serve deep supervision alone, and biases before a
    normalization, whose gradient is zero or rounding noise.

    Args:
        network: Of nnU-Net's families, or another module.
        past_head: Whether the term acts on predictions, rather than on features before the last head; None where that
            is not known.
    """
    heads = getattr(getattr(network, "decoder", None), "seg_layers", None)
    names = []
    for name, parameter in network.named_parameters():
        last = heads is not None and f"seg_layers.{len(heads) - 1}." in name
        if "seg_layers" in name and (not last or not past_head):
            continue
        if name.endswith("conv.bias") or ".all_modules.0.bias" in name or (heads is None and name.endswith("bias")):
            continue
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().max() > 0):
            names.append(name)
    return names


def switched_on(cls: Any) -> dict[str, float]:
    """A weight of 1 for terms that are off by default, so that they are tried too."""
    fields = dataclasses.fields(cls.Parameters)
    weights = [f for f in fields if f.name.endswith("_weight") and f.name not in SHARED]
    return {f.name: 1.0 for f in weights if f.default == 0}


def _ready(cls: Any, tiny: TinyDataset, **ssl: Any) -> Any:
    """A trainer in stage 2, with all terms on and no random identity among its transforms."""
    settings = {"supervised_fraction": 0.0, "identity_probability": 0.0, **switched_on(cls), **ssl}
    trainer = tiny.initialized(cls, **settings)
    # Untrained networks are sure of nothing, and many a term is about what is sure.
    scale_heads(trainer, _SURER)
    return trainer


def _check_names(trainer: Any, losses: Losses) -> None:
    name = type(trainer).__name__
    unknown = [term for term in losses if term not in trainer.term_names]
    missing = [term for term in trainer.term_names if term not in losses]
    if unknown:
        raise BrokenPromise(
            GRADIENTS,
            f"A step gives {_terms(unknown)} that {name} does not declare; it has {', '.join(trainer.term_names)}.",
            "Add it to unlabeled_terms or labeled_terms, with a weight among the Parameters.",
        )
    if missing:
        raise BrokenPromise(
            GRADIENTS,
            f"{name} declares {_terms(missing)} that a step with labeled and unlabeled images does not give.",
            "Return it from unlabeled_losses or labeled_losses, or take it out of the declaration.",
        )


def _check_term(trainer: Any, term: str, loss: Tensor, before_head: Collection[str] | None) -> None:
    networks, name = networks_of(trainer), type(trainer).__name__
    supervised = term in trainer.supervised_terms
    if supervised:
        named: tuple[str, ...] = (term.removeprefix(f"{SUPERVISED}_") if term != SUPERVISED else NETWORK,)
    else:
        named = tuple(trainer.trains(term))
    absent = [n for n in named if n not in networks]
    if absent or not named:
        raise BrokenPromise(
            GRADIENTS,
            f"{name}.trains({term!r}) names {', '.join(absent) or 'no network'}; there are {', '.join(networks)}.",
            "Name networks by what they were added as, or 'network' for the plan's.",
        )
    for network in networks.values():
        network.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward(retain_graph=True)
    reached = [n for n, network in networks.items() if any(_has_gradient(p) for p in network.parameters())]
    if set(reached) != set(named):
        raise BrokenPromise(
            GRADIENTS,
            f"The gradient of {term!r} reaches {', '.join(reached) or 'no network'}; it should reach "
            f"{', '.join(named)}.",
            "Look what the term is made of: detach(), no_grad() and labels stop a gradient, and what is not stopped "
            f"is trained. Where the term is right, let {name}.trains say so.",
        )
    past_head = True if supervised else None if before_head is None else term not in before_head
    for n in named:
        names = untouched(networks[n], past_head=past_head)
        if names:
            raise BrokenPromise(
                GRADIENTS,
                f"The gradient of {term!r} does not reach {len(names)} parameters of {n}, e.g. {names[0]}.",
                "Look what the term is made of: something between it and these parameters is cut off or constant.",
            )


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _gradient(trainer: Any, loss: Tensor) -> Tensor:
    """Of a term, in a row for all parameters of all networks."""
    parameters = [p for network in networks_of(trainer).values() for p in network.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return torch.zeros(1)
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, parts)])


def _terms(names: list[str]) -> str:
    return f"the term{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
