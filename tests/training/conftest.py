"""Whole runs are made once, and compiled once."""

import pytest
import tiny_runs


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder for compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def quick(compiled):
    with tiny_runs.quick(compiled):
        yield


@pytest.fixture(scope="session")
def whole(compiled, tmp_path_factory):
    """The folder of an uninterrupted run of `tiny_runs.FULL`."""
    from tracerl_jax.training.pipeline import train

    runs_dir = tmp_path_factory.mktemp("whole")
    with tiny_runs.quick(compiled):
        train(tiny_runs.tiny(runs_dir, **tiny_runs.FULL))
    return runs_dir / "run"
