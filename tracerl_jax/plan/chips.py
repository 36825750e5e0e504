"""What the vendors say about the chips `tracerl plan` knows. Peaks are dense bf16; bandwidths are one direction."""

from dataclasses import dataclass

from tracerl_jax.units import GIB


@dataclass(frozen=True)
class Chip:
    name: str
    platform: str  # "tpu" | "cuda"
    hbm_bytes: int  # what a program may use of the chip's memory
    flops: float  # per second, bf16
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second that a chip sends (TPU: over one of its links; GPU: over all of NVLink)
    chips_per_fabric: int | None = None  # GPUs that share NVLink, those of a host; None: the slice is one fabric
    host_bandwidth: float = 0.0  # bytes per second that each of them sends to other hosts


# TPU: cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e); the memory is what the compiler lets a program have, its own
# reservation taken off (of two versions the less). One link carries 45 GB/s (v4, v5e) or 90 GB/s (v5p, v6e) each way.
# GPU: NVIDIA data sheets (SXM); NVLink 300 or 450 GB/s each way, 200 or 400 Gb/s of InfiniBand per GPU.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", int(30.75 * GIB), 275e12, 1.228e12, 45e9),
        Chip("v5e", "tpu", int(15.75 * GIB), 197e12, 0.819e12, 45e9),
        Chip("v5p", "tpu", int(95.74 * GIB), 459e12, 2.765e12, 90e9),
        Chip("v6e", "tpu", int(31.24 * GIB), 918e12, 1.64e12, 90e9),
        Chip("a100-40g", "cuda", 42_298_834_944, 312e12, 1.555e12, 300e9, 8, 25e9),
        Chip("a100", "cuda", 84_987_740_160, 312e12, 2.039e12, 300e9, 8, 25e9),
        Chip("h100", "cuda", 84_942_979_072, 989e12, 3.352e12, 450e9, 8, 50e9),
        Chip("h200", "cuda", 150_121_545_728, 989e12, 4.8e12, 450e9, 8, 50e9),
    )
}

# What the CUDA compiler asks about a device. (compute capability, cores, shared memory of a core and of a block, L2,
# clock in GHz, name)
_CUDA = {
    "a100-40g": ((8, 0), 108, 167_936, 166_912, 41_943_040, 1.41, "NVIDIA A100-SXM4-40GB"),
    "a100": ((8, 0), 108, 167_936, 166_912, 41_943_040, 1.41, "NVIDIA A100-SXM4-80GB"),
    "h100": ((9, 0), 132, 233_472, 232_448, 52_428_800, 1.98, "NVIDIA H100 80GB HBM3"),
    "h200": ((9, 0), 132, 233_472, 232_448, 52_428_800, 1.98, "NVIDIA H200"),
}

# What JAX calls the TPUs (`device_kind`); a TPU has had two names at times. GPUs have the name of their board.
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", **{board: name for name, (*_, board) in _CUDA.items()},
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not in the table: a CPU, or another board of the same GPU."""
    return CHIPS.get(_KINDS.get(device_kind, ""))


def cuda_target_config(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto of a chip, as text: only fields that jaxlib 0.10 and 0.12 both know."""
    (major, minor), cores, smem_core, smem_block, l2, clock, name = _CUDA[chip.name]
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {smem_core} shared_memory_per_block_optin: {smem_block}
          core_count: {cores} fpus_per_core: {128 if major >= 9 else 64}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(chip.hbm_bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {clock}
          device_memory_size: {chip.hbm_bytes} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 13 }}
        device_description_str: "{name}"
    """
