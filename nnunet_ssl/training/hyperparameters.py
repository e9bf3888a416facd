"""How a method declares its hyper-parameters, and how the block "ssl" of a plans file overrides them.

A method has one frozen dataclass. Every field is made with ``parameter``, so that type, default, unit, range and
meaning stand in one place; the command line's help, the checks and the log all read them from there. What all methods
share stands flat in the plans, a method's own hyper-parameters in an object with the method's name:

    "ssl": {"num_epochs": 200, "SemiTC": {"consistency_weight": 0.5, "supervised_fraction": 0.25}}
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import Self

from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.plans import PLANS_KEY
from nnunet_ssl.training.former_names import FORMER_NAMES


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
    averaged_decay: float = parameter(
        0.0,
        "decay per step of a running average of the weights, which then predicts; 0: the weights of the last step",
        minimum=0.0,
        maximum=0.9999,
    )
    loader_timeout: float = parameter(
        600.0,
        "how long to wait for a batch before the training ends with an error; slow disks take minutes at the start",
        "seconds",
        minimum=1.0,
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

    _types: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        """Note the types of the fields while the module can still be looked into.

        nnU-Net forgets the modules of other people's folders once it has found a trainer there.
        """
        super().__init_subclass__()
        cls._types = typing.get_type_hints(cls)

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any], blocks: Sequence[str] = ()) -> Self:
        """Read the block "ssl" of a plans file.

        Objects with other names belong to other methods and are passed over, so that one plans file serves every
        trainer of a comparison. The supervised baseline checks what only methods share, and passes it over too.

        Args:
            plans: The content of a plans file.
            blocks: Names of the objects in it that are read besides the flat names; the later ones win.

        Raises:
            UserError: For an unknown name, a value of the wrong type, or a value out of range, with its place.
        """
        table = plans.get(PLANS_KEY, {})
        if not isinstance(table, Mapping):
            raise UserError(f'"{PLANS_KEY}" in the plans file must be an object of names and values, found {table!r}.')
        own = declared(cls)
        values: dict[str, Any] = {}
        for name, value in table.items():
            if name in blocks or (isinstance(value, Mapping) and name not in SHARED):
                continue
            if name not in SHARED:
                raise UserError(_unknown_flat_name(name, own, blocks))
            checked = check_value(cls if name in own else MethodParameters, name, value)
            if name in own:
                values[name] = checked
        for block in blocks:
            entries = table.get(block, {})
            if not isinstance(entries, Mapping):
                raise UserError(f"Block {block} must be an object of names and values, found {entries!r}.")
            for name, value in entries.items():
                if name not in own:
                    raise UserError(_unknown_name_in_block(block, name, own))
                values[name] = check_value(cls, name, value, block)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Names and values, fit for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class MethodParameters(HyperParameters):
    """What every method understands that learns from more than labels."""

    supervised_fraction: float = parameter(
        0.0, "fraction of the epochs trained on labels alone, before the unlabeled terms", minimum=0.0, maximum=1.0
    )
    unlabeled_ramp: float = parameter(
        0.0,
        "fraction of stage 2 over which the weights of the unlabeled terms rise; 0 for at once",
        minimum=0.0,
        maximum=1.0,
    )
    learned_dice: float = parameter(
        0.5,
        "until a structure has this running Dice on labeled batches, unlabeled terms take it for background that may "
        "be it; 0 for at once",
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
    unlabeled_examples: str = parameter(
        "shared",
        "shared: they take places of the plan's batch, at its memory and time; added: labeled examples fill it, and "
        "unlabeled ones come on top",
        choices=("shared", "added"),
    )


# What stands flat in the plans: all other names belong to a method.
SHARED = frozenset(field.name for field in dataclasses.fields(MethodParameters))


def other_default(name: str, default: Any) -> Any:
    """A shared hyper-parameter that one method starts from another value."""
    return dataclasses.field(default=default, metadata=MethodParameters.__dataclass_fields__[name].metadata)


def method_name(trainer: type) -> str:
    """What a trainer's method is called in plans and on the command line."""
    return trainer.__name__.removeprefix("nnUNetTrainer")


