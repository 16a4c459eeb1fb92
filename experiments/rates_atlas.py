"""The atlas of initial rates: who still learns, from which pair (α⁰, β⁰) of a global and a local rate.

Command:   python experiments/rates_atlas.py                 (all tasks; hours on 2 cores)
           python experiments/rates_atlas.py --small         (digits only, 3 seeds; minutes)
           python experiments/rates_atlas.py --tasks fm fm01 --no-starts --add   (tuned FedAvg and retained_gain only)
Expected:  methods that keep or nudge the rates they were given learn in a band of a factor of 10 to 30 around the best
           ones; FedHyper's raw rule gains where rates start too small and breaks where they start too large;
           `retained_gain`, whose rates begin by measurement, has no start to lose by.
Writes:    experiments/results/rates_atlas.json, .md and .png; --add keeps what other tasks have there.

A cell is the mean test accuracy of the last three evaluations, over seeds. A seed draws initialisation, cohorts and
batches; the partition is one a task. "FedAvg, tuned" is the best of a grid of factor 3 in both rates on *other* seeds
(100, 101, 102), run again on the seeds that are reported. `retained_gain` has one set of constants for all tasks; they
were chosen on digits, Fashion-MNIST and Shakespeare, with seeds 0 to 4 and partitions of another program.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedhyper_jax as fh
from fedhyper_jax import data, losses, metrics, models

LOCAL_RATES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
GLOBAL_RATES = (0.25, 1.0, 4.0)
TUNING = {"local_rate": tuple(0.003 * 3.0**i for i in range(8)), "global_rate": (1 / 3, 1.0, 3.0)}
TUNING_SEEDS = (100, 101, 102)
SMALL = {"tasks": ("digits", "digits01"), "seeds": 3}
RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class AtlasTask:
    """A task of the atlas.

    Attributes:
      title: as in tables and pictures.
      load: gives the examples.
      model: its network.
      alpha: of the Dirichlet partition by label; None: IID.
      steps: K, of batches of ``batch_size`` drawn with replacement.
      noise: share of training labels that are drawn at random.
      clients, cohort, rounds: numbers.
    """

    title: str
    load: Callable[[], data.Dataset]
    model: Any
    alpha: float | None
    steps: int
    batch_size: int
    noise: float = 0.0
    clients: int = 100
    cohort: int = 10
    rounds: int = 50


_MLP = models.mlp(10, hidden=(64,))
_DIGITS = AtlasTask("digits, MLP, Dirichlet(0.5)", data.load_digits, _MLP, 0.5, 10, 16)
_FASHION = AtlasTask("Fashion-MNIST, MLP, Dirichlet(0.5)", data.load_fashion_mnist, _MLP, 0.5, 20, 32)
TASKS: dict[str, AtlasTask] = {
    "digits": _DIGITS,
    "digits01": dataclasses.replace(_DIGITS, title="digits, MLP, Dirichlet(0.1)", alpha=0.1),
    "digits_k1": dataclasses.replace(_DIGITS, title="digits, K = 1", steps=1),
    "digits_k100": dataclasses.replace(_DIGITS, title="digits, K = 100, 20 rounds", steps=100, rounds=20),
    "fm": _FASHION,
    "fm_iid": dataclasses.replace(_FASHION, title="Fashion-MNIST, MLP, IID", alpha=None),
    "fm01": dataclasses.replace(_FASHION, title="Fashion-MNIST, MLP, Dirichlet(0.1)", alpha=0.1),
    "fm_noise": dataclasses.replace(_FASHION, title="Fashion-MNIST, 40 % random labels", noise=0.4),
    "fm_one": dataclasses.replace(_FASHION, title="Fashion-MNIST, one client a round", cohort=1),
    "fm_k5": dataclasses.replace(_FASHION, title="Fashion-MNIST, K = 5", steps=5),
    "fm_cnn": dataclasses.replace(_FASHION, title="Fashion-MNIST, CNN", model=models.cnn(10)),
}

FROM_A_START = {
    "FedAvg": "fedavg",
    "FedExP": "fedexp",
    "FedAdam": "fedadam",
    "FedHyper (G+CL), as published": "G+CL",
    "SL, scale-free": "SL",
    "Δ-SGD": "delta_sgd",
    "retained gain, from the given rates": "retained_gain",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "G+CL": {"global_bounds": "relative"},
    "SL": {"normalise": "squared_norm", "update": "exponential", "hyper_rate": 0.2, "local_gamma": 1e6},
    "retained_gain": {"start": "given"},
}


class Federation:
    """A task with what every run of it shares."""

    def __init__(self, task: AtlasTask):
        self.task = task
        self.dataset = task.load()
        self.loss_fn = losses.cross_entropy(task.model)
        self.evaluate = fh.make_evaluation(metrics.classification(task.model), batch_size=1000)
        self.federation = self.clients()
        self.test = fh.EvaluationData(test=jax.tree.map(jnp.asarray, self.dataset.test))

    def clients(self) -> data.FederatedData:
        """The clients: partition and random labels from seed 0."""
        train, task = dict(self.dataset.train), self.task
        labels = train["y"]
        parted = (
            data.iid(len(labels), task.clients, seed=0)
            if task.alpha is None
            else data.dirichlet(labels, task.clients, alpha=task.alpha, seed=0)
        )
        if task.noise:
            rng = np.random.default_rng(0)
            wrong = rng.random(len(labels)) < task.noise
            train["y"] = np.where(wrong, rng.integers(0, 10, len(labels)), labels).astype(labels.dtype)
        return data.pack(train, parted.client_rows)

    def sweep(
        self,
        method: str,
        settings: dict[str, Sequence[float]],
        seeds: Sequence[int],
        callbacks: Sequence[Callable[[Any], Any]] = (),
        **options,
    ) -> fh.History:
        """The history of a method, (settings, seeds, rounds), all of it one program."""
        task = self.task
        work = fh.local_steps(task.steps, batch_size=task.batch_size, with_replacement=True)

        def make(**given):
            return fh.make_method(method, self.loss_fn, work=work, strategy="chunked(5)", **options, **given)

        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        _, history = fh.sweep(
            make,
            {name: jnp.asarray(values, jnp.float32) for name, values in settings.items()},
            keys,
            jax.vmap(lambda key: task.model.init(key, jnp.asarray(self.dataset.train["x"][:1])))(keys),
            self.federation,
            rounds=task.rounds,
            cohort_size=task.cohort,
            evaluate=self.evaluate,
            evaluation_data=self.test,
            eval_every=max(1, task.rounds // 25),
            callbacks=callbacks,
        )
        return history

    def accuracies(self, *args, **options) -> np.ndarray:
        """Mean test accuracy in % of the last three evaluations of a `sweep`, (settings, seeds)."""
        return final_accuracy(self.sweep(*args, **options))


def final_accuracy(history: fh.History) -> np.ndarray:
    """Mean test accuracy in % of the last three evaluations, (settings, seeds)."""
    evaluated = np.asarray(history.evaluation["test_accuracy"])
    last = np.flatnonzero(np.isfinite(evaluated[0, 0]))[-3:]
    return 100 * evaluated[:, :, last].mean(axis=2)


def grid(local_rates: Sequence[float], global_rates: Sequence[float] | None) -> dict[str, np.ndarray]:
    """All pairs as two lists, the local rate running fastest; without global rates, where a method takes none."""
    if global_rates is None:
        return {"local_rate": np.array(local_rates)}
    pairs = [(local, above) for above in global_rates for local in local_rates]
    return {"local_rate": np.array([p[0] for p in pairs]), "global_rate": np.array([p[1] for p in pairs])}


def measure(name: str, seeds: Sequence[int], *, starts: bool = True) -> dict[str, Any]:
    """Everything of one task: each method's cells as (global rates, local rates, seeds); without starts no cells."""
    federation = Federation(TASKS[name])
    started, cells = time.perf_counter(), {}

    def told(what: str) -> None:
        print(f"{name}, {what}: {time.perf_counter() - started:.0f} s", flush=True)

    tuning = grid(TUNING["local_rate"], TUNING["global_rate"])
    tuned = federation.accuracies("fedavg", tuning, TUNING_SEEDS).mean(axis=1)
    best = {rate: [float(values[int(np.nanargmax(tuned))])] for rate, values in tuning.items()}
    told("tuning")
    reference = federation.accuracies("fedavg", best, seeds)[0]
    averaged = federation.accuracies("fedavg", best, seeds, evaluate_at="running_average")[0]
    for title, method in FROM_A_START.items() if starts else ():
        above = None if method == "fedexp" else [a * (0.1 if method == "fedadam" else 1) for a in GLOBAL_RATES]
        values = federation.accuracies(method, grid(LOCAL_RATES, above), seeds, **OPTIONS.get(method, {}))
        cells[title] = np.broadcast_to(
            values.reshape(-1, len(LOCAL_RATES), len(seeds)), (len(GLOBAL_RATES), len(LOCAL_RATES), len(seeds))
        ).tolist()
        told(title)
    ours = {"target_share": [0.35]}  # the default; all else is measured
    measured = federation.accuracies("retained_gain", ours, seeds)[0]
    last = federation.accuracies("retained_gain", ours, seeds, evaluate_at="last")[0]
    told("retained gain")
    return {
        "title": TASKS[name].title,
        "seeds": list(seeds),
        "tuned": {"rates": {rate: value[0] for rate, value in best.items()}, "accuracy": reference.tolist()},
        "tuned, average": averaged.tolist(),
        "grid": [None if np.isnan(value) else float(value) for value in tuned],  # as `tuning` has its pairs
        "retained_gain": measured.tolist(),
        "retained_gain, last": last.tolist(),
        "cells": cells,
    }


