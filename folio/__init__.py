"""
What the scripts share: settings, data, optimizers, checkpoints, fast generation.

Import it before torch. While torch's threads wait for one another they spin, and on a busy CPU that
keeps the very thread they wait for from running. So they are told to give up sooner, by a variable
that is read once, when torch is loaded. docs/benchmarks.md has figures.
"""
import os

SAME_PURPOSE = ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME')
if not any(name in os.environ for name in SAME_PURPOSE):
    os.environ['GOMP_SPINCOUNT'] = '10000'
