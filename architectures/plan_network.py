"""PlanNetwork, the base class of our networks: nnU-Net's encoder and decoder under their own names, and checked loading."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn


class PlanNetwork(nn.Module):
    """The encoder and decoder of a plan's U-Net. Subclasses add modules and describe them in `settings`.

    `forward` returns logits only, as nnU-Net's sliding window and validation need it. Auxiliary losses are kept in the module.

    Parameters
    ----------
    backbone : nn.Module
        With `encoder` and `decoder` of dynamic-network-architectures (PlainConvUNet, ResidualEncoderUNet). Their weights keep
        their names, so that checkpoints of plain nnU-Net fit.
    settings : mapping
        What the weights depend on, as JSON values. They are stored with the weights and compared when weights are loaded.
        `network` is the class, `format` the version of its weights.

    Attributes
    ----------
    plain_weights_only : bool
        While true, state_dict shows only the keys of plain nnU-Net, and load_state_dict accepts weights that have only these:
        so nnU-Net's own `-pretrained_weights` can load weights of plain nnU-Net. The trainer turns it on and off.
    plain_weights_loaded : bool
        True once such weights were loaded.
    method_off : bool
        For prediction only. Set on the class before a network is built: then only encoder and decoder run, with their trained
        weights, and everything that a subclass adds is left out.

    Raises
    ------
    NotImplementedError
        If the backbone has no encoder and decoder of the expected kind (for example a transformer's plans).
    """

    plain_weights_only = False
    plain_weights_loaded = False
    method_off = False

    def __init__(self, backbone: nn.Module, settings: Mapping):
        super().__init__()
        encoder, decoder = getattr(backbone, "encoder", None), getattr(backbone, "decoder", None)
        if not isinstance(encoder, (PlainConvEncoder, ResidualEncoder)) or not isinstance(decoder, UNetDecoder):
            raise NotImplementedError(
                f"{type(self).__name__} needs plans with a PlainConvUNet or ResidualEncoderUNet, got "
                f"{type(backbone).__name__}. Plan with nnU-Net's default or ResEnc planners."
            )
        self.encoder, self.decoder = encoder, decoder
        if self.method_off:
            self.forward = lambda x: self.decoder(self.encoder(x))
        self.store_settings(settings)

    def store_settings(self, settings: Mapping) -> None:
        """Replaces the settings, for a subclass that computes some of them from the backbone."""
        text = json.dumps(dict(settings), sort_keys=True).encode()
        # a tensor, so that everything that reads weights (weights_only, safetensors) can read it
        self.register_buffer("settings", torch.tensor(list(text), dtype=torch.uint8))

    @classmethod
    def from_plans(
        cls,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool = True,
        **settings,
    ) -> PlanNetwork:
        """Builds the network for a configuration of nnU-Net's plans. `settings` are further arguments of the class."""
        backbone = cls.backbone_from_plans(configuration_manager, num_input_channels, num_output_channels, deep_supervision)
        return cls(backbone, **settings)

    @staticmethod
    def backbone_from_plans(configuration_manager, num_input_channels, num_output_channels, deep_supervision):
        """The plan's plain network, initialised as nnU-Net does."""
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=deep_supervision,
        )

    def compute_conv_feature_map_size(self, input_size) -> int:
        """Voxels times channels of all feature maps of the backbone: nnU-Net's planner estimates memory by it."""
        size = self.encoder.compute_conv_feature_map_size(input_size)
        return size + self.decoder.compute_conv_feature_map_size(input_size)

    def decode(self, skips: list[torch.Tensor], after: Callable[[int, torch.Tensor], torch.Tensor]):
        """UNetDecoder.forward with a function after each level: after(level, features) returns the features to go on with.

        Levels are numbered as the encoder's stages, 0 is full resolution. Deep supervision as in UNetDecoder.
        """
        decoder, outputs, features = self.decoder, [], skips[-1]
        last = len(decoder.stages) - 1
        for s in range(len(decoder.stages)):  # from the bottleneck up
            features = torch.cat((decoder.transpconvs[s](features), skips[last - s]), 1)  # (B, 2 C_l, *spatial_l)
            features = after(last - s, decoder.stages[s](features))  # (B, C_l, *spatial_l)
            if decoder.deep_supervision or s == last:
                outputs.append(decoder.seg_layers[s](features))
        return outputs[::-1] if decoder.deep_supervision else outputs[-1]

    def auxiliary_loss(self, target: torch.Tensor | None = None) -> torch.Tensor | None:
        """Losses of the last training forward in addition to the segmentation loss; None in eval.

        target : (B, 1 or regions, *spatial)
            The target of the segmentation loss at full resolution. If it is None, losses that need labels are left out.
        """
        return None

    def after_step(self) -> list[nn.Parameter] | None:
        """Called by the trainer after each optimiser step. Returns parameters it has replaced, whose momentum is cleared."""

    def diagnostic_keys(self) -> list[str]:
        """Names of what `diagnostics` returns after a training forward, in the order of log and figure."""
        return []

    def diagnostics(self) -> dict[str, float]:
        """Numbers for log and figure. The trainer calls it once an epoch."""
        return {}

    def own_keys(self) -> list[str]:
        """Keys of the weights that plain nnU-Net does not have."""
        return [key for key in super().state_dict() if not key.startswith(("encoder.", "decoder."))]

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        if self.plain_weights_only:
            prefix = kwargs.get("prefix", "")
            for key in self.own_keys():
                del state[prefix + key]
        return state

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As nn.Module does, after a check that says in one sentence why weights of another network do not fit.

        Raises
        ------
        RuntimeError
            If the weights are of plain nnU-Net, of another class or version, or of other settings.
        """
        own = set(self.own_keys())
        if self.plain_weights_only and own.isdisjoint(state_dict):
            here = {key: value for key, value in super().state_dict().items() if key in own}
            self.plain_weights_loaded = True
            return super().load_state_dict({**state_dict, **here}, strict, assign)
        self._check_settings(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _check_settings(self, state_dict) -> None:
        mine = decode_settings(self.settings)
        if "settings" not in state_dict:
            raise RuntimeError(
                f"these weights are not {mine['network']}'s: they have no settings of it. Weights of plain nnU-Net are loaded "
                "with -pretrained_weights; to continue or predict, use the trainer that made the checkpoint."
            )
        theirs = decode_settings(state_dict["settings"])
        different = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        for first in ("network", "format"):  # if one of these differs, it explains all other differences
            different = [first] if first in different else different
        differences = [f"{key}: checkpoint {theirs.get(key, 'none')!r}, here {mine.get(key, 'none')!r}" for key in different]
        if differences:
            raise RuntimeError(
                f"these weights were made with other settings ({'; '.join(differences)}). Use the trainer and the version of "
                "nnunet_l2g that made the checkpoint."
            )


def decode_settings(settings: torch.Tensor) -> dict:
    """The settings that are stored with a network's weights under the key `settings`: uint8 (n,) -> dict.

    Raises RuntimeError if they cannot be read.
    """
    try:
        decoded = json.loads(bytes(settings.tolist()))
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise RuntimeError(f"the settings in these weights cannot be read: {type(error).__name__}") from error
    if not isinstance(decoded, dict):
        raise RuntimeError(f"the settings in these weights are a {type(decoded).__name__}, expected an object")
    return decoded
