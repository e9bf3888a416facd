"""SemiSupervisedTrainer: the only place that overrides nnU-Net's training.

A method derives from it, names its hyper-parameters and loss terms, and implements ``loss_terms``. Everything else
(second loader, schedule of stages, logging, checkpoints, resuming) is done here once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from nnunet_ssl.blocks.networks import bare, set_deep_supervision
from nnunet_ssl.blocks.partner import build_partner
from nnunet_ssl.data.augmentation import Augmentation, adjust, check_mirror_axes, warning_about_sides
from nnunet_ssl.data.batches import Labeled, LabeledBatches, Unlabeled, describe_training, share_batch
from nnunet_ssl.data.cases import UnlabeledCase, cases_with_ignored_voxels, find_unlabeled_cases, hidden_cases
from nnunet_ssl.data.loader import LoaderSettings, make_unlabeled_loader
from nnunet_ssl.data.preprocessing import preprocessing_settings
from nnunet_ssl.data.previous_stage import PreviousStage, check_complete, check_no_hidden_labels
from nnunet_ssl.data.splits import check_preprocessed, read_splits
from nnunet_ssl.data.views import STRONG, WEAK
from nnunet_ssl.data.workers import WatchedAugmenter
from nnunet_ssl.nnunet.checks import check_configuration, check_dataset_json, check_labels_of_cases, using
from nnunet_ssl.nnunet.patching import replaced_in_trainer_module
from nnunet_ssl.nnunet.trainers_folder import check_found_through_trainers_folder
from nnunet_ssl.runtime.cpu import prepare_cpu
from nnunet_ssl.runtime.distributed import data_parallel, device_of_process, mean_over_ranks
from nnunet_ssl.training.checkpoint import read_state, restore_random_state, write_checkpoint
from nnunet_ssl.training.learned import LearnedStructures, names_of_channels
from nnunet_ssl.training.logger import TermLogger
from nnunet_ssl.training.method import Method
from nnunet_ssl.training.monitor import STABILITY, Monitor, picture_file
from nnunet_ssl.training.run_record import note_validation, write_record
from nnunet_ssl.training.schedules import RestartingPolyLRScheduler
from nnunet_ssl.training.step import LossTerm, backward, gradient_is_broken, on_host, scaled, step, weighted_sum
from nnunet_ssl.training.step_guard import StepGuard

# Hyper-parameters that nnU-Net's trainer holds as attributes of the same name.
_NNUNETS_OWN = (
    *("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "weight_decay"),
    *("save_every", "oversample_foreground_percent"),
)
_FINAL = "checkpoint_final.pth"


class SemiSupervisedTrainer(Method, nnUNetTrainer):
    """nnU-Net's trainer with a second loader, for cases without labels, and with named loss terms.

    The total batch is the plan's, all labeled in stage 1, shared between labeled and unlabeled examples in stage 2; a
    plan's batch of 1 becomes 2, then 1 + 1. Training may run in two stages: labels alone first, then everything, with
    the learning rate restarted at the switch.

    What a method adds is declared by ``Method``. A second network is trained by the same optimizer, saved, resumed and
    exported.
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
        plans_file = f"{plans.get('plans_name')}.json"
        check_configuration(plans, configuration, plans_file)
        check_dataset_json(dataset_json, "dataset.json")
        self.hp = self._read_hyperparameters(plans)
        check_mirror_axes(self.hp, PlansManager(plans).get_configuration(configuration).patch_size)
        self._files = f"{plans_file} or dataset.json"
        with using(self._files):
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self.device = device_of_process(device)
            if self.device.type != "cuda":
                self.grad_scaler = None
        for name in _NNUNETS_OWN:
            setattr(self, name, getattr(self.hp, name))
        self.logger.local_logger = TermLogger(
            self.term_names, self.unlabeled_terms, self.statistic_names, (STABILITY,) if self.uses_unlabeled else ()
        )
        self.partner: nn.Module | None = None
        self.statistics: dict[str, Tensor | float] = {}
        self.labeled_overlap: Tensor | None = None
        self.unlabeled_batch_size = 0
        self.dataloader_unlabeled: Iterator[dict[str, Any]] | None = None
        self.monitor: Monitor | None = None
        self._unlabeled_cases: list[UnlabeledCase] = []
        self._weights_file = _FINAL
        self.generator = torch.Generator()
        self._guard = StepGuard(self.print_to_log_file)
        self._iterations_done_in_epoch = 0
        self._stage_1 = LabeledBatches()
        self._unlabeled_terms_are_on = False
        self._state_to_restore: dict[str, Any] | None = None
        self.print_to_log_file(f"Hyper-parameters: {self.hp.as_dict()}", add_timestamp=False)
        if device.type == "cpu":
            prepare_cpu(self.hp.cpu_bfloat16, self.print_to_log_file)

    # ---- nnU-Net's hooks, in the order of a training ----------------------------------------------------------------

    def initialize(self) -> None:
        """Build network, optimizer and loss, from the seed where there is one."""
        rank = dist.get_rank() if self.is_ddp else 0
        if self.hp.seed is not None:
            # Weights alike on all ranks (DDP would copy rank 0's anyway), everything drawn later different.
            torch.manual_seed(self.hp.seed)
        with replaced_in_trainer_module(DDP=data_parallel), using(self._files):
            super().initialize()
        plans = self.partner_plans()
        if plans is not None:
            self.partner = build_partner(self, plans)
            # One optimizer, so that one learning rate and one gradient scaler serve both networks.
            self.optimizer.add_param_group({"params": list(self.partner.parameters())})
        structures = names_of_channels(self.dataset_json["labels"], self.label_manager)
        self.learned = LearnedStructures(structures, len(self.networks), getattr(self.hp, "learned_dice", 0.0))
        self.generator = torch.Generator(device=self.device if self.device.type == "cuda" else "cpu")
        if self.hp.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.hp.seed + rank)
            torch.manual_seed(self.hp.seed + rank)
            np.random.seed(self.hp.seed + rank)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch deep supervision of all networks."""
        super().set_deep_supervision_enabled(enabled)
        for network in self.networks[1:]:
            set_deep_supervision(network, enabled)

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        if self.uses_unlabeled:
            self.probabilistic_oversampling = True
            self._share_batch(0, 1)  # the cases are not known yet: as if the unlabeled ones were the many

    def _share_batch(self, labeled_cases: int, unlabeled_cases: int) -> None:
        total, centered = self.batch_size + self.unlabeled_batch_size, self.oversample_foreground_percent
        shares = share_batch(total, centered, labeled_cases, unlabeled_cases, self.hp.unlabeled_fraction)
        self.batch_size, self.unlabeled_batch_size, self.oversample_foreground_percent = shares

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        """nnU-Net's optimizer; its learning rate restarts at the switch of stages."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, RestartingPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, self.switch_epoch)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Augmentation:  # noqa: N802
        """nnU-Net's choices, with rotation range and mirroring axes as the hyper-parameters say."""
        stock = Augmentation(*super().configure_rotation_dummyDA_mirroring_and_inital_patch_size())
        self._augmentation = adjust(stock, self.hp, self.configuration_manager.patch_size)
        self.inference_allowed_mirroring_axes = self._augmentation.mirror_axes
        warning = warning_about_sides(self.dataset_json["labels"], self._augmentation)
        if warning:
            self.print_to_log_file(warning)
        return self._augmentation

    @staticmethod
    def get_training_transforms(
        patch_size: Any,
        rotation_for_DA: Any,  # noqa: N803
        deep_supervision_scales: Any,
        mirror_axes: Any,
        do_dummy_2d_data_aug: bool,
        **keywords: Any,
    ) -> BasicTransform:
        """nnU-Net's augmentation with targets left at full resolution: a method may still move them."""
        return nnUNetTrainer.get_training_transforms(
            patch_size, rotation_for_DA, None, mirror_axes, do_dummy_2d_data_aug, **keywords
        )

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's two loaders; makes the unlabeled one beside them."""
        watched = functools.partial(WatchedAugmenter, timeout=self.hp.loader_timeout)
        with replaced_in_trainer_module(NonDetMultiThreadedAugmenter=watched):
            labeled, validation = super().get_dataloaders()
        if self.uses_unlabeled:
            self.dataloader_unlabeled = make_unlabeled_loader(self._unlabeled_cases, self.loader_settings())
        return labeled, validation

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's, from a file that is in order.

        Raises:
            UserError: Where the file is damaged, or names cases that are not preprocessed.
        """
        file = os.path.join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold != "all" and os.path.isfile(file):
            read_splits(file)
        train, val = super().do_split()
        folder = self.preprocessed_dataset_folder
        check_preprocessed([*train, *val], self.dataset_class.get_identifiers(folder), folder, self.fold, file)
        return train, val

    def on_train_start(self) -> None:
        """Check the cases before anything is loaded, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        train, val = self.do_split()
        cases = self.dataset_class(self.preprocessed_dataset_folder, sorted({*train, *val}))
        check_labels_of_cases(((c, cases.load_case(c)[3]) for c in cases.identifiers), self.label_manager)
        # All trainers alike: the first stage's segmentations tell of hidden labels, whoever learns from them.
        hidden = hidden_cases(self.preprocessed_dataset_folder, self.fold)
        check_no_hidden_labels(self.previous_stage, hidden, self.fold, self.configuration_name)
        if self.uses_unlabeled:
            self._unlabeled_cases = self.find_unlabeled_cases()
            self._share_batch(len(train), len(self._unlabeled_cases))
            shares = self.batch_size, self.unlabeled_batch_size
            self.print_to_log_file(describe_training(self._unlabeled_cases, *shares, self.switch_epoch > 0))
        super().on_train_start()
        if self.local_rank == 0:
            write_record(self, self._unlabeled_cases)
            if self.uses_unlabeled:
                self.monitor = Monitor(self._unlabeled_cases, self.unlabeled_patch_size, self.previous_stage)
        if self._state_to_restore is not None:
            # Only now: making the loaders has drawn from the generators.
            if not restore_random_state(self._state_to_restore, self.device, self.generator):
                self.print_to_log_file("The checkpoint is from another kind of device: random numbers start anew")
            self._state_to_restore = None

    def on_train_epoch_start(self) -> None:
        """Put the networks into training mode and announce the switch of stages."""
        self._iterations_done_in_epoch = 0
        self._stage_1 = LabeledBatches()  # a training that goes on from here has no leftovers either
        self._unlabeled_terms_are_on = False
        self._guard.start_epoch()
        super().on_train_epoch_start()
        for network in self.networks:
            network.train()
        if 0 < self.switch_epoch == self.current_epoch:
            self.print_to_log_file("Stage 2: the semi-supervised terms are on, the learning rate restarts")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One optimizer step on the labeled batch and an unlabeled (stage 1: labeled) one; none if it is not finite."""
        labeled, unlabeled = Labeled.of(batch).to(self.device), None
        if self.dataloader_unlabeled is not None:
            if self.in_second_stage:
                unlabeled = Unlabeled.of(next(self.dataloader_unlabeled)).to(self.device)
            else:
                whole = self.batch_size + self.unlabeled_batch_size
                labeled = self._stage_1.fill(labeled, self.dataloader_train, whole)
        self.optimizer.zero_grad(set_to_none=True)
        self.labeled_overlap = None
        with self.autocast():
            with_labels = {"data": labeled.images, "target": labeled.target, "keys": labeled.keys}
            full = self.loss_terms(with_labels, None if unlabeled is None else unlabeled.views)
            terms = scaled(full, self.unlabeled_terms, self.learned.share())
            total = weighted_sum(terms)
        norms = backward(total, self.networks, self.optimizer, self.grad_scaler)
        # One transfer for all values: a step waits for the device no more often than the stock trainer's.
        if self.unlabeled_terms and self.labeled_overlap is None:
            raise RuntimeError(f"loss_terms of {type(self).__name__} must call note_learned.")
        overlap = total.new_zeros(0) if self.labeled_overlap is None else self.labeled_overlap.flatten()
        shared = mean_over_ranks(torch.cat([total.detach().float().view(1), overlap.float()]))
        values = self._values_to_log(terms)
        numbers = on_host([*norms, total, *values, shared])
        norms_here, (loss,), logged, (everywhere,), counts = np.split(
            numbers, np.cumsum([len(norms), 1, len(values), 1])
        )
        # Ranks agree on the steps they skip: they share these values.
        is_finite = bool(np.isfinite(everywhere)) and not gradient_is_broken(norms_here, self.grad_scaler)
        step(self.optimizer, self.grad_scaler, is_finite)
        if is_finite and len(counts):
            self.learned.note(counts.reshape(self.learned.counts.shape))
        by_name = dict(zip(self.logger.local_logger.step_names, logged.tolist()))
        keys = [*labeled.keys, *(unlabeled.keys if unlabeled is not None else ())]
        self._guard.note(is_finite, {name: by_name[name] for name in terms}, keys)
        self.after_step()
        self._unlabeled_terms_are_on = any(full[name].weight > 0 for name in self.unlabeled_terms if name in full)
        self._iterations_done_in_epoch += 1
        return {"loss": loss, "terms": logged, "finite": is_finite}

    def _values_to_log(self, terms: dict[str, LossTerm]) -> list[Tensor | float]:
        """Values, weights and statistics in the order of the log; not a number for those that this step has not."""
        values = dict(self.statistics) | {name: term.value for name, term in terms.items()}
        values |= {TermLogger.weight(name): terms[name].weight for name in self.unlabeled_terms if name in terms}
        return [values.get(name, float("nan")) for name in self.logger.local_logger.step_names]

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
            return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        """Look at the unlabeled patches, print the loss terms, then do what nnU-Net does."""
        if self.monitor is not None:
            epoch, every = self.current_epoch + 1, self.hp.picture_every
            wanted = every > 0 and (epoch % every == 0 or epoch == self.num_epochs)
            stability = self.monitor.look(self, picture_file(self.output_folder, epoch) if wanted else None)
            self.logger.log(TermLogger.key(STABILITY), stability, self.current_epoch)
        waiting = self.learned.describe() if self._unlabeled_terms_are_on else None
        for line in [*self.logger.local_logger.lines(), *filter(None, [waiting])]:
            self.print_to_log_file(line)
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Write checkpoint_final.pth and stop the loaders."""
        super().on_train_end()
        self._weights_file = _FINAL
        if isinstance(self.dataloader_unlabeled, WatchedAugmenter):
            self.dataloader_unlabeled._finish()
        if self.is_ddp:
            # Others may load next what the first process has just written.
            dist.barrier()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; then note which checkpoint predicted. Until it has ended, none has."""
        if self.local_rank == 0:
            note_validation(self, None)
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            note_validation(self, self._weights_file)

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint, atomically, with the state that resuming needs under a key of its own."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        write_checkpoint(self, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load nnU-Net's part and ours; random states are put back when training starts."""
        # First, because a checkpoint of another trainer must not be half loaded.
        state = read_state(filename_or_checkpoint, type(self).__name__)
        super().load_checkpoint(filename_or_checkpoint)
        if isinstance(filename_or_checkpoint, str):
            self._weights_file = os.path.basename(filename_or_checkpoint)
        if self.partner is not None:
            bare(self.partner).load_state_dict(state["partner"]["weights"])
        self.learned.restore(state)
        then = state["hyperparameters"]
        changed = [f"{k} {v} (was {then[k]})" for k, v in self.hp.as_dict().items() if then.get(k, v) != v]
        if changed:
            self.print_to_log_file("WARNING: hyper-parameters changed since this checkpoint:", ", ".join(changed))
        if self.local_rank == 0:
            self._state_to_restore = state["random_state"]
        elif self.hp.seed is not None:
            # The file holds rank 0's state; other ranks must draw something else, and not epoch 0's again.
            self.generator.manual_seed(self.hp.seed + self.local_rank + 1000 * self.current_epoch)

    # ---- internals --------------------------------------------------------------------------------------------------

    def find_unlabeled_cases(self) -> list[UnlabeledCase]:
        """The unlabeled cases of this training; see ``unlabeled_data.find_unlabeled_cases``."""
        folder = self.preprocessed_dataset_folder
        raw = os.path.join(nnUNet_raw.get(), self.plans_manager.dataset_name) if nnUNet_raw.is_set() else None
        settings = preprocessing_settings(self.plans_manager, self.configuration_name)
        train, val = self.do_split()
        split = {"train": train, "val": val, "unlabeled": hidden_cases(folder, self.fold)}
        partly = cases_with_ignored_voxels(self.dataset_class(folder, train), self.label_manager.ignore_label)
        cases, notes = find_unlabeled_cases(folder, raw, settings, split, self.transductive, partly)
        for note in notes:
            self.print_to_log_file(note)
        plans = self.plans_manager
        names = plans.dataset_name, self.configuration_name, plans.plans_name, type(self).__name__
        check_complete(self.previous_stage, cases, *names)
        return cases

    @property
    def previous_stage(self) -> PreviousStage | None:
        """What the second stage of a cascade reads; None for other configurations."""
        return PreviousStage.of(self.folder_with_segs_from_previous_stage, self.label_manager.foreground_labels)

    def loader_settings(self) -> LoaderSettings:
        """What the unlabeled loader is asked for."""
        return LoaderSettings(
            batch_size=self.unlabeled_batch_size,
            patch_size=self.unlabeled_patch_size,
            network_patch_size=self.configuration_manager.patch_size,
            views=(STRONG, WEAK) if self.wants_weak_view else (STRONG,),
            augmentation=self._augmentation,
            make_transforms=self.get_training_transforms,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            label_manager=self.label_manager,
            previous_stage=self.previous_stage,
            pin_memory=self.device.type == "cuda",
            timeout=self.hp.loader_timeout,
        )

    @classmethod
    def _read_hyperparameters(cls, plans: dict[str, Any]) -> Any:
        from nnunet_ssl.methods import TRAINERS  # the table imports the methods, which import this module

        return cls.hyperparameters_class.from_plans(plans, [t.hyperparameters_class for t in TRAINERS])
