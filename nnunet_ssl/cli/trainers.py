"""List the trainers; with a name, the hyper-parameters of that trainer with type, default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import json

from nnunet_ssl.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", metavar="TRAINER", help="e.g. nnUNetTrainerSemiTC or SemiTC")


def run(arguments: argparse.Namespace) -> int:
    """Print the table or one trainer's hyper-parameters."""
    from nnunet_ssl.methods import TRAINERS

    if arguments.name is None:
        width = max(len(t.__name__) for t in TRAINERS)
        for trainer in TRAINERS:
            print(f"{trainer.__name__:{width}}  {_first_line(trainer)}")
        print("\nnnunet-ssl trainers TRAINER shows the hyper-parameters; nnunet-ssl configure sets them.")
        return 0
    names = {t.__name__: t for t in TRAINERS} | {t.__name__.removeprefix("nnUNetTrainer"): t for t in TRAINERS}
    if arguments.name not in names:
        raise UserError(f"No trainer {arguments.name!r}; there are {', '.join(t.__name__ for t in TRAINERS)}.")
    trainer = names[arguments.name]
    print(f"{trainer.__name__}: {_first_line(trainer)}\n")
    _print_hyperparameters(trainer.hyperparameters_class)
    return 0


def _first_line(trainer: type) -> str:
    return (trainer.__doc__ or "").strip().splitlines()[0]


def _print_hyperparameters(kind: type) -> None:
    from nnunet_ssl.training.hyperparameters import describe_type

    fields = dataclasses.fields(kind)
    width = max(len(f.name) for f in fields)
    for field in fields:
        meta = field.metadata
        unit = f", {meta['unit']}" if meta["unit"] else ""
        print(f"{field.name:{width}}  {describe_type(kind, field.name)}{unit}; default {json.dumps(field.default)}")
        print(f"{'':{width}}  {meta['meaning']}")
