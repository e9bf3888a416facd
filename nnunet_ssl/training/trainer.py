"""SemiSupervisedTrainer: nnU-Net's training with a second loader and named loss terms.

A method derives from it, names its hyper-parameters and loss terms, and implements what ``Method`` asks for. Everything
else (second loader, schedule of stages, logging, checkpoints, resuming) is done here once.
"""

from __future__ import annotations

import os
from typing import Any, Generic, cast

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from nnunet_ssl.blocks.networks import bare
from nnunet_ssl.errors import UserError
from nnunet_ssl.nnunet.loss import with_ignored_voxels
from nnunet_ssl.nnunet.trainers_folder import check_found_through_trainers_folder
from nnunet_ssl.runtime.compilation import compile_per_shape
from nnunet_ssl.runtime.distributed import mean_over_ranks
from nnunet_ssl.runtime.memory import peak_memory
from nnunet_ssl.training.checkpoint import COMPANIONS, random_state, read_state, restore_random_state, write_checkpoint
from nnunet_ssl.training.hyperparameters import MethodParameters
from nnunet_ssl.training.learned import LearnedStructures, names_of_channels
from nnunet_ssl.training.logger import TermLogger
from nnunet_ssl.training.method import Method
from nnunet_ssl.training.monitor import STABILITY, Monitor, View, picture_file
from nnunet_ssl.training.run_record import note_costs, note_validation, write_record
from nnunet_ssl.training.schedules import LR_FACTOR, RestartingPolyLRScheduler
from nnunet_ssl.training.step import LossTerm, finish_step
from nnunet_ssl.training.step_guard import StepGuard
from nnunet_ssl.training.tools import P
from nnunet_ssl.training.two_loaders import TwoLoaderTrainer
from nnunet_ssl.training.warm_up import warm_up

_FINAL = "checkpoint_final.pth"


