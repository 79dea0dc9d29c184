"""A data set of nnU-Net's whose images are turned over."""

from __future__ import annotations

import numpy as np

from nnunet_l2g.translation.turn_over import turn_over


class TurnedOver:
    """nnU-Net's data set of preprocessed cases, read whole and turned over.

    Parameters
    ----------
    dataset_class : type
        nnU-Net's, made with all further arguments.
    polarity : (C,) array
    """

    def __init__(self, dataset_class: type, polarity: np.ndarray, *args, **kwargs):
        self.dataset, self.polarity = dataset_class(*args, **kwargs), polarity

    @property
    def identifiers(self) -> list[str]:
        return self.dataset.identifiers

    def load_case(self, identifier: str) -> tuple:
        """Data (C, *spatial) in memory; segmentations and properties as they are."""
        data, *rest = self.dataset.load_case(identifier)
        return turn_over(np.asarray(data[:]), self.polarity), *rest
