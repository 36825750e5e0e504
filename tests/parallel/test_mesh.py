"""Mesh construction and its refusals."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType

from tracerl_jax.errors import ConfigError
from tracerl_jax.parallel.mesh import make_mesh, slice_groups
from tracerl_jax.plan.topology import compile_devices, missing_compiler


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


def test_an_expert_axis_is_there_where_it_splits_something():
    assert make_mesh(2, 2, 1, expert=2).shape == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert "expert" not in make_mesh(2, 2, 2, expert=1).shape
    with pytest.raises(ConfigError, match=r"data=2, fsdp=1, expert=3, tensor=1\) needs 6 devices but there are 8"):
        make_mesh(2, expert=3)


# Slices


def devices(*places, process=lambda n: 0):
    """Stand-ins on these slices (None: they do not say)."""
    return [SimpleNamespace(id=n, process_index=process(n), **({} if place is None else {"slice_index": place}))
            for n, place in enumerate(places)]  # fmt: skip


def numbers(groups):
    return [[device.id for device in group] for group in groups]


def test_devices_are_grouped_by_the_slice_they_report():
    assert numbers(slice_groups(devices(1, 0, 0, 1), 2)) == [[1, 2], [0, 3]]


@pytest.mark.parametrize("places", [[None] * 8, [0] * 8])
def test_devices_that_report_no_slice_or_one_are_grouped_by_process(places):
    on_four = devices(*places, process=lambda n: n // 2)
    assert numbers(slice_groups(on_four, 4)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert numbers(slice_groups(on_four, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("found, slices, complaint", [
    (devices(0, 0, 1, 1, 2, 2, 3, 3), 2, "mesh.slices is 2, but the 8 devices are in 4 slices: set it to 4."),
    (devices(*[None] * 6, process=lambda n: n // 2), 2, "6 devices are in 3 processes of 2 devices: set it to 1 or 3."),
    (devices(0, 0, 1), 2, "mesh.slices is 2, but they would have 1, 2 devices: start the job on slices of one size."),
    (devices(None, None), 2, "mesh.slices is 2, but the 2 devices are in 1 process of 2 devices: set it to 1."),
])  # fmt: skip
def test_slices_that_are_not_there(found, slices, complaint):
    with pytest.raises(ConfigError) as error:
        slice_groups(found, slices)
    assert complaint in str(error.value)


def test_replicas_that_would_reach_over_a_slice():
    with pytest.raises(ConfigError, match=r"over 2 slices: data is 1, .* set mesh.data to a multiple of 2 \(or -1\)"):
        make_mesh(1, 8, slices=2)


@pytest.mark.parametrize("sizes", [(2, 8, 1), (-1, 2, 2), (4, 1, 1, 4)], ids=str)
def test_data_goes_over_slices_and_the_rest_stays_inside(sizes):
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    mesh = make_mesh(*sizes, devices=compile_devices("2xv5p:2x2x2"))  # as many slices as the TPUs report
    assert len(set(mesh.devices.flat)) == mesh.size == 16
    for number, half in enumerate((mesh.devices[: mesh.shape["data"] // 2], mesh.devices[mesh.shape["data"] // 2 :])):
        assert {device.slice_index for device in half.flat} == {number}


def test_data_goes_over_hosts_of_gpus_where_it_is_asked_for():
    if missing := missing_compiler("cuda"):
        pytest.skip(missing)
    found = compile_devices("h100:16")
    assert {d.process_index for d in make_mesh(2, 8, slices=2, devices=found).devices[1].flat} == {1}
    assert make_mesh(1, 16, devices=found).shape["fsdp"] == 16  # unless asked, fsdp may reach over hosts
