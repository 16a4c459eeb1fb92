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
# # Your data, your model, your scheduler
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# Arrays with a column that says whose each row is, a network of your own, and a rule of the learning rate in a dozen
# lines: this notebook makes the three, and asks from which rates the rule learns, beside FedAvg, FedHyper's SL and
# `retained_gain`, over three seeds. Replace any of them by yours. It takes about two minutes on two cores, most of it
# compiling.

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
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen

import fedhyper_jax as fh
from fedhyper_jax import data, losses, metrics, models, parts

fh.use_all_cores()  # a CPU device a core; must come before anything else uses JAX
print(f"fedhyper_jax {fh.__version__}, JAX {jax.__version__} on {len(jax.devices())} × {jax.devices()[0].platform}")

# %% [markdown]
# ## Own data: arrays, and a column of client ids
#
# A hundred machines, each with a vibration sensor. An example is a window of 64 samples, its label what the machine was
# like then. Every machine has a speed, a loudness and a noise of its own, and some are in one condition most of the
# time. Here they are drawn; yours come from a file. All it takes are arrays of one length: inputs, labels, owners.

# %%
CONDITIONS = ("smooth", "unbalanced", "loose", "worn bearing")
HARMONICS = np.array([[1.0, 0.2, 0.1, 0.0], [2.0, 0.2, 0.1, 0.0], [1.0, 0.2, 1.0, 0.6], [1.0, 0.2, 0.1, 0.0]])


def record(machine, number):
    """Windows of a machine, and its condition in each."""
    rng = np.random.default_rng(machine)
    speed, loudness, noise = rng.uniform(3, 6), rng.lognormal(0, 0.4), rng.uniform(0.2, 0.5)
    condition = rng.choice(4, number, p=rng.dirichlet(np.full(4, 0.5)))
    time, order, phase = np.arange(64) / 64, np.arange(1, 5)[:, None], rng.uniform(0, 2 * np.pi, (number, 4, 1))
    turning = (HARMONICS[condition][:, :, None] * np.sin(2 * np.pi * speed * order * time + phase)).sum(axis=1)
    ringing = np.sin(2 * np.pi * 24 * time + phase[:, 0]) * (0.3 + 0.6 * np.abs(np.sin(np.pi * speed * time)))
    vibration = turning + (condition == 3)[:, None] * ringing + noise * rng.normal(size=turning.shape)
    return (loudness * vibration).astype(np.float32), condition.astype(np.int32)


numbers = np.random.default_rng(0).integers(20, 120, 100)
records = [record(machine, number) for machine, number in enumerate(numbers)]
windows, conditions = (np.concatenate(column) for column in zip(*records, strict=True))
owners = np.repeat([f"machine {machine:02d}" for machine in range(100)], numbers)

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.2), sharey=True, constrained_layout=True)
for kind, axis in enumerate(axes):
    axis.plot(
        windows[owners == "machine 07"][conditions[owners == "machine 07"] == kind][0], color="#332288", linewidth=1.2
    )
    axis.set(title=CONDITIONS[kind], xlabel="sample")
axes[0].set_ylabel("machine 07")
plt.show()

# %% [markdown]
# Eighty machines train; the other twenty are those that the model has to do for. `from_client_ids` takes the column of
# owners as it is. (If you have the rows of each client instead, `data.pack(examples, rows_of_each_client)`.)

# %%
new = owners >= "machine 80"
clients = data.from_client_ids({"x": windows[~new], "y": conditions[~new]}, owners[~new])
test = {"x": windows[new], "y": conditions[new]}
print(f"{clients.population} clients, {int(clients.client_sizes.min())} to {clients.max_examples} windows each")

# %% [markdown]
# ## Own model
#
# Any flax module: `models.from_linen` and `models.from_nnx` adapt it. (Any pair of functions will do as well:
# `fh.Model(init, apply)`.) This one looks at the spectrum, since the phase of a window says nothing.

# %%
ANGLES = 2 * np.pi * np.outer(np.arange(64), np.arange(33)) / 64


class Spectrum(linen.Module):
    """Logarithms of the power at 33 frequencies, and two dense layers."""

    @linen.compact
    def __call__(self, windows):
        power = jnp.square(windows @ np.cos(ANGLES)) + jnp.square(windows @ np.sin(ANGLES))
        hidden = linen.relu(linen.Dense(32)(0.3 * jnp.log(power + 0.1)))
        return linen.Dense(len(CONDITIONS))(hidden)


model = models.from_linen(Spectrum())
loss_fn = losses.cross_entropy(model)

# %% [markdown]
# ## Own scheduler
#
# The *bold driver* is an old rule for a single network: while the loss falls, be bolder; where it rises, be careful.
# Between rounds the loss of the clients jumps about, for other clients are asked each time, so this one compares it
# with a running average. A `RateRule` is two functions: `init` makes the state, whose field `rate` the engine reads,
# and `update` moves it by what the round fed back (`fh.parts.contract.Feedback` lists all there is).


# %%
class BoldDriver(NamedTuple):
    rate: jax.Array
    usual_loss: jax.Array


def bold_driver(initial_rate):
    def init(params):
        return BoldDriver(jnp.float32(initial_rate), jnp.float32(jnp.inf))

    def update(state, feedback):
        loss, usual = feedback.client_loss, state.usual_loss
        rate = state.rate * jnp.where(loss <= 1.1 * usual, 1.15, 0.6)  # a loss that is no number is no progress
        usual = jnp.where(jnp.isinf(usual), loss, 0.7 * usual + 0.3 * loss)
        return BoldDriver(rate, usual), parts.RateReport.one(clipped=jnp.array(False), finite=jnp.isfinite(loss))

    return parts.RateRule(init=init, update=update, initial_rate=initial_rate)


