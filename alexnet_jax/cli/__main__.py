"""The command `alexnet-jax`, as ``python -m alexnet_jax.cli``."""

import sys

from alexnet_jax.cli.main import main

sys.exit(main())
