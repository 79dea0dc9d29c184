"""For the tests' child processes. nnU-Net asks torch for a thread a core; those of several processes disturb each other."""

import os

os.cpu_count = lambda: 1
