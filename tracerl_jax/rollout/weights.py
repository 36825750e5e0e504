"""The policy's weights as decoding wants them: in the compute dtype, and whole except for what `tensor` splits.

Training keeps float32 masters that the fsdp axis spreads. A decode forward reads every weight for a few tokens per
sequence: gathering and casting them each time would cost more than the forward. So they are copied once per RL step:

    training mesh   data x fsdp x tensor         the same devices, in the same order
    rollout mesh    (all / tensor) x 1 x tensor

In a job of several processes each decodes on its own devices, at its own pace: there is a rollout mesh for each, and
the weights go to all of them at once (parallel/place.py).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tracerl_jax.errors import ConfigError
from tracerl_jax.models import Model
from tracerl_jax.models.decoder import Params
from tracerl_jax.parallel.distributed import is_job
from tracerl_jax.parallel.mesh import AXES
from tracerl_jax.parallel.place import local_mesh, of_all_processes, replicas
from tracerl_jax.parallel.sharding import param_shardings


def rollout_model(model: Model, tensor: int | None = None) -> Model:
    """The model for decoding on its mesh's devices, of which `tensor` (default: as in training) share one copy; in a
    job, on those of this process.

    Raises ConfigError where the devices or the model cannot be split so.
    """
    if model.mesh is None:
        return model
    mesh = local_mesh(model.mesh)
    tensor, count = tensor or model.mesh.shape["tensor"], mesh.size
    if count % tensor:
        of = "this process: a copy of the weights cannot be shared by processes" if mesh != model.mesh else "the mesh"
        raise ConfigError(f"rollout.tensor is {tensor}, which does not divide the {count} devices of {of}")
    devices = np.reshape(mesh.devices, (count // tensor, 1, tensor))
    return dataclasses.replace(model, mesh=Mesh(devices, AXES, axis_types=model.mesh.axis_types[: len(AXES)]))


def rollout_params(model: Model, params: Params, own: bool = False) -> Params:
    """`params` as `model` wants them; unless `own`, themselves where they are so already.

    `own`: in arrays of their own, for decoding while updates that donate `params` run.
    """
    if is_job() and not jax.tree.leaves(params)[0].is_fully_addressable:  # of the training mesh
        training = jax.tree.leaves(params)[0].sharding.mesh
        everybody = of_all_processes(training, model.mesh)
        # A program needs its devices in one order. On TPUs that of the training mesh may be another one.
        in_order = list(everybody.devices.flat) == list(training.devices.flat)
        make = conversion(dataclasses.replace(model, mesh=everybody)) if in_order else functools.partial(cast, model)
        return replicas(make(params), param_shardings(model, model.mesh))
    return conversion(model, own)(params) if own or needs_copy(model, params) else params


def needs_copy(model: Model, params: Params) -> bool:
    def differs(leaf, wanted):
        same_place = model.mesh is None or leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        return leaf.dtype != wanted.dtype or not same_place

    return any(jax.tree.leaves(jax.tree.map(differs, params, abstract_rollout_params(model))))


def abstract_rollout_params(model: Model) -> Params:
    """What `rollout_params` returns, as `jax.ShapeDtypeStruct`s."""
    shapes = jax.eval_shape(model.in_compute_dtype, model.abstract_params())
    if model.mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, param_shardings(model, model.mesh),
    )  # fmt: skip


def weight_bytes(model: Model) -> int:
    """What `rollout_params` takes on all devices together."""
    def size(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if model.mesh is None else leaf.sharding.shard_shape(leaf.shape)
        return leaf.dtype.itemsize * math.prod(shape)

    devices = 1 if model.mesh is None else model.mesh.size
    return devices * sum(map(size, jax.tree.leaves(abstract_rollout_params(model))))


@functools.partial(jax.jit, static_argnums=0)
def cast(model: Model, params: Params) -> Params:
    return model.in_compute_dtype(params)


@functools.cache
def conversion(model: Model, own: bool = False) -> jax.stages.Wrapped:
    """The program of `rollout_params` for one process.

    Layer by layer: where the compiler knows no short way from one layout to the other, it makes a whole copy of what it
    moves, on every device.
    """
    shardings = None if model.mesh is None else param_shardings(model, model.mesh)

    def place(layer: Params) -> Params:
        layer = model.in_compute_dtype(layer)
        if shardings is None:
            return layer
        one = jax.tree.map(lambda whole: NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:])), shardings["layers"])
        return jax.lax.with_sharding_constraint(layer, one)

    def convert(params: Params) -> Params:
        others = {name: tree for name, tree in params.items() if name != "layers"}
        converted = model.in_compute_dtype(others) | {"layers": jax.lax.map(place, params["layers"])}
        # jit gives back arguments that it returns as they are: hence the copy.
        return jax.tree.map(jnp.copy, converted) if own else converted

    return jax.jit(convert, out_shardings=shardings)
