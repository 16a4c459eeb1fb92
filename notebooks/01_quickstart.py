# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # fedhyper_jax: a first look
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# Federated learning has two kinds of learning rate: the server's *global* rate and the clients' *local* rates. FedHyper
# ([Wang, Wang, Li, ICLR 2024](https://arxiv.org/abs/2310.03156)) adapts both while training. This notebook compares it
# with FedAvg on a small data set, from a local rate that is far too small and from one that is well tuned, and looks at
# what the rates do. It takes two to three minutes on two cores.

# %% [markdown]
# ## Installation
#
# One variable says where from: a wheel (its path or address; on Colab, upload it with the folder icon on the left and
# put its name here) or the repository's address, `git+https://…`. Where the package is installed already, nothing
# happens here.
#
# *GPU and TPU*: choose one under Runtime → Change runtime type, before this cell. Colab brings a JAX that was made for
# it, and the installation leaves a JAX that is there as it is. Should pip say that it is too old, run
# `%pip install -U "jax[cuda12]"` in a cell of its own (`"jax[tpu]"` on a TPU, `jax` on a CPU), restart the runtime and
# begin again. The models here are small: a CPU is enough.

# %%
SOURCE = ""  # @param {type:"string"}

import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("fedhyper_jax") is None:
    if not SOURCE:
        raise SystemExit("fedhyper_jax is not installed: set SOURCE to a wheel or to the repository's address.")
    address = SOURCE if "://" in SOURCE else pathlib.Path(SOURCE).resolve().as_uri()
    there = [
        f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib") if importlib.util.find_spec(name)
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", f"fedhyper-jax[all] @ {address}", *there]
    if subprocess.run(pip).returncode:
        raise SystemExit("pip could not install fedhyper_jax; its last lines say why. If JAX is too old, see above.")
    importlib.invalidate_caches()

# %%
import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Image, display

import fedhyper_jax as fh
from fedhyper_jax import data, losses, metrics, models

fh.use_all_cores()  # a CPU device a core; must come before anything else uses JAX
print(f"fedhyper_jax {fh.__version__}, JAX {jax.__version__} on {len(jax.devices())} × {jax.devices()[0].platform}")

# %% [markdown]
# ## The data: 100 clients who do not look alike
#
# scikit-learn's digits (1,442 training images of 8 × 8 pixels), dealt to 100 clients class by class in proportions
# drawn from a Dirichlet distribution: the smaller α, the fewer classes a client sees.

# %%
digits = data.load("digits")
partition = data.dirichlet(digits.train["y"], 100, alpha=0.5, seed=0)
report = data.partition_report(partition, digits.train["y"])
print(report)

# %%
folder = pathlib.Path(tempfile.mkdtemp())
data.plot_partition(report, folder / "partition.png")
display(Image(folder / "partition.png", width=900))

# %% [markdown]
# ## One run
#
# An algorithm is a pair of pure functions, `init` and `round`. `simulate` scans over rounds in one compiled program.

# %%
clients = data.pack(digits.train, partition.client_rows)
model = models.mlp(num_classes=10, hidden=(64,))
algorithm = fh.fedhyper(losses.cross_entropy(model), "G+CL", work=fh.local_steps(10, batch_size=16), local_rate=0.01)
state = algorithm.init(model.init(jax.random.key(0), digits.train["x"]))
state, history = fh.simulate(
    algorithm,
    jax.random.key(1),
    state,
    clients,
    rounds=30,
    cohort_size=10,
    evaluate=fh.make_evaluation(metrics.classification(model)),
    evaluation_data=fh.EvaluationData(test=digits.test),
)
for t in (0, 9, 19, 29):
    print(
        f"round {t + 1:2d}: accuracy {history.evaluation['test_accuracy'][t]:.1%}, "
        f"global rate {history.info.global_rate[t]:.2f}, "
        f"clients' rates {history.info.client_rate_min[t]:.4f} to {history.info.client_rate_max[t]:.4f}"
    )

# %% [markdown]
# The clients started from a local rate of 0.01 and most of them end at the upper bound, ten times that.

# %% [markdown]
# ## The demo's comparison
#
# What `make demo` runs: FedAvg against five combinations of FedHyper's schedulers and `retained_gain`, which finds its
# rates by itself; two initial local rates, three seeds. All rates and seeds of a method are one
# program, and every cohort is divided between the devices.

# %%
from fedhyper_jax.shell.compare import compare
from fedhyper_jax.shell.presets import preset_config
from fedhyper_jax.shell.report import print_comparison

config = preset_config("demo", "compare")
config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(folder / "demo")))
summary = compare(config)
print_comparison(summary)

# %%
display(Image(folder / "demo" / "plots" / "overview.png", width=1000))

# %% [markdown]
# From the small rate, SL and CL find a larger one by themselves. From the rate that suits FedAvg, the paper's raw rule
# overshoots: its inner products grow with the square of the loss and of the rate, so it hits its bounds and training
# breaks down. The picture of that initial rate shows where:

# %%
display(Image(folder / "demo" / "plots" / "rate_0.3.png", width=1000))

# %% [markdown]
# ## Rates are data
#
# Twenty local rates and three seeds of FedAvg, sixty runs, one compiled program. `sharded` divides cohorts between the
# devices, here too:

# %%
rates = jnp.array(np.geomspace(0.003, 1.0, 20))
keys = jax.random.split(jax.random.key(2), 3)
_, sweep = fh.sweep(
    lambda local_rate: fh.fedavg(
        losses.cross_entropy(model),
        work=fh.local_steps(10, batch_size=16),
        local_rate=local_rate,
        strategy="sharded(vectorized)",
    ),
    {"local_rate": rates},
    keys,
    jax.vmap(lambda key: model.init(key, digits.train["x"]))(keys),
    clients,
    rounds=20,
    cohort_size=10,
    evaluate=fh.make_evaluation(metrics.classification(model)),
    evaluation_data=fh.EvaluationData(test=digits.test),
    eval_every=20,
)
for rate, accuracy in zip(rates, sweep.evaluation["test_accuracy"][:, :, -1], strict=True):
    print(f"{rate:.4f}  {'█' * int(40 * accuracy.mean()):40s} {accuracy.mean():.1%} ± {accuracy.std(ddof=1):.1%}")
