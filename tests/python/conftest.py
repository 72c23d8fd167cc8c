"""Settings for all tests: fixed seeds, few examples by default, one thread a test."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised so that a failure is the same for everybody; RETOUCH_EXAMPLES=1000 searches longer.
settings.register_profile(
    "retouch",
    max_examples=int(os.environ.get("RETOUCH_EXAMPLES", "25")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("retouch")


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Each test starts from one seed and leaves torch's global state as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
