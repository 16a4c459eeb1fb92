"""Which initial local rates the demo uses: FedAvg over a grid of rates, on seeds that the demo does not report.

Command:  python experiments/demo_rates.py
Expected: final accuracy in % (mean of three seeds) for rates 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1 and 3:
          22.7, 50.1, 86.0, 93.1, 95.0, 96.0, 89.0, 9.9. Best at 0.3: the demo's well-tuned rate. Its rate that is too
          small, 0.01, is thirty times smaller; FedAvg then needs about all of the 60 rounds for the target of 85 %.
Writes:   runs/demo_rates
"""

import dataclasses

from fedhyper_jax.shell.compare import compare
from fedhyper_jax.shell.config import GridConfig
from fedhyper_jax.shell.presets import PRESETS
from fedhyper_jax.shell.report import print_comparison

DEMO = PRESETS["demo"]
CONFIG = dataclasses.replace(
    DEMO,
    run=dataclasses.replace(DEMO.run, out="runs/demo_rates"),
    compare=GridConfig(
        methods=("fedavg",), local_rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), seeds=(100, 101, 102)
    ),
)

if __name__ == "__main__":
    print_comparison(compare(CONFIG, overwrite=True, quiet=False))
