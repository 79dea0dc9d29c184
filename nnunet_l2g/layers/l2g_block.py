"""The L2GNet module: quantise, align by transport, add back. Works on any feature map of two voxels or more."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.layers.precision import full_precision
from nnunet_l2g.layers.transport_alignment import TransportAlignment
from nnunet_l2g.layers.vector_quantizer import VectorQuantizer


class L2GBlock(nn.Module):
    r"""Relates discrete codes of a feature map by optimal transport on trainable references.

    .. math::
        h = W_{in} z, \quad q = \mathrm{quantise}(h), \quad o = \mathrm{align}(q), \quad
        z' = z + \gamma\, W_{out}\, \mathrm{IN}(o)

    with IN the instance norm over voxels. :math:`W_{out}` starts at zero, so z' = z before the first step, and nnU-Net's own
    weights behave as in nnU-Net. Everything runs in float32, whatever autocast says.

    Parameters
    ----------
    channels : int
        C of the feature map.
    dim : int
        d, width of the tokens.
    num_codes : int or None
        K; None leaves out the codebook (twin: transport on continuous tokens).
    num_references : int or None
        p; None leaves out the transport (twin: codes only, o = q).
    eps, iterations, solver
        See TransportAlignment. iterations=0 is the softmax twin.
    gamma : float
        Start of the learnable scale.
    reference_steps : tuple of int
        Optimiser steps after which the references are placed by spherical k-means: the features drift quickly at first.

    Shapes
    ------
    forward: (B, C, *spatial) -> the same, same dtype. The auxiliary loss () of a training forward is in ``loss``.

    Raises
    ------
    ValueError
        For sizes under 1, gamma 0, a feature map of a single voxel.
    FloatingPointError
        When training on the CPU, for features that are not finite: before they reach the codebook.
    """

    def __init__(
        self,
        channels: int,
        dim: int = 128,
        num_codes: int | None = 64,
        num_references: int | None = 64,
        eps: float = 0.1,
        iterations: int = 20,
        solver: str = "log",
        gamma: float = 0.1,
        reference_steps: tuple[int, ...] = (1, 50),
    ):
        super().__init__()
        if num_codes is None and num_references is None:
            raise ValueError("num_codes and num_references are both None, expected at least one: nothing would be left")
        if gamma == 0:
            raise ValueError("gamma is 0, expected another number: project_out starts at zero too, so nothing would learn")
        if not all(isinstance(step, int) and step > 0 for step in reference_steps):
            raise ValueError(f"reference_steps is {reference_steps}, expected positive integers: numbers of optimiser steps")
        self.project_in = nn.Linear(channels, dim)  # a 1x1 convolution, for 2D and 3D alike
        self.quantizer = None if num_codes is None else VectorQuantizer(num_codes, dim)
        self.alignment = (
            None if num_references is None else TransportAlignment(dim, num_references, eps, iterations, solver)
        )
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))
        self.project_out = nn.Linear(dim, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)
        self.reference_steps = tuple(reference_steps)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._steps: int | None = None  # host copy of `steps`: reading the buffer would synchronise every step

    @property
    def loss(self) -> torch.Tensor | None:
        """The commitment loss of the last training forward; None in eval or without a codebook."""
        return None if self.quantizer is None else self.quantizer.loss

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if math.prod(z.shape[2:]) < 2:
            raise ValueError(
                f"the feature map has spatial shape {tuple(z.shape[2:])}, a single voxel: there is nothing to relate. "
                "Use a larger patch, or plans with fewer stages."
            )
        if self.training and z.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(z).all()):
            raise FloatingPointError("the feature map has NaN or Inf values")
        with full_precision(z.device.type):
            h = self.project_in(z.float().flatten(2).transpose(1, 2))  # (B, N, d)
            q = h if self.quantizer is None else self.quantizer(h)  # (B, N, d)
            o = q if self.alignment is None else self.alignment(q)  # (B, N, d)
            o = F.instance_norm(o.transpose(1, 2)).transpose(1, 2)  # (B, N, d), over voxels
            update = self.gamma * self.project_out(o)  # (B, N, C)
        return z + update.transpose(1, 2).reshape(z.shape).to(z.dtype)

    @torch.no_grad()
    def explain(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """What forward does with z (B, C, *spatial), for pictures; only what the block has, float32 or int64.

        codes k (B, N), tokens q (B, N, d), scores S and columns A (B, N, p), output o (B, N, d).
        """
        found = {}
        with full_precision(z.device.type):
            q = self.project_in(z.float().flatten(2).transpose(1, 2))  # (B, N, d)
            if self.quantizer is not None:
                found["codes"] = self.quantizer.codes(q)  # (B, N)
                q = F.embedding(found["codes"], self.quantizer.codebook)  # (B, N, d)
            found["tokens"] = q
            if self.alignment is not None:
                found["scores"], found["columns"], _ = self.alignment.plan(q)
                found["output"] = self.alignment(q)
        return found

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called once after each optimiser step: moves the codebook, and early on places codes and references."""
        source = self.quantizer.pending[0] if self.quantizer is not None and self.quantizer.pending else None
        if source is None and self.alignment is not None and self.alignment.last:
            source = self.alignment.last.queries
        if source is None:  # no training forward since the last step
            return
        if self._steps is None:
            self._steps = int(self.steps)
        if self._steps == 0 and self.quantizer is not None:
            self.quantizer.initialise(source)
            self.quantizer.pending = None  # its codes are those of the codebook before
        self._steps += 1
        self.steps += 1
        if self.alignment is not None and self._steps in self.reference_steps:
            self.alignment.initialise(source)
        if self.quantizer is not None:
            self.quantizer.update()

    @property
    def diagnostic_keys(self) -> list[str]:
        return [key for part in self._parts() for key in part.diagnostic_keys]

    def diagnostics(self) -> dict[str, float]:
        """What to log once an epoch; see the parts' own diagnostics."""
        return {key: value for part in self._parts() for key, value in part.diagnostics().items()}

    def _parts(self):
        return [part for part in (self.quantizer, self.alignment) if part is not None]

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = None
