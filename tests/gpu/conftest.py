"""GPU tests run side by side, and torch's CPU threads of one would wait, busily, for the cores of the others."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
