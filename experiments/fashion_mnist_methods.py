"""Every method on Fashion-MNIST, each with its own best rates: the two tables of the documentation.

Command:   python experiments/fashion_mnist_methods.py mlp 0.5      (25 minutes on a core)
           python experiments/fashion_mnist_methods.py mlp 0.1      (likewise)
           python experiments/fashion_mnist_methods.py cnn 0.5      (three hours on a core)
           python experiments/fashion_mnist_methods.py page         (writes the page from what is there)
Expected:  experiments/results/fashion_mnist_methods.md. A cell is one method in one setting; it is appended to
           experiments/results/fashion_mnist_methods-<model>-<alpha>.jsonl when it is done, and a command that was
           interrupted goes on with the next one. `--methods G SL` does some of them only.

Setting: pixels standardised by (0.286, 0.353); 100 clients by per-class Dirichlet(alpha), partition seed 0; 10 a round;
weights by examples; 20 local steps on batches of 32 drawn with replacement; evaluated on the 10,000 test images every 5
rounds. MLP 784-64-10 with ReLU, 200 rounds; CNN conv5x5(16)-conv5x5(32)-dense 10, 100 rounds. Seeds 0, 1 and 2 vary
initialisation, cohorts and batches. Rates are tuned on seed 100, for 50 rounds, over a grid that is the same for every
method: three local rates (and for the MLP three global ones), a factor of 3 apart, about what is usual (USUAL). DoG and
Mechanic set the global step themselves: of them the start is tuned instead (START). The best point is that with the
highest mean of its last three evaluations.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import fedhyper_jax as fh
from fedhyper_jax import data, losses, methods, metrics, models
from fedhyper_jax.tasks.evaluation import rounds_to_target

RESULTS = pathlib.Path(__file__).parent / "results"
SEEDS, TUNING_SEED = (0, 1, 2), 100
TUNING_ROUNDS, EVERY, COHORT, CLIENTS, TARGET = 50, 5, 10, 100, 0.8
ROUNDS = {"mlp": 200, "cnn": 100}
STRATEGY = {"mlp": "chunked(5)", "cnn": "sequential"}
COMBINATIONS = ("G+SL", "G+CL", "SL+CL", "G+SL+CL")
METHODS = {
    "mlp": (*methods.METHODS, *COMBINATIONS),
    "cnn": ("fedavg", "fedavgm", "fedadam", "fedexp", "fedprox", "scaffold", "delta_sgd", "G", "SL", "CL"),
}
# The largest local rate and the middle global rate of the grid, where they are not 0.1 and 1.
USUAL = {
    "delta_sgd": {"local_rate": 0.2},
    "fedsps": {"local_rate": 1.0},
    "fedsls": {"local_rate": 1.0},
    "mime_lite": {"local_rate": 0.01},
    "fedavgm": {"global_rate": 0.3},
    "fedadagrad": {"global_rate": 0.03},
    "fedadam": {"global_rate": 0.03},
    "fedadam_corrected": {"global_rate": 0.03},
    "fedyogi": {"global_rate": 0.03},
}
START = {"server_dog": ("initial_distance", 1e-4), "server_mechanic": ("initial_scale", 1e-4)}


def grid(model: str, method: str) -> dict[str, np.ndarray]:
    """The points that are tried: arrays of one length by setting."""
    usual = {"local_rate": 0.1, "global_rate": 1.0, **USUAL.get(method, {})}
    local_rates = [usual["local_rate"] * factor for factor in (0.1, 1 / 3, 1.0)]
    second, factors = ("global_rate", usual["global_rate"]), (1 / 3, 1.0, 3.0)
    if method in START:
        second, factors = START[method], (0.01, 1.0, 100.0)
    if second[0] not in methods.method_options(method):
        return {"local_rate": np.array(local_rates)}
    if model == "cnn":
        factors = (1.0,)
    pairs = [(b, second[1] * factor) for b in local_rates for factor in factors]
    return {"local_rate": np.array([p[0] for p in pairs]), second[0]: np.array([p[1] for p in pairs])}


READING = """
- With rates of its own, hardly any method beats FedAvg: in the first table all but seven are within a point of its
  86.5 %, in the second the best is half a point above its 84.7 % (± 0.6 over three seeds). A table of final
  accuracies with tuned rates says little about schedulers; how they do from rates that nobody has tuned is another
  experiment (fashion_mnist_rates.md).
- The raw rule of SL and CL needs a small start. From β⁰ = 0.1, which is best for FedAvg, everything with CL is at 11
  to 17 % in tuning and SL between 13 and 79 %, as SPEC.md section 4 says of the rule; so 0.01 is chosen throughout.
