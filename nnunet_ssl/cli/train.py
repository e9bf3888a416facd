"""Train in the processes that torchrun started, on one machine or on several.

Takes the arguments of nnUNetv2_train, which starts processes on one machine only (there, use its -num_gpus):

torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python nnunet-ssl train 501
3d_fullres 0 -tr nnUNetTrainerSemiTC

All machines need the same three folders of nnU-Net. The plan's batch is shared among all processes.
"""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nnUNetv2_train's options, but the number of GPUs: torchrun knows it."""
    parser.add_argument("dataset", metavar="DATASET", help="data set, number or name")
    parser.add_argument("configuration", metavar="CONFIGURATION", help="e.g. 2d")
    parser.add_argument("fold", metavar="FOLD", help="number of the fold, or all")
    parser.add_argument("-tr", dest="trainer", required=True, metavar="TRAINER", help="a trainer of this package")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default nnUNetPlans")
    parser.add_argument("-pretrained_weights", metavar="FILE", help="checkpoint whose weights to start from")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--npz", action="store_true", help="also write the validation's probabilities")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--c", dest="continues", action="store_true", help="continue from the latest checkpoint")
    stages.add_argument("--val", action="store_true", help="only validate")
    checkpoints = parser.add_mutually_exclusive_group()
    checkpoints.add_argument(
        "--val_best", action="store_true", help="validate checkpoint_best instead of the final one"
    )
    checkpoints.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Train and validate in this process, together with the others."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    from nnunet_ssl.errors import UserError
    from nnunet_ssl.nnunet.folders import dataset_name, read_plans, require_configurations, require_variables
    from nnunet_ssl.nnunet.patching import pretrained_weights_on_cpu
    from nnunet_ssl.runtime.distributed import joined_processes

    _check_trainer(arguments.trainer)
    _, preprocessed, _ = require_variables("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    name = dataset_name(arguments.dataset)
    require_configurations(read_plans(preprocessed / name, arguments.plans), [arguments.configuration])
    if arguments.fold != "all" and not arguments.fold.isdecimal():
        raise UserError(f"The fold is {arguments.fold!r}; expected its number, or all.")
    fold = arguments.fold if arguments.fold == "all" else int(arguments.fold)
    with joined_processes(arguments.device) as device:
        trainer = get_trainer_from_args(
            name, arguments.configuration, fold, arguments.trainer, arguments.plans, arguments.continues, device
        )
        trainer.disable_checkpointing = arguments.disable_checkpointing
        with pretrained_weights_on_cpu():
            maybe_load_checkpoint(trainer, arguments.continues, arguments.val, arguments.pretrained_weights)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        if not arguments.val:
            trainer.run_training()
        if arguments.val_best:
            trainer.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_best.pth"))
        trainer.perform_actual_validation(arguments.npz)
    return 0


def _check_trainer(name: str) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_ssl.errors import UserError
    from nnunet_ssl.training.trainer import SemiSupervisedTrainer

    try:
        found = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise UserError(f'{error} To find the trainers of this package: eval "$(nnunet-ssl env)"') from None
    if not issubclass(found, SemiSupervisedTrainer):
        raise UserError(
            f"{name} is not a trainer of this package, and nnU-Net's own know one machine only. "
            f"nnUNetTrainerSupervised is nnUNetTrainer step for step."
        )
