"""Checkpoints: round trip, retention, damage, resharding, disk errors."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tracerl_jax.config import CheckpointSection
from tracerl_jax.errors import CheckpointError
from tracerl_jax.training.checkpoint import Checkpointer, abstract_like, load_params


def trees(value: float) -> dict:
    return {
        "params": {"w": jnp.full((8, 4), value), "b": jnp.arange(3.0) + value},
        "train": {"m": jnp.full((8, 4), value / 2), "updates": jnp.int32(7)},
    }


WARM_UP = 2  # updates before RL


def save(checkpointer, step):
    position = {"phase": "rl" if step > WARM_UP else "sft", "rl_step": max(0, step - WARM_UP)}
    checkpointer.save(step, trees(step), {"data": position, "meta": {"v": 1}})


@pytest.fixture
def checkpointer(tmp_path):
    c = Checkpointer(tmp_path, CheckpointSection(keep_last=2, keep_every=4))
    yield c
    c.close()


def reopen(path):
    return Checkpointer(path, CheckpointSection(keep_last=2, keep_every=4))


def test_round_trip_is_exact_and_params_are_readable_apart(checkpointer, tmp_path):
    save(checkpointer, 3)
    checkpointer.wait()
    step, items, documents = reopen(tmp_path).restore(abstract_like_all)
    assert step == 3 and documents["data"] == {"phase": "rl", "rl_step": 1}
    jax.tree.map(np.testing.assert_array_equal, items, trees(3))
    params = load_params(tmp_path, jax.eval_shape(lambda: trees(0)["params"]))
    np.testing.assert_array_equal(params["w"], trees(3)["params"]["w"])


def abstract_like_all(_documents=None):
    return {name: abstract_like(tree) for name, tree in trees(0).items()}


def test_keeps_the_newest_and_every_kth_of_rl(checkpointer, tmp_path):
    for step in range(1, 10):
        save(checkpointer, step)
    checkpointer.wait()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [WARM_UP + 4, 8, 9]
    sealed = sorted(int(p.stem) for p in (tmp_path / "checksums").iterdir())
    assert sealed == kept


@pytest.mark.parametrize(
    ("damage", "sealed"),  # a flipped bit in a value is only found by the checksums
    [("flip", True)] + [(d, s) for d in ("truncate", "remove", "empty_folder") for s in (True, False)],
)
def test_falls_back_to_the_checkpoint_before_a_damaged_one(checkpointer, tmp_path, damage, sealed, caplog):
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()
    if not sealed:  # killed before the checksums were written
        (tmp_path / "checksums" / "2.json").unlink()
    files = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()]
    biggest = max(files, key=lambda p: p.stat().st_size)
    if damage == "flip":
        content = bytearray(biggest.read_bytes())
        content[len(content) // 2] ^= 1
        biggest.write_bytes(content)
    elif damage == "truncate":
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "remove":
        for path in (tmp_path / "checkpoints" / "2" / "params").rglob("*"):
            if path.is_file():
                path.unlink()
    else:
        for path in files:
            path.unlink()
    again = reopen(tmp_path)
    step, items, _ = again.restore(abstract_like_all)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, items, trees(1))
    assert "damaged" in caplog.text
    save(again, 2)  # the number is free again
    again.close()
    assert reopen(tmp_path).latest_step == 2


def test_damaged_parameters_are_not_read_apart_either(checkpointer, tmp_path):
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()
    abstract = jax.eval_shape(lambda: trees(0)["params"])
    files = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()]
    for item in ("train", "params"):  # damage elsewhere does not matter
        np.testing.assert_array_equal(load_params(tmp_path, abstract)["w"], trees(2)["params"]["w"])
        path = max((p for p in files if item in p.parts), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"2/params: damaged \(1 files differ.*another step, there are \[1\]"):
        load_params(tmp_path, abstract)
    np.testing.assert_array_equal(load_params(tmp_path, abstract, step=1)["w"], trees(1)["params"]["w"])


def test_nothing_readable_is_an_error_that_names_the_folder(checkpointer, tmp_path):
    save(checkpointer, 1)
    checkpointer.close()
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file():
            path.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"checkpoints: none of the checkpoints can be read \(1: "):
            reopen(tmp_path).restore(abstract_like_all)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_whole_checkpoint_that_cannot_be_read_is_no_damage(checkpointer, tmp_path):
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()

    def out_of_memory(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    again = reopen(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoints/2: cannot be read \(RuntimeError: RESOURCE_EXHAUSTED"):
        again.restore(out_of_memory)
    with pytest.raises(CheckpointError, match=r"checkpoints/2: cannot be read"):  # the tree of another model
        again.restore(lambda _: {"params": {"other": jax.ShapeDtypeStruct((2,), jnp.float32)}})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["1", "2"]
    assert again.restore(abstract_like_all)[0] == 2


def test_a_run_with_damaged_checkpoints_only_does_not_start_from_nothing(checkpointer, tmp_path):
    (tmp_path / "damaged-checkpoint-3").mkdir()
    with pytest.raises(CheckpointError, match="damaged-checkpoint"):
        checkpointer.restore(abstract_like_all)


def test_no_checkpoint_yet(checkpointer):
    assert checkpointer.restore(abstract_like_all) is None


def test_restores_onto_another_mesh(tmp_path):
    def mesh(*shape):
        return jax.make_mesh(shape, ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    w = jnp.arange(64.0).reshape(8, 8)
    source = {"params": {"w": jax.device_put(w, NamedSharding(mesh(4, 2), PartitionSpec("data", "tensor")))}}
    c = reopen(tmp_path)
    c.save(1, source, {"data": {}, "meta": {}})
    c.close()
    target = NamedSharding(mesh(2, 4), PartitionSpec("tensor", None))
    _, items, _ = reopen(tmp_path).restore(
        lambda _: {"params": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=target)}}
    )
    np.testing.assert_array_equal(items["params"]["w"], w)
    assert items["params"]["w"].sharding == target


def test_a_full_disk_is_reported_with_the_remedy(checkpointer, monkeypatch):
    def fail(*_, **__):
        raise ValueError("wrapped") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpointer._manager, "save", fail)
    with pytest.raises(CheckpointError, match="disk is full"):
        save(checkpointer, 1)