- SL ends at its lower bound: late in training consecutive pseudo-gradients point against each other more often than
  not, and β falls to 0.001 = β⁰ / 10, where it stays. That is what its 84 % and 80 % are. CL's rates end anywhere
  between its bounds; its accuracy is a point below FedAvg's.
- G mends a global rate that is off: in the first table's tuning, from β⁰ = 0.1 and α⁰ = 0.33, 1 and 3, it is at 83.6,
  83.9 and 83.9 % where FedAvg is at 81.5, 83.3 and 56.5 %. Its α ends at 0.33 to 0.42, from wherever it was chosen to
  start, and its accuracy is FedAvg's.
- Plateau rules end at a rate of 0. They watch the mean loss of ten clients, whose noise from cohort to cohort looks
  like a plateau to them, and so cut again and again; 79 to 84 % is where they had come by then.
- `reference_FedAdam`, FedAdam + FedHyper as the public code computes it, oscillates: its α, which multiplies Adam's
  step of 0.01, grows to 3.0 to 4.5; it comes to 83.6 and 81.5 % and ends at 70.1 to 80.4 %.
- `server_dog` differs most between seeds (80.0, 83.3 and 85.8 %): its step grows with the distance travelled, and it
  still oscillates at the end; its best evaluations are at 85.8 %. From a start of 10⁻⁶ it has not left chance after
  the 50 rounds of tuning. `mime_lite` needs local rates ten times smaller, for its momentum does not decay within a
  round.
- On the CNN FedExP and FedAvgM are half a point above FedAvg, G a third of a point, which is its spread; G's α ends at
  0.57 to 0.70. FedExP is first at 80 %, after 15 rounds. From β⁰ = 0.033 and 0.1 the raw rule of SL and CL is at
  chance or near it in tuning; from 0.01, the grid's lowest, they are 1 and 2 points below FedAvg, and one of SL's seeds
  is caught at its lower bound, 0.001, at 80 to 82 % from round 20 on.
