"""How a method declares its hyper-parameters, and how the block "ssl" of a plans file overrides them.

A method has one frozen dataclass. Every field is made with ``parameter``, so that type, default, unit, range and
meaning stand in one place; the command line's help, the checks and the log all read them from there.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from typing_extensions import Self

from nnunet_ssl.errors import UserError

PLANS_KEY = "ssl"


def parameter(
    default: Any,
    meaning: str,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """One hyper-parameter: default, meaning, unit, and the values it may take (bounds included)."""
    metadata = {"meaning": meaning, "unit": unit, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """What every trainer of this package understands, the supervised baseline included."""

    num_epochs: int = parameter(1000, "length of the training", "epochs", minimum=1)
    num_iterations_per_epoch: int = parameter(250, "training steps per epoch", "steps", minimum=1)
    num_val_iterations_per_epoch: int = parameter(50, "validation batches per epoch", "batches", minimum=1)
    initial_lr: float = parameter(1e-2, "learning rate at the start of each stage", minimum=0.0)
    weight_decay: float = parameter(3e-5, "weight decay of the optimizer", minimum=0.0)
    save_every: int = parameter(50, "how often checkpoint_latest.pth is written", "epochs", minimum=1)
    picture_every: int = parameter(
        50, "how often a picture of two unlabeled cases is written; 0 for never", "epochs", minimum=0
    )
    oversample_foreground_percent: float = parameter(
        0.33, "fraction of each labeled batch that is centered on a structure", minimum=0.0, maximum=1.0
    )
    mirror_axes: tuple[int, ...] | None = parameter(
        None,
        "axes mirrored in augmentation and inference, [] for none; nnU-Net's own choice (all) if null. Mirroring "
        "harms where labels tell left from right",
        minimum=0,
        maximum=2,
    )
    rotation_degrees: float | None = parameter(
        None, "largest rotation in augmentation; nnU-Net's own choice if null", "degrees", minimum=0.0, maximum=180.0
    )
    loader_timeout: float = parameter(
        60.0, "how long to wait for a batch before the training ends with an error", "seconds", minimum=1.0
    )
    cpu_bfloat16: bool = parameter(
        False, "train with bfloat16 autocast when on the CPU: faster where the CPU has such arithmetic, else far slower"
    )
    seed: int | None = parameter(
        None,
        "seed of initial weights, transforms and single-process data loading (nnUNet_n_proc_DA=0); random if null",
        minimum=0,
        maximum=2**31 - 1,
    )

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any], others: Iterable[type[HyperParameters]] = ()) -> Self:
        """Read the block "ssl" of a plans file.

        Names that only another method declares are checked against it and otherwise passed over, so that one plans
        file serves every trainer of a comparison.

        Args:
            plans: The content of a plans file.
            others: Hyper-parameters of the other methods.

        Raises:
            UserError: For an unknown name, a value of the wrong type, or a value out of range.
        """
        block = plans.get(PLANS_KEY, {})
        if not isinstance(block, Mapping):
            raise UserError(f'"{PLANS_KEY}" in the plans file must be an object of names and values, found {block!r}.')
        own = {f.name for f in dataclasses.fields(cls)}
        kinds: list[type[HyperParameters]] = [*others, cls]
        declared = {f.name: kind for kind in kinds for f in dataclasses.fields(kind)}
        values: dict[str, Any] = {}
        for name, value in block.items():
            if name not in declared:
                raise UserError(_unknown_name(name, declared))
            checked = check_value(cls if name in own else declared[name], name, value)
            if name in own:
                values[name] = checked
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Names and values, fit for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class SemiSupervisedParameters(HyperParameters):
    """What every method understands that learns from more than labels."""

    learned_dice: float = parameter(
        0.5,
        "unlabeled terms count in full once every structure has this running Dice on labeled batches, and in "
        "proportion to the worst before; 0 for at once",
        minimum=0.0,
        maximum=1.0,
    )
    unlabeled_fraction: float = parameter(
        0.5,
        "largest part of each batch that is unlabeled, at least one example; where the square of the unlabeled cases' "
        "part of all cases is less, that",
        minimum=0.0,
        maximum=1.0,
    )


def check_value(kind: type[HyperParameters], name: str, value: Any) -> Any:
    """Bring a JSON value to the declared type.

    Args:
        kind: The class that declares the name.
        name: A hyper-parameter of that class.
        value: What the plans file or the command line says.

    Returns:
        The value in its declared type.

    Raises:
        UserError: Where it does not fit.
    """
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    meta = field.metadata
    try:
        converted = _convert(value, typing.get_type_hints(kind)[name])
    except TypeError:
        raise UserError(
            f"Hyper-parameter {name} must be {describe_type(kind, name)}, got {value!r} ({type(value).__name__}). "
            f"Meaning: {meta['meaning']}."
        ) from None
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        below = meta["minimum"] is not None and not number >= meta["minimum"]
        above = meta["maximum"] is not None and not number <= meta["maximum"]
        if below or above:
            raise UserError(
                f"Hyper-parameter {name} must lie between {meta['minimum']} and {meta['maximum']}, got {value!r}."
            )
    if meta["choices"] and converted not in meta["choices"]:
        raise UserError(f"Hyper-parameter {name} must be one of {list(meta['choices'])}, got {value!r}.")
    return converted


def describe_type(kind: type[HyperParameters], name: str) -> str:
    """The declared type in words: "a number or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return " or ".join(
        words.get(t, "a list of whole numbers") for t in _alternatives(typing.get_type_hints(kind)[name])
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if is_union else (annotation,)


def _convert(value: Any, annotation: Any) -> Any:
    for kind in _alternatives(annotation):
        if kind is type(None) and value is None:
            return None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, str):
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            return tuple(_convert(entry, typing.get_args(kind)[0]) for entry in value)
    raise TypeError


def _unknown_name(name: str, declared: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), declared, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"Unknown hyper-parameter {name!r}.{hint} Known are: {', '.join(sorted(declared))}."
