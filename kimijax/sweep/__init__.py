"""Sweeps: which runs an experiment has, running those that are missing, one table of results.

    def runs(done):
        return product(rank=[16, 32], seed=[0, 1, 2])

    def run(settings, out):
        return {"loss": ...}

    if __name__ == "__main__":
        main(Sweep(runs, run, plots=(Plot(x="rank", y="loss"),)), __doc__)
"""

from kimijax.sweep.main import Sweep, main
from kimijax.sweep.plot import Plot
from kimijax.sweep.settings import Done, Settings, product, together

__all__ = ["Done", "Plot", "Settings", "Sweep", "main", "product", "together"]