# ------------------------------------------------------------------------------------------------ pages and pictures


def one_for_all(results: dict[str, Any]) -> list[str]:
    """The pair of rates of FedAvg that loses least against each task's own best pair, in the mean over tasks."""
    grids = np.array([[0.0 if value is None else value for value in result["grid"]] for result in results.values()])
    lost = grids.max(axis=1, keepdims=True) - grids
    pairs = grid(TUNING["local_rate"], TUNING["global_rate"])
    place = int(lost.mean(axis=0).argmin())
    lines = [
        "## One pair of rates for all tasks",
        "",
        f"FedAvg with (α, β) = ({pairs['global_rate'][place]:.2g}, {pairs['local_rate'][place]:.2g}), the pair of the "
        "grid that loses least in the mean over these tasks, against the best pair of each (last iterate, on the "
        "seeds of the tuning):",
        "",
        "| task | best pair | this pair | points lost |",
        "|---|---|---|---|",
    ]
    for result, values, losses_ in zip(results.values(), grids, lost, strict=True):
        lines.append(f"| {result['title']} | {values.max():.1f} | {values[place]:.1f} | {losses_[place]:.1f} |")
    return [*lines, ""]


def worst(cells: np.ndarray) -> float:
    """The mean of the worst start."""
    return float(np.nan_to_num(cells, nan=0.0).mean(axis=-1).min())