class SemiSupervisedTrainer(Method[P], TwoLoaderTrainer, Generic[P]):
    """nnU-Net's trainer with a second loader, for cases without labels, and with named loss terms.

    The total batch is the plan's, all labeled in stage 1, shared between labeled and unlabeled examples in stage 2; a
    plan's batch of 1 becomes 2, then 1 + 1. Training may run in two stages: labels alone first, then everything, with
    the learning rate restarted at the switch.

    What a method adds is declared by ``Method``; every further network is a ``Companion``.
    """

    batch_size: int
    oversample_foreground_percent: float

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads this signature)
    ) -> None:
        check_found_through_trainers_folder(SemiSupervisedTrainer)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.companions = {}
        self._statistics = {}
        self.monitor: Monitor | None = None
        self._weights_file = _FINAL
        self._guard = StepGuard(self.print_to_log_file)
        self._iterations_done_in_epoch = 0
        self._unlabeled_terms_are_on = False
        self._state_to_restore: dict[str, Any] | None = None

    # ---- nnU-Net's hooks, in the order of a training ----------------------------------------------------------------

    def initialize(self) -> None:
        """Build all networks, optimizer and loss."""
        if self._do_i_compile():
            compile_per_shape()
        self.build_networks()
        own_loss = nnUNetTrainer._build_loss(self)
        self.masked_loss = with_ignored_voxels(own_loss, self.has_regions, self.ignore_value)
        self.build_average()
        self.build()
        # One optimizer, so that one schedule and one gradient scaler serve all networks.
        for companion in (c for c in self.companions.values() if c.trained):
            parameters = list(companion.module.parameters())
            self.optimizer.add_param_group({"params": parameters, LR_FACTOR: companion.learning_rate})
        watched = (STABILITY,) if self.uses_unlabeled else ()
        self.logger.local_logger = TermLogger(self.term_names, self.unlabeled_terms, self.statistic_names, watched)
        wanted_dice = self.hp.learned_dice if isinstance(self.hp, MethodParameters) else 0.0
        structures = names_of_channels(self.dataset_json["labels"], self.label_manager)
        self.learned = LearnedStructures(structures, len(self.predictors), wanted_dice)
        self.seed_everything(dist.get_rank() if self.is_ddp else 0)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch deep supervision of all networks."""
        super().set_deep_supervision_enabled(enabled)
        for companion in self.companions.values():
            companion.set_deep_supervision(enabled)

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        """nnU-Net's optimizer; its learning rate restarts at the switch of stages."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, RestartingPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, self.switch_epoch)

    def on_train_start(self) -> None:
        """Check the cases before anything is loaded, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        self.check_cases()
        super().on_train_start()
        if self.local_rank == 0:
            write_record(self.output_folder, self.record(), self.current_epoch > 0, self.print_to_log_file)
            if self.uses_unlabeled:
                self.monitor = Monitor(self.unlabeled_cases, self.unlabeled_patch_size, self.previous_stage)
        if self._do_i_compile():
            seconds = warm_up(self)
            self.print_to_log_file(f"Compiled the networks for the batches of the training in {seconds:.0f} s")
        if self._state_to_restore is not None:
            # Only now: making the loaders has drawn from the generators.
            if not restore_random_state(self._state_to_restore, self.device, self.generator):
                self.print_to_log_file("The checkpoint is from another kind of device: random numbers start anew")
            self._state_to_restore = None

    def on_train_epoch_start(self) -> None:
        """Put the networks into training mode and announce the switch of stages."""
        self._iterations_done_in_epoch = 0
        self._unlabeled_terms_are_on = False
        self._guard.start_epoch()
        super().on_train_epoch_start()
        for companion in self.companions.values():
            companion.start_epoch()
        if 0 < self.switch_epoch == self.current_epoch:
            self.print_to_log_file("Stage 2: the semi-supervised terms are on, the learning rate restarts")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One optimizer step on the labeled batch and an unlabeled (stage 1: labeled) one; none if it is not finite."""
        labeled, unlabeled = self.batches(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self._statistics = {}
        with self.autocast():
            made = self.step(labeled, unlabeled)
            counts = self.overlap_counts(*made.known) if self.unlabeled_terms else None
        terms = self._weighted(made.losses)
        names = self.logger.local_logger.step_names
        told = {**self._statistics, **{name: term.value for name, term in terms.items()}}
        told |= {TermLogger.weight(name): terms[name].weight for name in self.unlabeled_terms if name in terms}
        values = [told.get(name, float("nan")) for name in names]
        outcome = finish_step(terms, values, counts, self.trained, self.optimizer, self.grad_scaler)
        if outcome.is_finite and counts is not None:
            self.learned.note(outcome.counts)
        by_name = dict(zip(names, outcome.values.tolist()))
        keys = [*labeled.keys, *(unlabeled.keys if unlabeled is not None else ())]
        self._guard.note(outcome.is_finite, {name: by_name[name] for name in terms}, keys)
        if outcome.moved:
            for companion in self.companions.values():
                companion.after_step()
        self._iterations_done_in_epoch += 1
        return {"loss": outcome.loss, "terms": outcome.values, "finite": outcome.is_finite}

    def _weighted(self, losses: dict[str, Tensor]) -> dict[str, LossTerm]:
        """The terms with their weights; those that need more than labels wait until a structure is learned."""
        unknown = set(losses) - set(self.term_names)
        if unknown:
            raise ValueError(f"{type(self).__name__} gives {sorted(unknown)}; declare them as terms of the method.")
        weights = {name: 1.0 if name in self.supervised_terms else self.weight(name) for name in losses}
        of_unlabeled = [name for name in losses if name in self.unlabeled_terms]
        self._unlabeled_terms_are_on = any(weights[name] > 0 for name in of_unlabeled)
        if self.learned.all_wait:
            weights |= dict.fromkeys(of_unlabeled, 0.0)
        return {name: LossTerm(value, weights[name]) for name, value in losses.items()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the mean of every term and statistic over the epoch and over ranks."""
        taken = [output for output in train_outputs if output["finite"]]
        if len(taken) < len(train_outputs):
            self.print_to_log_file(f"{self._guard.skipped_in_epoch} steps of this epoch were skipped")
        train_outputs = taken or train_outputs
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        # The same terms were on in every step of the epoch: stages switch between epochs.
        means = torch.from_numpy(np.stack([output["terms"] for output in train_outputs]).mean(0)).to(self.device)
        for name, mean in zip(self.logger.local_logger.step_names, mean_over_ranks(means).tolist()):
            self.logger.log(TermLogger.key(name), mean, self.current_epoch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, in the precision of the training."""
        with self.autocast():
            return cast("dict[str, Any]", super().validation_step(batch))

    def on_epoch_end(self) -> None:
        """Look at the unlabeled patches, print the loss terms, then do what nnU-Net does."""
        if self.monitor is not None:
            self._watch(self.monitor)
        waiting = self.learned.describe() if self._unlabeled_terms_are_on else None
        for line in [*self.logger.local_logger.lines(), *filter(None, [waiting])]:
            self.print_to_log_file(line)
        super().on_epoch_end()

    def look(self, monitor: Monitor) -> View:
        """What the method makes of the watched patches.

        Changes nothing in the training: no gradient, no random number of its generators; one rank can look alone.
        """
        with torch.no_grad(), self.autocast(), self.weights_that_predict():
            return self.view(monitor.images.to(self.device), monitor.generator(self.generator.device))

    def _watch(self, monitor: Monitor) -> None:
        view = self.look(monitor)
        self.logger.log(TermLogger.key(STABILITY), monitor.stability(view), self.current_epoch)
        epoch, every = self.current_epoch + 1, self.hp.picture_every
        if every > 0 and (epoch % every == 0 or epoch == self.num_epochs):
            try:
                monitor.draw(picture_file(self.output_folder, epoch), view)
            except UserError as error:
                # A full disk must not end a training for a picture's sake.
                self.print_to_log_file(f"WARNING: {error}")

    def on_train_end(self) -> None:
        """Write checkpoint_final.pth and stop the loaders."""
        super().on_train_end()
        self._weights_file = _FINAL
        # A finished training that is started again takes no step.
        if self.local_rank == 0 and self._iterations_done_in_epoch:
            log = self.logger.local_logger.my_fantastic_logging
            times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"])
            note_costs(self.output_folder, [end - start for start, end in times], peak_memory(self.device))
        if self.is_ddp:
            # Others may load next what the first process has just written.
            dist.barrier()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; then note which checkpoint predicted. Until it has ended, none has."""
        if self.local_rank == 0:
            note_validation(self.output_folder, None)
        with self.weights_that_predict():
            super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            note_validation(self.output_folder, self._weights_file)

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint, atomically, with the state that resuming needs under a key of its own.

        ``trainer_name`` says nnUNetTrainer where the network is the plan's own: such a file predicts on stock nnU-Net
        without this package.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        with self.weights_that_predict():
            stock_network = type(self).build_network_architecture is nnUNetTrainer.build_network_architecture
            stock = {
                "network_weights": bare(self.network).state_dict(),
                "optimizer_state": self.optimizer.state_dict(),
                "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
                "logging": self.logger.get_checkpoint(),
                "_best_ema": self._best_ema,
                "current_epoch": self.current_epoch + 1,
                "init_args": self.my_init_kwargs,
                "trainer_name": nnUNetTrainer.__name__ if stock_network else type(self).__name__,
                "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            }
            ours = {
                "trainer": type(self).__name__,
                "hyperparameters": self.hp.as_dict(),
                COMPANIONS: self.companion_states(),
                "memory": self.memory(),
                "learned": self.learned.state(),
                "random_state": random_state(self.device, self.generator),
            }
            write_checkpoint(filename, stock, ours)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load nnU-Net's part and ours; random states are put back when training starts."""
        # First, because a checkpoint of another trainer must not be half loaded.
        state = read_state(filename_or_checkpoint, type(self).__name__)
        super().load_checkpoint(filename_or_checkpoint)
        if isinstance(filename_or_checkpoint, str):
            self._weights_file = os.path.basename(filename_or_checkpoint)
        self.restore_companions(state[COMPANIONS])
        self.recall(state["memory"])
        self.learned.restore(state)
        then = state["hyperparameters"]
        changed = [f"{k} {v} (was {then[k]})" for k, v in self.hp.as_dict().items() if then.get(k, v) != v]
        if changed:
            self.print_to_log_file("WARNING: hyper-parameters changed since this checkpoint:", ", ".join(changed))
        if self.local_rank == 0:
            self._state_to_restore = state["random_state"]
        else:
            # The file holds rank 0's state; other ranks must draw something else, and not epoch 0's again.
            self.seed_everything(self.local_rank + 1000 * self.current_epoch)
