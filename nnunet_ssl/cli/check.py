"""Put trainers to the test that this package's own pass: yours too.

A few minutes on the CPU per trainer, on made-up images in a temporary folder. Your own trainers are found where
nnUNet_extTrainer names their folders (nnunet-ssl env --also DIR).
"""

from __future__ import annotations

import argparse
import contextlib
import textwrap
from typing import TYPE_CHECKING

from nnunet_ssl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnunet_ssl.testing.check import Outcome

_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("trainers", nargs="*", metavar="TRAINER", help="e.g. nnUNetTrainerSemiTC or SemiTC")
    parser.add_argument("--only", nargs="+", default=[], metavar="PROMISE", help="try these alone")
    parser.add_argument("--list", action="store_true", help="list the promises, and do nothing else")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "mps"),
        default="cpu",
        help="where steps are tried; what is compared bit by bit stays on the CPU (default cpu). On cuda, waits, "
        "recompilations, time and memory are told too",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a table per trainer; 1 where a promise is broken."""
    from nnunet_ssl.testing.check import BROKEN, PROMISES, check_method, require_device, select
    from nnunet_ssl.testing.device import measure

    if arguments.list:
        width = max(len(promise.name) for promise in PROMISES)
        print("\n".join(f"{promise.name:{width}}  {promise.says}" for promise in PROMISES))
        return 0
    if not arguments.trainers:
        raise UserError("Name a trainer, e.g. nnunet-ssl check SemiTC; nnunet-ssl trainers lists them.")
    # All that can be refused at once, before minutes are spent.
    select(arguments.only)
    require_device(arguments.device)
    classes = [find(name) for name in arguments.trainers]
    is_broken = False
    for cls in classes:
        print(f"{cls.__name__}", flush=True)
        outcomes = check_method(cls, arguments.only, arguments.device)
        print(report(outcomes), flush=True)
        if arguments.device == "cuda":
            print("\n".join(["", *measure(cls, arguments.device)]), flush=True)
        is_broken = is_broken or any(outcome.state == BROKEN for outcome in outcomes)
    return int(is_broken)


def find(name: str) -> type:
    """A trainer by its name, with or without nnUNetTrainer: of this package, or one that nnU-Net finds.

    Raises:
        UserError: Where there is none, or it is none of those that promise anything.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_ssl.cli.trainers import built_in_methods, known_methods
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

    short = name.removeprefix("nnUNetTrainer")
    known = built_in_methods()
    if short not in known:
        known = known_methods()
    if short in known:
        return known[short]
    try:
        # nnU-Net prints where it looks.
        with contextlib.redirect_stdout(None):
            found: type = recursive_find_trainer_class_by_name(f"nnUNetTrainer{short}")
    except RuntimeError:
        raise UserError(
            f"No trainer {name!r}; there are {', '.join(t.__name__ for t in known.values())}. Trainers of your own are "
            f"found in the folders that nnUNet_extTrainer names: nnunet-ssl env --also DIR."
        ) from None
    if not issubclass(found, SemiSupervisedTrainer):
        raise UserError(
            f"{found.__name__} does not derive from nnunet_ssl.training.SemiSupervisedTrainer, so it promises nothing. "
            f"Derive from it to learn from unlabeled images; nnUNetTrainerSupervised is nnUNetTrainer step for step."
        )
    return found


def report(outcomes: Sequence[Outcome]) -> str:
    """The table, and below it what is broken: what was found, and where to look."""
    names, says = (max(map(len, column)) for column in zip(*((o.promise, o.says) for o in outcomes)))
    lines = [f"{o.promise:{names}}  {o.says:{says}}  {o.state:9}  {o.seconds:5.1f} s" for o in outcomes]
    for outcome in outcomes:
        if not outcome.found:
            continue
        lines += ["", f"{outcome.promise}: {outcome.state}"]
        for text in filter(None, (outcome.found, outcome.look)):
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
        if outcome.log:
            lines += ["  The last lines that were printed:", textwrap.indent(outcome.log, "  | ")]
    return "\n".join(lines)
