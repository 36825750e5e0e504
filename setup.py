"""Package layout: kernels/, configs/ and launch/ are installed below tracerl_jax (see docs/architecture.md)."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

HERE = Path(__file__).parent

# The TPU and the CUDA compiler, to compile ahead of time for chips that are not there (`tracerl plan`); they come for
# Linux on x86-64. Not the CUDA libraries: nothing can run on a GPU with these alone.
COMPILERS = [
    f"{package}; sys_platform == 'linux' and platform_machine == 'x86_64'"
    for package in (
        "jax[tpu,cuda13-local]", "nvidia-cuda-nvcc>=13,<14", "nvidia-nvvm>=13,<14", "nvidia-cuda-runtime>=13,<14"
    )
]

# The harness without its extra "hf", which would bring torch.
HARNESS = ["lm-eval>=0.4.10"]

SERVER = ["starlette>=0.46", "uvicorn>=0.34", "prometheus-client>=0.21"]

# A top-level package called `kernels` would hide the Hugging Face package of that name from transformers and pip. So
# these folders have no __init__.py of their own (a plain folder never hides an installed package), and a wheel carries
# them as tracerl_jax.kernels etc.
NESTED = ("kernels", "configs", "launch")

packages = find_packages(include=["tracerl_jax", "tracerl_jax.*"])
for folder in NESTED:
    packages += [f"tracerl_jax.{folder}"] + [f"tracerl_jax.{folder}.{p}" for p in find_namespace_packages(folder)]

setup(
    name="tracerl_jax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "tracerl_jax" / "__init__.py").read_text())[1],
    description="TraceRL for diffusion language models in JAX: fine-tuning, reinforcement learning, fast decoding",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=packages,
    package_dir={f"tracerl_jax.{folder}": folder for folder in NESTED},
    package_data={f"tracerl_jax.{folder}": ["*.html", "*.css", "*.js"] for folder in ("report", "serve")}
    | {"tracerl_jax.launch": ["*.sh", "*.sbatch", "*.yaml"]},
    python_requires=">=3.11",
    # Plain jax: the accelerator is the user's choice (extras below), and lower bounds only.
    install_requires=[
        "jax>=0.10.0",
        "flax>=0.12.3",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "transformers>=5",
        "datasets>=4", "jinja2>=3.1",
        "math-verify>=0.9",
        # Filters system calls of programs under test, by the system's libseccomp; without either the sandbox says so.
        "pyseccomp>=0.1.2; sys_platform == 'linux'",
        "ml-collections>=1.0",
        "safetensors>=0.5",
        "absl-py>=2",
        "httpx>=0.28",
        "numpy>=2",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        # CUDA 13 is what jax recommends, and its ptxas has no part in the CUDA 12.8-12.9.1 miscompilation for which jax
        # refuses some kernels. It needs NVIDIA driver 580; with an older one: pip install "jax[cuda12]".
        "cuda": ["jax[cuda13]"],
        "serve": SERVER,
        "eval": HARNESS,
        "wandb": ["wandb>=0.19"],
        "tensorboard": ["tensorboardX>=2.6"],
        "plan": COMPILERS,
        "tasks": ["reasoning-gym>=0.1.25"],  # builds pycosat, so it needs a C compiler
        # setuptools builds the wheels of tests/packaging without a network.
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "scipy>=1.14", "ruff>=0.9", "setuptools>=70.1"]
        + ["openai>=2"] + SERVER + HARNESS + COMPILERS,
    },
    entry_points={"console_scripts": ["tracerl=tracerl_jax.launch.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
