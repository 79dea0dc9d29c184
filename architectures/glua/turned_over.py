"""nnU-Net's data set with its images turned over."""

from __future__ import annotations

import numpy as np

from nnunet_l2g.architectures.glua.turn_over import turn_over


def turned_over(dataset_class: type, polarity: np.ndarray) -> type:
    """nnU-Net's class of data sets, whose cases come with data (C, *spatial) in memory and turned over by polarity (C,).

    Made in a function and therefore not to be sent to another process.
    """

    class TurnedOver(dataset_class):
        def load_case(self, identifier):
            data, *rest = super().load_case(identifier)
            return turn_over(np.asarray(data[:]), polarity), *rest

    return TurnedOver
