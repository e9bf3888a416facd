"""Write a plans file with hyper-parameters for our trainers, and with a smaller network if asked for.

nnU-Net keeps the results of each plans name apart and saves the plans with the model, so every run says what it ran
with. Use the same plans file for all trainers of a comparison.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping
from typing import Any

from nnunet_ssl.cli.trainers import built_in_methods, known_methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="data set, number or name")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="plans to start from")
    parser.add_argument("-o", dest="output", required=True, metavar="NAME", help="name of the new plans")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="hyper-parameters; values as in JSON, e.g. num_epochs=20 mirror_axes=[] SemiTC.interpolation=nearest. "
        "'nnunet-ssl trainers TRAINER' lists them",
    )
    parser.add_argument("-c", dest="configuration", metavar="CONFIGURATION", help="whose network to change")
    parser.add_argument("--overwrite", action="store_true", help="replace the plans of that name")
    parser.add_argument(
        "--partner-network",
        action="store_true",
        help="replace the network of -c by the one that nnUNetTrainerDualNet pairs it with, to train that one alone",
    )
    small = parser.add_argument_group("a smaller network (for CPUs and quick experiments)")
    small.add_argument(
        "--downscale", type=float, default=1.0, metavar="X", help="coarser voxels; run nnUNetv2_preprocess afterwards"
    )
    small.add_argument("--patch-size", type=int, nargs="+", metavar="N", help="patch, in voxels")
    small.add_argument("--batch-size", type=int, metavar="N", help="batch size")
    small.add_argument("--base-features", type=int, metavar="N", help="features of the first stage")
    small.add_argument("--max-features", type=int, metavar="N", help="upper bound on the features of a stage")


def run(arguments: argparse.Namespace) -> int:
    """Write the file and say what to run next."""
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.files import write_atomically
    from nnunet_ssl.nnunet.checks import using
    from nnunet_ssl.nnunet.folders import dataset_name, read_plans, require_configurations, require_variables
    from nnunet_ssl.nnunet.plans import PLANS_KEY, shrink, with_hyperparameters, with_partner_network

    (preprocessed,) = require_variables("nnUNet_preprocessed")
    name = dataset_name(arguments.dataset)
    file = preprocessed / name / f"{arguments.output}.json"
    if file.exists() and not arguments.overwrite:
        raise UserError(f"{file} exists already. Choose another name, or add --overwrite.")
    plans = with_hyperparameters(
        read_plans(preprocessed / name, arguments.plans), arguments.output, parse_settings(arguments.settings)
    )
    for warning in check_hyperparameters(plans[PLANS_KEY]):
        print(f"WARNING: {warning}", file=sys.stderr)
    sizes = (arguments.patch_size, arguments.batch_size, arguments.base_features, arguments.max_features)
    smaller = arguments.downscale != 1 or any(size is not None for size in sizes)
    if arguments.configuration is not None:
        require_configurations(plans, [arguments.configuration])
    elif smaller or arguments.partner_network:
        raise UserError("Name the configuration whose network to change with -c, e.g. -c 2d.")
    with using(f"{arguments.plans}.json"):
        if smaller:
            plans = shrink(
                plans,
                arguments.configuration,
                downscale=arguments.downscale,
                patch_size=arguments.patch_size,
                batch_size=arguments.batch_size,
                base_features=arguments.base_features,
                max_features=arguments.max_features,
            )
        if arguments.partner_network:
            plans = with_partner_network(plans, arguments.output, arguments.configuration)
    write_atomically(str(file), json.dumps(plans, indent=4).encode())
    print(f"Written to {file}; train with -p {arguments.output}")
    if arguments.downscale > 1:
        command = (
            f"nnUNetv2_preprocess -d {int(name[7:10])} -c {arguments.configuration} -plans_name {arguments.output}"
        )
        print(f"Preprocess first: {command}")
    return 0


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["num_epochs=20", "SemiTC.interpolation=nearest"]`` to names and values, as they stand in plans.

    Raises:
        UserError: For a setting without a name or "=".
    """
    from nnunet_ssl.errors import UserError
    from nnunet_ssl.nnunet.plans import merged

    values: dict[str, Any] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        *block, name = place.strip().split(".")
        if not equals or not name or len(block) > 1 or "" in block:
            raise UserError(f"--set {setting!r}: expected NAME=VALUE or METHOD.NAME=VALUE.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values = merged(values, {block[0]: {name: value}} if block else {name: value})
    return values


def check_hyperparameters(table: Mapping[str, Any]) -> list[str]:
    """Check what the block "ssl" of plans says to every method that it names.

    Returns:
        Warnings about methods that are not known here.

    Raises:
        UserError: For a name that nobody knows, an ill-typed value or one out of range.
    """
    from nnunet_ssl.nnunet.plans import PLANS_KEY
    from nnunet_ssl.training.hyperparameters import SHARED, MethodParameters

    known = built_in_methods()
    # Objects are methods; whatever has a method's name should be one.
    named = [name for name, value in table.items() if isinstance(value, Mapping) and name not in SHARED]
    if not known.keys() >= set(named):
        known = known_methods()
    for trainer in (known[name] for name in table if name in known):
        blocks = {block: table[block] for block in trainer.blocks() if block in table}
        trainer.read_hyperparameters({PLANS_KEY: blocks})
    MethodParameters.from_plans({PLANS_KEY: table})
    return [_about_unknown(name, known) for name in named if name not in known]


def _about_unknown(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"no method is called {name}.{hint} Its hyper-parameters are written as they are, unchecked. Known are "
        f"{', '.join(known)}; those of other people in the folders that nnUNet_extTrainer names."
    )