def declared(kind: type[HyperParameters]) -> dict[str, dataclasses.Field[Any]]:
    """The hyper-parameters of a class, by name.

    Raises:
        UserError: Where one was not made with ``parameter``, or the class is no dataclass itself.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, annotation in _types_of(kind).items():
        if typing.get_origin(annotation) is ClassVar:
            continue
        if name not in fields or "meaning" not in fields[name].metadata:
            raise UserError(
                f"{name} of {kind.__name__} is no hyper-parameter; expected a class under "
                f"@dataclasses.dataclass(frozen=True), and a field made with parameter(default, meaning, ...)."
            )
    return fields


def check_value(kind: type[HyperParameters], name: str, value: Any, block: str = "") -> Any:
    """Bring a JSON value to the declared type.

    Args:
        kind: The class that declares the name.
        name: A hyper-parameter of that class.
        value: What the plans file or the command line says.
        block: The method's name where the value stands in its object; for the messages.

    Returns:
        The value in its declared type.

    Raises:
        UserError: Where it does not fit.
    """
    meta = declared(kind)[name].metadata
    place = f"{block}.{name}" if block else name
    try:
        converted = _convert(value, _types_of(kind)[name])
    except TypeError:
        raise UserError(
            f"Hyper-parameter {place} must be {describe_type(kind, name)}, got {value!r} ({type(value).__name__}). "
            f"Meaning: {meta['meaning']}."
        ) from None
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        below = meta["minimum"] is not None and not number >= meta["minimum"]
        above = meta["maximum"] is not None and not number <= meta["maximum"]
        if below or above:
            raise UserError(
                f"Hyper-parameter {place} must lie between {meta['minimum']} and {meta['maximum']}, got {value!r}."
            )
    if meta["choices"] and converted not in meta["choices"]:
        raise UserError(f"Hyper-parameter {place} must be one of {list(meta['choices'])}, got {value!r}.")
    return converted


def describe_type(kind: type[HyperParameters], name: str) -> str:
    """The declared type in words: "a number or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return " or ".join(words.get(t, "a list of whole numbers") for t in _alternatives(_types_of(kind)[name]))


def _types_of(kind: type[HyperParameters]) -> dict[str, Any]:
    return kind._types or typing.get_type_hints(kind)


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


def _unknown_flat_name(name: str, own: Iterable[str], blocks: Sequence[str]) -> str:
    """Why a name cannot stand flat in the plans, and what was meant."""
    of_methods = dict(FORMER_NAMES)
    for mine in (set(own) - SHARED) if blocks else ():
        known = of_methods.get(mine, ())
        # A place that this trainer reads may be listed already, by the block that all trainers of its method read.
        if not any(place.partition(".")[0] in blocks for place in known):
            of_methods[mine] = (*known, f"{blocks[-1]}.{mine}")
    if name in of_methods:
        return f"{name} belongs to a method: write {' or '.join(of_methods[name])}."
    near = difflib.get_close_matches(str(name), [*SHARED, *of_methods], n=1)
    hint = f" Did you mean {' or '.join(of_methods.get(near[0], near))}?" if near else ""
    return (
        f"Unknown hyper-parameter {name!r}.{hint} Shared by all methods are: {', '.join(sorted(SHARED))}. A method's "
        f'own are written METHOD.NAME=VALUE on the command line and "METHOD": {{"NAME": VALUE}} in a plans file; '
        f"'nnunet-ssl trainers METHOD' lists them."
    )


def _unknown_name_in_block(block: str, name: str, own: Iterable[str]) -> str:
    """Why a name cannot stand in a method's object, and what was meant."""
    near = difflib.get_close_matches(str(name), own, n=1)
    hint = f" Did you mean {block}.{near[0]}?" if near else ""
    if name in FORMER_NAMES:
        hint = f" Write {' or '.join(FORMER_NAMES[name])}."
    return f"Unknown hyper-parameter {block}.{name}.{hint} {block} has: {', '.join(sorted(own))}."
