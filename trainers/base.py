"""PluginTrainer: nnUNetTrainer with what the trainers of all methods need."""

from __future__ import annotations

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_l2g.architectures import PlanNetwork
from nnunet_l2g.compatibility import check_nnunet, keep_ddp_graphs_whole
from nnunet_l2g.errors import UserError
from nnunet_l2g.training.checkpoints import (
    check_finite,
    get_random_state,
    remove_partial,
    serialised,
    set_previous_aside,
    set_random_state,
    write_atomically,
)
from nnunet_l2g.training.ending import ending_cleanly
from nnunet_l2g.training.figure import draw_diagnostics, warn_if_not_written
from nnunet_l2g.training.names import set_lengths
from nnunet_l2g.training.stages import Stage, cases_of, run_stage

EXTRA_KEY = "nnunet_l2g"  # in nnU-Net's checkpoints, beside its own keys
RANDOM_KEY = "random_state"  # under EXTRA_KEY, beside extra_state()


class LossWithAuxiliary(nn.Module):
    """nnU-Net's loss plus network.auxiliary_loss(target), so that nnU-Net's train_step needs no change."""

    def __init__(self, loss: nn.Module, network: PlanNetwork):
        super().__init__()
        self.loss = loss
        self._network = (network,)  # in a tuple, so that it is not a submodule of the loss

    def forward(self, output, target):
        segmentation = self.loss(output, target)
        full = target[0] if isinstance(target, (list, tuple)) else target  # (B, 1 or regions, *spatial)
        auxiliary = self._network[0].auxiliary_loss(full)
        return segmentation if auxiliary is None else segmentation + auxiliary


