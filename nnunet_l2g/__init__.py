"""Research architectures inside a stock nnU-Net v2.

Imported at every Python start of the environment (see `nnunet_l2g.autoload`), so nothing heavy belongs here.
"""

__version__ = "0.1.0"
