"""tracerl_jax: TraceRL for diffusion language models in JAX."""

import os as _os

__version__ = "0.1.0"

# kernels/, configs/ and launch/ stand at the top of the repository and are installed as tracerl_jax.kernels etc. In a
# source checkout they are not inside this folder: find them beside it. An installed package must not look there, since
# site-packages may hold the Hugging Face package called kernels.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))