class PluginTrainer(nnUNetTrainer):
    """Trains a PlanNetwork under a stock nnU-Net.

    It adds to nnUNetTrainer: lengths by name, pretraining stages, auxiliary losses, a hook after each optimiser step,
    diagnostics in log and figure, plain weights through `-pretrained_weights`, checkpoints that are written atomically and
    hold all that a trainer needs to continue. A new run moves the checkpoints of an older one aside.
    """

    network_class: type[PlanNetwork]
    network_settings: dict = {}  # arguments of network_class.from_plans
    epochs: int | None = None  # set by the trainer's name; None is nnU-Net's own number
    iterations: int | None = None
    figure_name = "progress_diagnostics.png"
    max_nonfinite_steps = 5  # in an epoch, under AMP, whose gradient scaler skips such steps; without AMP none is allowed

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device("cuda")
    ):
        check_nnunet()
        self.continues = bool(plans.get("continue_training", False))  # nnU-Net removes it from the plans
        super().__init__(plans, configuration, fold, dataset_json, device)
        set_lengths(self, self.epochs, self.iterations)
        self._nonfinite_steps = 0
        self._checkpoint_loaded = self._extra_loaded = False
        self._random_state: dict | None = None  # of the checkpoint that was loaded

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> PlanNetwork:
        """Called by nnU-Net on the class, for training and prediction. An ablation needs only other `network_settings`."""
        return cls.network_class.from_plans(
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            **cls.settings_for(plans_manager),
        )

    @classmethod
    def settings_for(cls, plans_manager) -> dict:
        """Further arguments of network_class.from_plans."""
        return cls.network_settings

    def stages(self) -> list[Stage]:
        """The pretraining stages, in order. Called once, when a training starts."""
        return []

    @property
    def raw_network(self):
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def initialize(self):
        self._check_stages()
        if self.is_ddp:
            keep_ddp_graphs_whole()
        super().initialize()
        network = self.raw_network
        # not in _build_loss and configure_optimizers, which subclasses of users override
        self.loss = LossWithAuxiliary(self.loss, network)
        # a hook of the optimiser, so that nothing moves in a step that the gradient scaler skips
        self.optimizer.register_step_post_hook(lambda optimizer, *_: _clear_momentum(optimizer, network.after_step() or ()))
        for key in self.diagnostic_keys:
            self.logger.local_logger.my_fantastic_logging.setdefault(key, [])
        # until training starts or a checkpoint is loaded, nnU-Net may load -pretrained_weights
        network.plain_weights_only = True

    def _check_stages(self) -> None:
        """UserError for plans with fewer than 3 stages: the lowest output has no weight, so the loss would be 0 / 0."""
        stages, patch = len(self.configuration_manager.pool_op_kernel_sizes), tuple(self.configuration_manager.patch_size)
        if self.enable_deep_supervision and stages < 3:
            raise UserError(
                f"the network of these plans has {stages} stage(s) for patch {patch}, expected at least 3: with fewer, the "
                "loss is NaN, as nnU-Net's deep supervision leaves out the lowest output. Plan with a finer spacing "
                "(nnUNetv2_plan_experiment -overwrite_target_spacing), for at least 16 voxels on two axes or 24 on one."
            )

    def configure_optimizers(self):
        """nnU-Net's optimiser and schedule, for the parameters that are not frozen."""
        parameters = [parameter for parameter in self.raw_network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, self.initial_lr, weight_decay=self.weight_decay, momentum=0.99, nesterov=True)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        self._log_pretrained()
        self.raw_network.plain_weights_only = False
        if self.local_rank == 0 and not self.disable_checkpointing:
            remove_partial(self.output_folder)
        if self.local_rank == 0 and not self.continues and not self.disable_checkpointing:
            previous = set_previous_aside(self.output_folder)
            if previous:
                self.print_to_log_file(f"A new run starts: checkpoints of the earlier one are now in {previous}")
        super().on_train_start()
        if not self._checkpoint_loaded:  # a checkpoint of the segmenter was written after the stages
            self._run_stages()
        elif self._random_state is not None and not self.is_ddp:  # it is the state of rank 0, others must not draw the same
            set_random_state(self._random_state, self.device)  # after the loaders are made, which draws random numbers

    def run_training(self):
        """nnU-Net's training. If it fails, the workers of the loaders are ended at once, as they could block Python's exit."""
        with ending_cleanly(self._finish_loaders):
            super().run_training()

    def _finish_loaders(self) -> None:
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()

    def _run_stages(self) -> None:
        for stage in self.stages():
            run_stage(
                stage,
                self.raw_network,
                lambda: next(self.dataloader_train),
                lambda: next(self.dataloader_val),
                self.output_folder,
                self.print_to_log_file,
                owner=type(self).__name__,
                resume=self.continues,
                save=not self.disable_checkpointing,
                save_every=max(1, stage.epochs // 10),
                rank=self.local_rank,
                extra_state=self.extra_state,
                load_extra_state=self.load_extra_state,
            )

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self._nonfinite_steps = 0

    def train_step(self, batch: dict) -> dict:
        """Runs nnU-Net's training step and raises FloatingPointError if the loss is not finite."""
        cases = cases_of(batch)
        try:
            result = super().train_step(batch)
        except FloatingPointError as error:
            self._on_nonfinite(str(error), cases, healed=False)
        if not np.isfinite(result["loss"]):
            self._on_nonfinite(f"the training loss is {result['loss']}", cases, healed=self.grad_scaler is not None)
        return result

    def _on_nonfinite(self, what: str, cases: list, healed: bool) -> None:
        """Logs the cases. Raises, unless the gradient scaler has skipped the step (healed), and not too often in this epoch."""
        self._nonfinite_steps += 1
        where = f"{what} (epoch {self.current_epoch}, cases {cases}, {self._nonfinite_steps}. time in it)"
        if healed and self._nonfinite_steps <= self.max_nonfinite_steps:
            self.print_to_log_file(f"WARNING: {where}; the gradient scaler skips this step.")
            return
        message = (
            f"{where}. Training stops; checkpoints on disk are from before. Look for NaN or Inf in these images, or lower "
            "the learning rate, and continue with --c."
        )
        self.print_to_log_file(message)
        raise FloatingPointError(message)

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        diagnostics = self.diagnostics()
        for key in self.diagnostic_keys:
            self.logger.log(key, diagnostics[key], self.current_epoch)
        if diagnostics:
            self.print_to_log_file(" ".join(f"{key} {diagnostics[key]:.4g}" for key in self.diagnostic_keys))

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.local_rank == 0 and self.diagnostic_keys:
            filename = f"{self.output_folder}/{self.figure_name}"
            with warn_if_not_written(self.print_to_log_file):
                draw_diagnostics(self.logger.local_logger.my_fantastic_logging, self.diagnostic_keys, filename)

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of the network's diagnostics, in the order of log and figure."""
        return self.raw_network.diagnostic_keys()

    def diagnostics(self) -> dict[str, float]:
        """Numbers by these names. Called once an epoch after its training steps, in every process."""
        return self.raw_network.diagnostics()

    def extra_state(self) -> dict:
        """What else is needed to continue a training, but not to predict, as tensors and plain Python."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """The inverse, after nnU-Net has loaded its part, with tensors on the CPU. Not called if the checkpoint has nothing."""

    def save_checkpoint(self, filename: str) -> None:
        self.raw_network.plain_weights_only = False
        if self.disable_checkpointing:
            super().save_checkpoint(filename)  # logs that
        elif self.local_rank == 0:  # nnU-Net calls it on every rank, and others must not touch the file that rank 0 writes
            checkpoint = self._nnunets_checkpoint()
            checkpoint[EXTRA_KEY] = {**self.extra_state(), RANDOM_KEY: get_random_state(self.device)}
            # the network of a user may have a mask of -Inf among its buffers
            buffers = [f"network_weights.{name}" for name, _ in self.raw_network.named_buffers()]
            check_finite({key: checkpoint[key] for key in ("network_weights", "optimizer_state", EXTRA_KEY)}, buffers)
            write_atomically(serialised(checkpoint), filename)

    def _nnunets_checkpoint(self) -> dict:
        """What nnU-Net's save_checkpoint stores (a test compares them). To call it would serialise gigabytes twice."""
        return {
            "network_weights": self.raw_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }

    def load_checkpoint(self, filename_or_checkpoint) -> None:
        if not self.was_initialized:
            self.initialize()
        self.raw_network.plain_weights_only = False
        super().load_checkpoint(filename_or_checkpoint)
        self._checkpoint_loaded = True
        # nnU-Net saves checkpoint_latest before it compares this epoch with the best one. Without this, a later and worse epoch
        # would replace checkpoint_best.
        for ema in self.logger.local_logger.my_fantastic_logging["ema_fg_dice"]:
            if self._best_ema is None or ema > self._best_ema:
                self._best_ema = ema
        # not weights_only, because the log holds numpy scalars; nnU-Net has just unpickled the same file
        checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False)
        extra = dict(checkpoint.get(EXTRA_KEY, {}))
        self._random_state = extra.pop(RANDOM_KEY, None)
        if extra:
            self.load_extra_state(extra)
            self._extra_loaded = True

    def _log_pretrained(self) -> None:
        if not self.raw_network.plain_weights_loaded:
            return
        own = self.raw_network.own_keys()
        taken = [k for k in self.raw_network.state_dict() if k not in own and ".seg_layers." not in k]
        self.print_to_log_file(
            f"-pretrained_weights: taken {len(taken)} tensors of encoder and decoder ({', '.join(taken)}). Not taken, "
            f"newly initialised: the segmentation layers (nnU-Net's rule) and {', '.join(own)}."
        )


def _clear_momentum(optimizer: torch.optim.Optimizer, parameters: list) -> None:
    """Clears the momentum of parameters that were replaced: it belongs to their old values."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
