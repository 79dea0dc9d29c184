"""The L2GNet module: quantise, align by transport, add back. Works on any feature map of two voxels or more."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_l2g.layers.class_ties import ClassTies, class_shares
from nnunet_l2g.layers.precision import at_least_single, full_precision, linear_like
from nnunet_l2g.layers.transport_alignment import TransportAlignment, merge_tokens
from nnunet_l2g.layers.vector_quantizer import VectorQuantizer


class L2GBlock(nn.Module):
    r"""Relates discrete codes of a feature map by optimal transport on trainable references.

    .. math::
        h = W_{in} z, \quad q = \mathrm{quantise}(h), \quad o = \mathrm{align}(q), \quad
        z' = z + \gamma\, W_{out}\, \mathrm{IN}(o)

    with IN the instance norm over voxels. :math:`W_{out}` starts at zero, so z' = z before the first step, and nnU-Net's own
    weights behave as in nnU-Net. Everything runs in float32, whatever autocast says.

    With ``keep_features`` under 1 the features must at times be rebuilt from the codes alone; this does not start as nnU-Net:

    .. math::
        z' = b z + (1 - b)\, W_{out}(q + o), \quad b \sim \mathrm{Bernoulli}(keep)
        \text{ for each image in training, } b = keep \text{ otherwise}

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
    eps, iterations, solver, relaxation, reference_norm
        See TransportAlignment. iterations=0 is the softmax twin.
    over_codes : bool
        After quantisation works on the K codes in place of the N tokens, see merge_tokens: the same values.
    num_classes, references_per_class, class_weight, shuffled_classes
        See ClassTies, which references_per_class turns on; num_references is then that of all classes.
    feed_back : bool
        False leaves z as it is (twin: the losses alone).
    keep_features : float
        See above.
    gamma : float
        Start of the learnable scale.
    reference_steps : tuple of int
        Optimiser steps after which the references are placed by spherical k-means: the features drift quickly at first.

    Shapes
    ------
    forward: (B, C, *spatial) -> the same, same dtype. The commitment loss () of a training forward is in ``loss``; the loss
    that needs labels is ``class_loss``.

    Raises
    ------
    ValueError
        For sizes under 1, gamma 0, arguments that ask for each other, a feature map of a single voxel.
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
        relaxation: float | None = None,
        reference_norm: float = 1.0,
        over_codes: bool = False,
        num_classes: int | None = None,
        references_per_class: int | None = None,
        class_weight: float = 0.2,
        shuffled_classes: bool = False,
        feed_back: bool = True,
        keep_features: float = 1.0,
    ):
        super().__init__()
        if num_codes is None and num_references is None:
            raise ValueError("num_codes and num_references are both None, expected at least one: nothing would be left")
        if gamma == 0:
            raise ValueError("gamma is 0, expected another number: project_out starts at zero too, so nothing would learn")
        if not all(isinstance(step, int) and step > 0 for step in reference_steps):
            raise ValueError(f"reference_steps is {reference_steps}, expected positive integers: numbers of optimiser steps")
        if not 0 < keep_features <= 1:
            raise ValueError(f"keep_features is {keep_features}, expected a probability above 0")
        if over_codes and (num_codes is None or num_references is None):
            raise ValueError("over_codes needs both num_codes and num_references, one of them is None")
        self.ties = None
        if references_per_class is not None:
            if num_classes is None or num_references is None:
                raise ValueError("references_per_class needs num_classes and num_references, one of them is None")
            self.ties = ClassTies(num_classes, references_per_class, class_weight, shuffled=shuffled_classes)
            num_references = self.ties.num_references
        if not feed_back and self.ties is None:
            raise ValueError("feed_back is False without references_per_class: nothing would be learnt")
        if not feed_back and keep_features < 1:
            raise ValueError("feed_back is False and keep_features under 1, expected one of them: the other would do nothing")
        self.over_codes, self.feed_back, self.keep_features = over_codes, feed_back, keep_features
        self.project_in = nn.Linear(channels, dim)  # a 1x1 convolution, for 2D and 3D alike
        self.quantizer = None if num_codes is None else VectorQuantizer(num_codes, dim)
        self.alignment = None
        if num_references is not None:
            self.alignment = TransportAlignment(dim, num_references, eps, iterations, solver, relaxation, reference_norm)
        if feed_back:
            self.project_out = nn.Linear(dim, channels)
        if feed_back and keep_features == 1:
            self.gamma = nn.Parameter(torch.tensor(float(gamma)))
            nn.init.zeros_(self.project_out.weight)
            nn.init.zeros_(self.project_out.bias)
        self._log_p: torch.Tensor | None = None  # (B, n, G) of the last training forward
        self._grid: tuple[int, ...] = ()
        self.reference_steps = tuple(reference_steps)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._steps: int | None = None  # host copy of `steps`: reading the buffer would synchronise every step

    @property
    def loss(self) -> torch.Tensor | None:
        """The commitment loss of the last training forward; None in eval or without a codebook."""
        return None if self.quantizer is None else self.quantizer.loss

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.relate(z)[0]

    def relate(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What forward does: z', and what the references have collected, g (B, p, d), if there are any."""
        if math.prod(z.shape[2:]) < 2:
            raise ValueError(
                f"the feature map has spatial shape {tuple(z.shape[2:])}, a single voxel: there is nothing to relate. "
                "Use a larger patch, or plans with fewer stages."
            )
        if self.training and z.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(z).all()):
            raise FloatingPointError("the feature map has NaN or Inf values")
        with full_precision(z.device.type):
            h = linear_like(at_least_single(z).flatten(2).transpose(1, 2), self.project_in)  # (B, N, d)
            q, codes = (h, None) if self.quantizer is None else self.quantizer.quantise(h)  # (B, N, d), (B, N)
            counts = members = None
            if self.over_codes:
                members = (codes[:, :, None] == torch.arange(len(self.quantizer.codebook), device=codes.device)).to(q.dtype)
                q, counts = merge_tokens(q, members)  # (B, K, d), (B, K); in what follows n is N, or K
            o, collected, row_logits = q, None, None
            if self.alignment is not None:
                marginal = None if self.ties is None else self.ties.column_marginal()
                o, collected, row_logits = self.alignment.align(q, counts, marginal)  # (B, n, d), (B, p, d), (B, n, p)
            self._log_p = None
            if self.ties is not None and self.training:
                log_p = self.ties.log_probabilities(row_logits)  # (B, n, G)
                self._log_p, self._grid = log_p if members is None else members @ log_p, tuple(z.shape[2:])
            if not self.feed_back:
                return z, collected
            if self.keep_features < 1:
                made = linear_like(q + o, self.project_out)  # (B, n, C)
            else:
                made = self.gamma * linear_like(_instance_norm(o, counts), self.project_out)  # (B, n, C)
            made = made if members is None else members @ made  # (B, N, C)
            made = made.transpose(1, 2).reshape(z.shape)
        return self._mix(z, made) if self.keep_features < 1 else z + made.to(z.dtype), collected

    def _mix(self, z: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """z, of which some images, or in eval a share of each, are replaced by what was made of codes; (B, C, *spatial) all."""
        keep = torch.full((len(z), *[1] * (z.ndim - 1)), self.keep_features, device=z.device)  # (B, 1, ...)
        if self.training:
            keep = torch.bernoulli(keep)
        return (keep * z + (1 - keep) * made).to(z.dtype)

    def class_loss(self, target: torch.Tensor) -> torch.Tensor | None:
        """ClassTies' loss () of the last training forward against a target of nnU-Net's loss, see class_shares; or None."""
        if self._log_p is None:
            return None
        with full_precision(target.device.type):
            shares = class_shares(target, self.ties.num_classes, self._grid)  # (B, N, G)
            return self.ties.loss(self._log_p, self.alignment.references, shares)

    @torch.no_grad()
    def explain(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """What forward does with z (B, C, *spatial), for pictures; only what the block has, float32 or int64.

        codes k (B, N), tokens q (B, N, d), scores S and columns A (B, N, p), output o (B, N, d), received (B, p), the share of
        the tokens that each reference receives.
        """
        found = {}
        with full_precision(z.device.type):
            q = linear_like(at_least_single(z).flatten(2).transpose(1, 2), self.project_in)  # (B, N, d)
            if self.quantizer is not None:
                found["codes"] = self.quantizer.codes(q)  # (B, N)
                q = F.embedding(found["codes"], self.quantizer.codebook).to(q.dtype)  # (B, N, d)
            found["tokens"] = q
            if self.alignment is not None:
                marginal = None if self.ties is None else self.ties.column_marginal()
                plan = self.alignment.plan(q, None, marginal)
                found["scores"], found["columns"] = plan.scores, plan.columns
                found["received"] = plan.received / plan.received.shape[1]
                found["output"] = self.alignment.align(q, None, marginal)[0]
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
            self.alignment.initialise(source, None if self.ties is None else self.ties.shares)
        if self.quantizer is not None:
            self.quantizer.update()
        if self.ties is not None:
            self.ties.update()

    @property
    def diagnostic_keys(self) -> list[str]:
        return [key for part in self._parts() for key in part.diagnostic_keys]

    def diagnostics(self) -> dict[str, float]:
        """What to log once an epoch; see the parts' own diagnostics."""
        return {key: value for part in self._parts() for key, value in part.diagnostics().items()}

    def _parts(self):
        return [part for part in (self.quantizer, self.alignment, self.ties) if part is not None]

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = None

    def __getstate__(self):
        return {**self.__dict__, "_log_p": None}  # deepcopy copies the block, not its last batch


def _instance_norm(o: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """IN over tokens (B, n, d), of which each counts as often as `counts` (B, n) says."""
    if counts is None:
        return F.instance_norm(o.transpose(1, 2)).transpose(1, 2)
    weights = (counts / counts.sum(1, keepdim=True))[:, None]  # (B, 1, n)
    centred = o - weights @ o
    return centred * (weights @ centred.square() + 1e-5).rsqrt()  # (B, n, d)
