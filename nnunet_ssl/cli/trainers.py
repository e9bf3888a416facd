"""List the trainers; with a name, the hyper-parameters of that trainer with type, default and meaning.

Your own trainers are listed too, where nnUNet_extTrainer names their folders (nnunet-ssl env --also DIR).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", metavar="TRAINER", help="e.g. nnUNetTrainerSemiTC or SemiTC")


def run(arguments: argparse.Namespace) -> int:
    """Print the table or one trainer's hyper-parameters."""
    if arguments.name is None:
        return _list()
    name = arguments.name.removeprefix("nnUNetTrainer")
    known = built_in_methods()
    if name not in known:
        known = known_methods()
    if name not in known:
        raise UserError(
            f"No trainer {arguments.name!r}; there are {', '.join(t.__name__ for t in known.values())}. Trainers of "
            f"your own are found in the folders that nnUNet_extTrainer names: nnunet-ssl env --also DIR."
        )
    trainer = known[name]
    print(f"{trainer.__name__}: {_first_line(trainer)}")
    _print_hyperparameters(trainer)
    return 0


def built_in_methods() -> dict[str, type[SemiSupervisedTrainer]]:
    """The trainers of this package by the names of their methods."""
    from nnunet_ssl.methods import TRAINERS
    from nnunet_ssl.training.hyperparameters import method_name

    return {method_name(trainer): trainer for trainer in TRAINERS}


def known_methods() -> dict[str, type[SemiSupervisedTrainer]]:
    """The same, and after them those in other folders that nnUNet_extTrainer names.

    Raises:
        UserError: For a file in such a folder that cannot be imported.
    """
    from nnunet_ssl.training.hyperparameters import method_name

    found = built_in_methods()
    for trainers in _in_other_folders().values():
        for trainer in trainers:
            found.setdefault(method_name(trainer), trainer)
    return found


def _in_other_folders() -> dict[str, list[type]]:
    from nnunet_ssl.methods import TRAINERS
    from nnunet_ssl.nnunet.foreign_trainers import load_trainers
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

    found = load_trainers(SemiSupervisedTrainer)
    return {folder: [t for t in trainers if t not in TRAINERS] for folder, trainers in found.items()}


def _list() -> int:
    _print_table(list(built_in_methods().values()))
    for folder, trainers in _in_other_folders().items():
        if trainers:
            print(f"\nIn {folder}:")
            _print_table(trainers)
    print("\nnnunet-ssl trainers TRAINER shows the hyper-parameters; nnunet-ssl configure sets them.")
    return 0


def _print_table(trainers: list[Any]) -> None:
    width = max(len(t.__name__) for t in trainers)
    for trainer in trainers:
        print(f"{trainer.__name__:{width}}  {_first_line(trainer)}")


def _first_line(trainer: type) -> str:
    return (trainer.__doc__ or "").strip().partition("\n")[0]


def _print_hyperparameters(trainer: type[SemiSupervisedTrainer]) -> None:
    from nnunet_ssl.training.hyperparameters import SHARED, declared, describe_type

    kind, blocks = trainer.Parameters, trainer.blocks()
    method = blocks[-1]
    fields = declared(kind)
    own = [name for name in fields if name not in SHARED]
    shown = {f"{method}.{name}": name for name in own} | {name: name for name in fields if name in SHARED}
    width = max(map(len, shown))

    def show(title: str, lines: list[str]) -> None:
        print(f"\n{title}")
        for line in lines:
            field: dataclasses.Field[Any] = fields[shown[line]]
            unit = f", {field.metadata['unit']}" if field.metadata["unit"] else ""
            print(f"{line:{width}}  {describe_type(kind, field.name)}{unit}; default {json.dumps(field.default)}")
            print(f"{'':{width}}  {field.metadata['meaning']}")

    if own:
        show(f"Of {method}:", [line for line in shown if line not in SHARED])
    show(f"Shared by all methods; {method}.NAME sets one for {method} alone:", [n for n in shown if n in SHARED])
    if len(blocks) > 1:
        print(f"\nWhat is set for {' and '.join(blocks[:-1])} holds for {method} too, unless {method} has its own.")
