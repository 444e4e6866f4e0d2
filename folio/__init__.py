"""
What the scripts share: settings, data, optimizers, checkpoints, fast generation.

Import it before torch: torch's threads spin while they wait for one another, and on a CPU that has
other work to do the one that they wait for is kept from running. They shall give up sooner. The
library behind them reads this variable once, when torch is loaded; docs/benchmarks.md has figures.
"""
import os

SAME_PURPOSE = ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME')
if not any(name in os.environ for name in SAME_PURPOSE):
    os.environ['GOMP_SPINCOUNT'] = '10000'