# %% [markdown]
# ## From which rates does it learn?
#
# One `sweep` a method: seven initial rates times three seeds are one compiled program. `retained_gain` has no initial
# rate, so its sweep has one setting. From the largest rates some runs diverge. The package says so, and the pictures
# show it; its warning is switched off here.

# %%
common = {"work": fh.local_steps(10, batch_size=16), "strategy": "sharded(vectorized)"}
methods = {
    "bold driver": lambda local_rate: fh.fedavg(loss_fn, local_rate=bold_driver(local_rate), **common),
    "FedAvg": lambda local_rate: fh.fedavg(loss_fn, local_rate=local_rate, **common),
    "SL": lambda local_rate: fh.fedhyper(loss_fn, "SL", local_rate=local_rate, **common),
    "retained_gain": lambda target_share: fh.retained_gain(loss_fn, target_share=target_share, **common),
}
rates = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], np.float32)
grids = {name: {"local_rate": rates} for name in methods} | {"retained_gain": {"target_share": np.float32([0.35])}}
keys = jax.random.split(jax.random.key(0), 3)
starts = jax.vmap(lambda key: model.init(key, windows[:1]))(keys)
evaluation = {
    "evaluate": fh.make_evaluation(metrics.classification(model)),
    "evaluation_data": fh.EvaluationData(test=test),
    "eval_every": 2,
}
warnings.filterwarnings("ignore", category=fh.LeftOutWarning)

histories = {}
for name, make in methods.items():
    _, histories[name] = fh.sweep(make, grids[name], keys, starts, clients, rounds=60, cohort_size=10, **evaluation)
evaluated = np.flatnonzero(histories["FedAvg"].evaluated[0, 0])
accuracies = {name: history.evaluation["test_accuracy"][:, :, evaluated] for name, history in histories.items()}
final = {name: accuracy[:, :, -3:].mean(axis=2) for name, accuracy in accuracies.items()}

print("accuracy on new machines, mean of the last 3 evaluations ± standard deviation over 3 seeds")
for name, accuracy in final.items():
    print(f"\n{name}")
    for setting, own in zip([f"{rate:g}" for rate in rates] if len(accuracy) > 1 else ["–"], accuracy, strict=True):
        print(f"  from {setting:5}  {own.mean():.1%} ± {own.std(ddof=1):.1%}")

# %%
STYLES = {"bold driver": "#D55E00", "FedAvg": "#000000", "SL": "#56B4E9", "retained_gain": "#6A3D9A"}

figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
for name, accuracy in final.items():
    mean, low, high = 100 * accuracy.mean(axis=1), 100 * accuracy.min(axis=1), 100 * accuracy.max(axis=1)
    if len(accuracy) == 1:
        mean, low, high = (np.repeat(values, len(rates)) for values in (mean, low, high))
    dashes = "--" if name == "FedAvg" else "-"
    axis.plot(
        rates, mean, dashes, color=STYLES[name], marker="" if len(accuracy) == 1 else "o", markersize=4, label=name
    )
    axis.fill_between(rates, low, high, color=STYLES[name], alpha=0.12, linewidth=0)
axis.set(xscale="log", xlabel="initial local rate", ylabel="accuracy on new machines (%)", ylim=(0, 100))
axis.set_title("After 60 rounds: mean, least and most of 3 seeds", loc="left")
axis.legend(frameon=False, loc="lower left", ncols=2)
plt.show()

# %% [markdown]
# Where the rate went, from the smallest one and from one that suits FedAvg:

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 5.5), sharex=True, sharey="row", constrained_layout=True)
for (top, bottom), rate in zip(axes.T, (0.001, 0.3), strict=True):
    for name, history in histories.items():
        row = int(np.argmin(abs(rates - rate))) if len(final[name]) > 1 else 0
        look = {"color": STYLES[name], "linestyle": "--" if name == "FedAvg" else "-", "linewidth": 1.6}
        top.plot(1 + evaluated, 100 * accuracies[name][row].mean(axis=0), label=name, **look)
        moved = np.maximum(history.info.local_rate[row], 1e-4)  # (retained_gain measures in round 1, and moves nothing)
        bottom.plot(1 + np.arange(moved.shape[1]), np.exp(np.log(moved).mean(axis=0)), **look)
    top.set_title(f"from local rate {rate:g}", loc="left")
    bottom.set(yscale="log", xlabel="round")
axes[0, 0].set(ylabel="accuracy on new machines (%)", ylim=(0, 100))
axes[1, 0].set(ylabel="local rate", ylim=(5e-4, 5))
axes[0, 1].legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# The bold driver ends between 70 and 75 % from each of the first six rates, a factor of 300; FedAvg does so from two of
# them. From rate 1 its first rounds break the network, and it has no way back: that is what guards are for
# (`fh.guards.rollback`). SL's steps grow with its inner products: from 0.001 it ends at its upper bound, ten times the
# rate it was given, and from 0.3 it overshoots and recovers. `retained_gain` was given no rate; in its first round it
# measures, and moves nothing.
#
# From here: docs/extending.md has a rule that asks every client a question of its own, an aggregator and a failure
# model, made the same way.
