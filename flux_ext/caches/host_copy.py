"""What the host has to know of the device: copied while the device goes on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """The values of a tensor on their way to the host.

    The copy is launched here, and :meth:`wait` waits for it, but for nothing that was launched later: a plain
    ``cpu()`` in its place would wait for that too.

    Args:
        x: any shape, without a gradient.
    """

    def __init__(self, x: Tensor) -> None:
        # From contiguous memory, so that the copy is one piece; to pinned memory, which torch takes for such copies.
        self._values = x.contiguous().to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def wait(self) -> np.ndarray:
        """The values, when they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.numpy()
