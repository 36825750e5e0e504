"""Collectives of the compiled programs of a run on several machines that are not there.

    python benchmarks/scaling.py --config rl_sdar_8b_math:value --topologies v5p:2x2x2 v5p:4x4x4 2xv5p:4x4x4

Compiles what `tracerl plan` does, for one topology after the other, with all chips of a slice (or all GPUs) along fsdp
and a replica per slice, and prints what a chip sends in one run of each program: bytes by kind and mesh axes, and the
same divided by the ring factor (n-1)/n, which is what must not grow from one topology to the next. `--layers N` cuts
the model: loops over layers are compiled once whatever their length, so this changes no collective but its count.
Minutes per program and topology on two CPU cores; no accelerator.
"""

import json
import math
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from tracerl_jax.launch.common import CommandParser, add_config_arguments, resolve


def main() -> None:
    from tracerl_jax.config import RunConfig

    parser = CommandParser(prog="scaling.py", description=__doc__.partition("\n")[0], epilog=__doc__)
    add_config_arguments(parser, RunConfig)
    parser.add_argument("--topologies", nargs="+", required=True, metavar="CHIP:SHAPE")
    parser.add_argument("--programs", nargs="+", metavar="NAME", help="such as 'policy gradient' (default: all)")
    parser.add_argument("--layers", type=int, metavar="N", help="of the model (default: all it has)")
    parser.add_argument("--fsdp", type=int, default=-1, metavar="N", help="mesh.fsdp (default: the rest of a slice)")
    parser.add_argument("--data", type=int, metavar="N", help="mesh.data (default: the slices)")
    args = parser.parse(sys.argv[1:])
    for topology in args.topologies:
        for row in compiled(resolve(args, RunConfig), args, topology):
            print(json.dumps(row), flush=True)


def compiled(config, args, name: str):
    """A dict per program: what it needs and what a chip sends in it."""
    from dataclasses import replace

    from tracerl_jax.parallel.mesh import make_mesh
    from tracerl_jax.plan import estimate, programs
    from tracerl_jax.plan.estimate import chip_bytes, estimate_program
    from tracerl_jax.plan.hlo import parse
    from tracerl_jax.plan.hlo_cost import SLICES
    from tracerl_jax.plan.topology import compile_devices, parse_topology
    from tracerl_jax.plan.workload import assume

    model = programs.model_config(config)
    if args.layers:
        model = model.replace(num_layers=args.layers)
        programs.model_config = lambda config: model
    config = config.heaviest(model.block_size)
    topology = parse_topology(name)
    sizes = replace(config.mesh, data=args.data or topology.slices, fsdp=args.fsdp)
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.expert, topology.slices, compile_devices(topology))
    run = programs.plan_run(config, mesh, assume(config, config.rollout.block_size or model.block_size))
    resident = sum(map(chip_bytes, run.resident.values()))
    for program in run.programs:
        if args.programs and program.name not in args.programs:
            continue
        start, texts = time.perf_counter(), []
        estimate.parse = lambda text, texts=texts: texts.append(parse(text)) or texts[-1]
        found = estimate_program(program, topology, resident)
        shape = {**program.mesh.shape, "data": program.mesh.shape["data"] // topology.slices, SLICES: topology.slices}
        sent = {}
        for (kind, axes), size in found.cost.collective_bytes.most_common():
            n = math.prod(shape[axis] for axis in axes.split("+"))
            sent[f"{kind} over {axes}"] = {
                "bytes": size, "calls": found.cost.collective_calls[kind, axes], "bytes_by_ring": size * n / (n - 1),
            }  # fmt: skip
        print(f"{name} {program.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        yield {
            "topology": name, "mesh": dict(mesh.shape), "layers": model.num_layers, "program": program.name,
            "overflow": found.overflow, "peak_bytes": found.peak_bytes, "temp_bytes": found.temp_bytes,
            "host_bytes": sum(chip_bytes(tree, on_host=True) for tree in run.resident.values()),
            "compute_seconds": found.compute_seconds, "hbm_seconds": found.memory_seconds,
            "link_seconds": found.link_seconds, "network_seconds": found.network_seconds, "sent": sent,
            "sends_between_slices": sends(texts[0]) if texts else None,  # all, and those beside products
        }  # fmt: skip


def sends(module) -> tuple[int, int]:
    """(sends to other slices in the compiled text, those of them that are under way while a matrix product or a kernel
    runs): the text of a TPU program is in the order in which it runs."""
    from tracerl_jax.plan.hlo_cost import KERNEL_TARGETS

    def works(i) -> bool:
        inner = module.computations.get(i.called("calls") or "", {})
        return i.opcode in ("dot", "convolution") or i.target in KERNEL_TARGETS or any(map(works, inner.values()))

    every = beside = 0
    for scope in module.computations.values():
        order = list(scope.values())
        for n, i in enumerate(order):
            if i.opcode != "send" or "_xla_megascale_transfer_type" not in i.attributes:
                continue
            end = next(m for m, j in enumerate(order) if j.opcode == "send-done" and i.name in j.operands)
            every, beside = every + 1, beside + any(map(works, order[n:end]))
    return every, beside


if __name__ == "__main__":
    main()
