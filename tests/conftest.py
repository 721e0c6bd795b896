import functools
import multiprocessing
import sys

import pytest
import torch
from environments import Random

torch.set_num_threads(1)  # small tensors: more threads only wait for each other
first = "gymnasium pydantic.dataclasses pytest tensorboard.backend.event_processing.event_accumulator"
METHOD = "spawn" if sys.platform == "win32" else "forkserver"
multiprocessing.set_forkserver_preload([*first.split(), "torch._dynamo", "torch.utils.tensorboard", "tyro"])


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The workers of a3c_nstep.py start at once, without importing torch again; Random has kept nothing."""
    spawn = functools.partial(torch.multiprocessing.start_processes, start_method=METHOD)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    for record in (Random.seeds, Random.returns, Random.steps):
        record.clear()
