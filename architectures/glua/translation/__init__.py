"""Unpaired image translation between two domains: the first stage of GLUA."""

from nnunet_l2g.architectures.glua.translation.alignment import shift_of, structure_loss
from nnunet_l2g.architectures.glua.translation.stage import TranslationStage
from nnunet_l2g.architectures.glua.translation.translator import Translator

__all__ = ["TranslationStage", "Translator", "shift_of", "structure_loss"]