def share_near(cells: np.ndarray, reference: float, points: float) -> float:
    """Share of starts whose mean is no more than some points below the reference."""
    return float((np.nan_to_num(cells, nan=0.0).mean(axis=-1) >= reference - points).mean())


def page(results: dict[str, Any]) -> str:
    """The results page."""
    starts = len(LOCAL_RATES) * len(GLOBAL_RATES)
    lines = [
        "# The atlas of initial rates",
        "",
        *(f"`{command}`  " for command in dict.fromkeys(result["command"] for result in results.values())),
        f"(jax {jax.__version__}, {jax.default_backend()}). What a cell is: first lines of the script.",
        "",
        "![heat maps](rates_atlas.png)",
        "",
        "## Without a start",
        "",
        "Test accuracy in %, mean ± standard deviation over seeds. FedAvg is tuned over a grid of factor 3 in both "
        "rates on seeds that are not reported. The difference is that of `retained_gain` as it comes (running average) "
        "to tuned FedAvg as it comes (last iterate), of the same seeds, ± its standard error.",
        "",
        "| task | seeds | at (α, β) | FedAvg, tuned | its running average | retained gain | its last iterate | "
        "difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        tuned, ours = np.array(result["tuned"]["accuracy"]), np.array(result["retained_gain"])
        rates = result["tuned"]["rates"]
        off = ours - tuned
        columns = (tuned, np.array(result["tuned, average"]), ours, np.array(result["retained_gain, last"]))
        lines.append(
            f"| {result['title']} | {len(ours)} | ({rates['global_rate']:.2g}, {rates['local_rate']:.2g}) | "
            + " | ".join(f"{column.mean():.1f} ± {column.std(ddof=1):.1f}" for column in columns)
            + f" | {off.mean():+.1f} ± {off.std(ddof=1) / np.sqrt(len(off)):.1f} |"
        )
    lines += [
        "",
        *one_for_all(results),
        f"## From {starts} starts",
        "",
        f"α⁰ of {', '.join(map(str, GLOBAL_RATES))} (FedAdam: a tenth of it; FedExP has none) and β⁰ of "
        f"{', '.join(map(str, LOCAL_RATES))}: the worst of {starts} starts in %, and the share of starts that end no "
        "more than 0.5 and 5 points below tuned FedAvg.",
        "",
    ]
    for result in [result for result in results.values() if result["cells"]]:
        reference = float(np.mean(result["tuned"]["accuracy"]))
        lines += [f"**{result['title']}** (tuned FedAvg: {reference:.1f})", ""]
        lines += ["| method | worst start | within 0.5 | within 5 |", "|---|---|---|---|"]
        for title, cells in with_ours(result).items():
            lines.append(
                f"| {title} | {worst(cells):.1f} | {share_near(cells, reference, 0.5):.0%} | "
                f"{share_near(cells, reference, 5):.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


def with_ours(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """The cells of every method, those of `retained_gain` included, which are the same from every start."""
    cells = {title: np.array(values) for title, values in result["cells"].items()}
    ours = np.broadcast_to(result["retained_gain"], (len(GLOBAL_RATES), len(LOCAL_RATES), len(result["seeds"])))
    return {**cells, "retained gain": ours}


def picture(results: dict[str, Any], path: pathlib.Path) -> None:
    """Small multiples: a row a task, a column a method; colour is the distance to tuned FedAvg."""
    import matplotlib.pyplot as plt

    results = {name: result for name, result in results.items() if result["cells"]}
    methods = [*FROM_A_START, "retained gain"]
    figure, axes = plt.subplots(
        len(results),
        len(methods),
        figsize=(2.5 * len(methods), 1.0 + 1.35 * len(results)),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey=True,
    )
    image = None
    for row, result in zip(axes, results.values(), strict=True):
        reference = float(np.mean(result["tuned"]["accuracy"]))
        for axis, title in zip(row, methods, strict=True):
            means = np.nan_to_num(with_ours(result)[title], nan=0.0).mean(axis=-1)
            image = axis.imshow(means - reference, cmap="RdYlBu", vmin=-30, vmax=30, aspect="auto")
            for (y, x), value in np.ndenumerate(means):
                dark = abs(value - reference) > 20
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", size=6, color="white" if dark else "black")
            axis.set_xticks(range(len(LOCAL_RATES)), [f"{rate:g}" for rate in LOCAL_RATES], size=6, rotation=60)
            axis.set_yticks(range(len(GLOBAL_RATES)), [f"{rate:g}" for rate in GLOBAL_RATES], size=6)
        row[0].set_ylabel(f"{result['title']}\n(tuned: {reference:.1f})\nα⁰", size=7)
    for axis, title in zip(axes[0], methods, strict=True):
        axis.set_title(title, size=8)
    for axis in axes[-1]:
        axis.set_xlabel("β⁰", size=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("points above tuned FedAvg", size=7)
    bar.ax.tick_params(labelsize=6)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Runs what is asked for, and writes after each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help=f"tasks {SMALL['tasks']}, {SMALL['seeds']} seeds")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), help="all of them if left out")
    parser.add_argument("--no-starts", action="store_true", help="tuned FedAvg and retained_gain, no grid of starts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--add", action="store_true", help="keep the tasks that the results have already")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "rates_atlas.json")
    parser.add_argument("--draw", action="store_true", help="page and picture of the results that are there")
    arguments = parser.parse_args()
    names = arguments.tasks or (SMALL["tasks"] if arguments.small else tuple(TASKS))
    seeds = range(SMALL["seeds"] if arguments.small else arguments.seeds)
    path = arguments.out
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if (arguments.add or arguments.draw) and path.exists() else {}
    for name in () if arguments.draw else names:
        kept[name] = measure(name, list(seeds), starts=not arguments.no_starts)
        kept[name]["command"] = " ".join(["python experiments/rates_atlas.py", *sys.argv[1:]])
        kept = {task: kept[task] for task in TASKS if task in kept}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(kept))
    picture(kept, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
