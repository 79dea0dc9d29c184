"""nnU-Net's polynomial schedule for parameter groups of different rates."""

from __future__ import annotations

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class ScaledPolyLRScheduler(PolyLRScheduler):
    """lr = initial_lr (1 - t / T)^0.9, times the group's own ``lr_scale`` (1 without). nnU-Net's gives all groups one rate."""

    def step(self, current_step=None):
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
