"""Compilation is most of the suite's time: what the compiler's last passes gain in speed, short runs never earn back.

Processes that tests start inherit the setting. Tests of the promise itself run as users' runs do
(`runs.OPTIMIZED`).
"""

import os

import jax

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
