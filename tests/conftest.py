"""Test environment: eight virtual CPU devices, no network, property tests without a clock and with fixed examples."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# How long an example takes says more about the machine's load, and about compilation, than about the code. The default
# run draws the same examples each time, so that it fails only for a change of the code; TEST_EXPLORE=1 draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", settings.get_profile("fixed"), derandomize=False)
settings.load_profile("explore" if os.environ.get("TEST_EXPLORE") else "fixed")

MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs between modules, once there are many: each takes several memory maps, of which Linux
    allows a process 65,530; at the next one XLA aborts."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