- No cell that was chosen is at chance, and no client was left out in any.
"""


class Setting:
    """Data and model of a table."""

    def __init__(self, model: str, alpha: float):
        dataset = data.load_fashion_mnist()
        partition = data.dirichlet(dataset.train["y"], CLIENTS, alpha=alpha, seed=0)
        self.federation = data.pack(dataset.train, partition.client_rows)
        self.model = models.mlp(10, hidden=(64,)) if model == "mlp" else models.cnn(10, hidden=())
        self.rounds, self.strategy = ROUNDS[model], STRATEGY[model]
        self.evaluation = {
            "evaluate": fh.make_evaluation(metrics.classification(self.model), batch_size=1000),
            "evaluation_data": fh.EvaluationData(test=jax.tree.map(jnp.asarray, dataset.test)),
            "eval_every": EVERY,
        }

    def play(self, method: str, points: dict[str, np.ndarray], seeds: tuple[int, ...], rounds: int):
        """History of every point with every seed, in one program."""
        loss_fn = losses.cross_entropy(self.model)

        def make(**options):
            return fh.make_method(
                method,
                loss_fn,
                work=fh.local_steps(20, batch_size=32, with_replacement=True),
                population=CLIENTS,
                strategy=self.strategy,
                schedule_rounds=self.rounds,
                **options,
            )

        keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
        params = [self.model.init(init_key, self.federation.examples["x"][:1]) for init_key, _ in keys]
        _, history = fh.sweep(
            make,
            {name: jnp.asarray(values, jnp.float32) for name, values in points.items()},
            jnp.stack([run_key for _, run_key in keys]),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *params),
            self.federation,
            rounds=rounds,
            cohort_size=COHORT,
            **self.evaluation,
        )
        return history


def measure(setting: Setting, model: str, method: str) -> dict:
    """One cell: tunes, then runs the best point with the seeds that are reported."""
    start = time.perf_counter()
    points = grid(model, method)
    tuning = setting.play(method, points, (TUNING_SEED,), TUNING_ROUNDS)
    accuracy = np.asarray(tuning.evaluation["test_accuracy"])[:, 0]
    scores = accuracy[:, np.asarray(tuning.evaluated)[0, 0]][:, -3:].mean(axis=1)
    best = int(np.argmax(scores))
    chosen = {name: values[best : best + 1] for name, values in points.items()}
    history = setting.play(method, chosen, SEEDS, setting.rounds)
    evaluated = np.asarray(history.evaluated)[0, 0]
    curves = np.asarray(history.evaluation["test_accuracy"])[0][:, evaluated]
    info = jax.tree.map(lambda leaf: np.asarray(leaf)[0], history.info)
    return {
        "method": method,
        "grid": {name: [float(f"{value:.4g}") for value in values] for name, values in points.items()},
        "tuning_accuracy": np.round(100 * scores.astype(float), 2).tolist(),
        "chosen": {name: float(f"{values[0]:.4g}") for name, values in chosen.items()},
        "evaluated_rounds": np.flatnonzero(evaluated).tolist(),
        "accuracy": np.round(100 * curves.astype(float), 2).tolist(),
        "global_rate": info.global_rate[:, -1].astype(float).round(6).tolist(),
        "client_rate_median": info.client_rate_median[:, -1].astype(float).round(6).tolist(),
        "left_out": info.left_out.sum(axis=1).tolist(),
        "megabytes": ((info.bytes_up.astype(float) + info.bytes_down).sum(axis=1) / 1e6).round(1).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
    }


def cells_file(model: str, alpha: str) -> pathlib.Path:
    return RESULTS / f"fashion_mnist_methods-{model}-{alpha}.jsonl"


def read_cells(model: str, alpha: str) -> dict[str, dict]:
    """The cells that are done; of a method that stands there twice the later one. Half a line is no cell."""
    path = cells_file(model, alpha)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {cell["method"]: cell for cell in map(json.loads, lines)}


def run_table(model: str, alpha: str, chosen: tuple[str, ...]) -> None:
    """Measures the cells that are missing, one after the other."""
    setting, done = Setting(model, float(alpha)), read_cells(model, alpha)
    for method in [method for method in chosen if method not in done]:
        cell = measure(setting, model, method)
        with cells_file(model, alpha).open("a") as file:
            file.write(json.dumps(cell) + "\n")
        final = np.array(cell["accuracy"])[:, -1]
        print(f"{method}: {final.mean():.1f} ± {final.std(ddof=1):.1f}, {cell['seconds']} s", flush=True)


def rounds_reached(cell: dict, rounds: int) -> str:
    """Rounds to the target, mean over seeds; a bound where a seed missed it."""
    reached = [rounds_to_target(cell["evaluated_rounds"], np.array(curve) / 100, TARGET) for curve in cell["accuracy"]]
    if all(r is not None for r in reached):
        return f"{np.mean(reached):.0f}"
    missed = sum(r is None for r in reached)
    return f"> {rounds}" if missed == len(reached) else f"> {rounds} ({missed} of {len(reached)} seeds)"


def table(model: str, alpha: str) -> list[str]:
    """One table in Markdown, best first."""
    cells, rounds = read_cells(model, alpha), ROUNDS[model]
    lines = [
        f"| method | accuracy, % | rounds to {TARGET:.0%} | MB sent | local rate | global rate (or start) | left out |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells.values(), key=lambda c: -np.array(c["accuracy"])[:, -1].mean()):
        final = np.array(cell["accuracy"])[:, -1]
        others = [f"{value:.3g}" for name, value in cell["chosen"].items() if name != "local_rate"]
        lines.append(
            f"| {cell['method']} | {final.mean():.1f} ± {final.std(ddof=1):.1f} | {rounds_reached(cell, rounds)} "
            f"| {np.mean(cell['megabytes']):.0f} | {cell['chosen']['local_rate']:.3g} | {others[0] if others else '–'} "
            f"| {sum(cell['left_out'])} |"
        )
    return lines


def page() -> str:
    """The results page."""
    _, commands, setting = __doc__.strip().split("\n\n")
    lines = ["# Every method on Fashion-MNIST, tuned over the same grid", "", setting, ""]
    lines += ["```text", commands, "```", ""]
    for model, alpha in (("mlp", "0.5"), ("mlp", "0.1"), ("cnn", "0.5")):
        cells = read_cells(model, alpha)
        missing = [method for method in METHODS[model] if method not in cells]
        lines += [f"## {model.upper()}, Dirichlet({alpha}), {ROUNDS[model]} rounds", ""]
        lines += [*table(model, alpha), ""] if cells else []
        lines += [f"Not measured yet: {', '.join(missing)}.", ""] if missing else []
    return "\n".join([*lines, "## Reading", READING])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mlp", "cnn", "page"))
    parser.add_argument("alpha", nargs="?", choices=("0.5", "0.1"), default="0.5")
    parser.add_argument("--methods", nargs="+")
    arguments = parser.parse_args()
    if arguments.what != "page":
        run_table(arguments.what, arguments.alpha, tuple(arguments.methods or METHODS[arguments.what]))
    (RESULTS / "fashion_mnist_methods.md").write_text(page())


if __name__ == "__main__":
    main()
