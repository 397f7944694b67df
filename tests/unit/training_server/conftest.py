"""One torch thread in these tests, as in the learner: a second one only waits on small tensors."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
