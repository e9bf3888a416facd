"""Hyper-parameters of methods that stood flat in the block "ssl" of earlier versions, and where they stand now."""

from __future__ import annotations

_OF_METHODS = {
    "SupTC": (
        *("consistency_weight", "smoothness", "displacement_std", "identity_probability", "interpolation"),
        *("supervised_loss", "rotation", "scaling", "consistency_loss"),
    ),
    "DualNet": (
        *("pseudo_label_weight", "consistency_weight", "uncertainty_weight", "contrastive_weight", "weak_teacher"),
        *("reliable_fraction", "contrastive_points", "contrastive_margin"),
    ),
    "FDPL": (
        *("fixed_weight", "dynamic_weight", "shift", "weak_teacher", "cutmix", "cutmix_share", "cross_entropy_share"),
    ),
}
_READ_TOO = {"SupTC": " (SemiTC and SemiTCPlus read it too)"}


def _places(name: str) -> tuple[str, ...]:
    return tuple(f"{m}.{name}{_READ_TOO.get(m, '')}" for m, names in _OF_METHODS.items() if name in names)


# Former name -> every place that it may be meant for now.
FORMER_NAMES: dict[str, tuple[str, ...]] = {
    "consistency_ramp": (f"SupTC.unlabeled_ramp{_READ_TOO['SupTC']}", "unlabeled_ramp (for all methods)"),
    **{name: _places(name) for names in _OF_METHODS.values() for name in names},
}
