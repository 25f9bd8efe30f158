"""Random numbers that are a function of a key, never of global state."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within it torch's generator of the CPU starts from the key; afterwards it goes on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
        yield
