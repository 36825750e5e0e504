"""Mesh construction and its refusals."""

import jax
import pytest
from jax.sharding import AxisType

from tracerl_jax.errors import ConfigError
from tracerl_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("sizes, shape", [
    ({}, (8, 1, 1)), ({"fsdp": -1, "data": 1}, (1, 8, 1)), ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ({"data": 1, "fsdp": 4, "tensor": -1}, (1, 4, 2)), ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
])
def test_sizes_and_fill(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_devices_may_be_a_part_of_the_machine():
    mesh = make_mesh(tensor=2, devices=jax.devices()[4:])
    assert mesh.devices.shape == (2, 1, 2) and set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize("sizes, words", [
    ({"data": 3}, ["data=3, fsdp=1, tensor=1", "needs 3 devices but there are 8"]),
    ({"tensor": 3}, ["data=-1, fsdp=1, tensor=3", "a multiple of 3 devices but there are 8"]),
    ({"fsdp": -1}, ["data=-1, fsdp=-1", "at most one may be -1"]),
    ({"fsdp": 0}, ["fsdp=0", "must be positive"]),
    ({"data": -2}, ["data=-2", "must be positive"]),
])
def test_unusable_sizes_are_refused_with_numbers_and_remedy(sizes, words):
    with pytest.raises(ConfigError) as error:
        make_mesh(**sizes)
    for word in words:
        assert word in str(error.value)
