"""`python -m tracerl_jax` is `tracerl`."""

import sys

from tracerl_jax.launch.cli import main

sys.exit(main())
