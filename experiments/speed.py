"""How fast, how far: the measurements behind the page experiments/results/speed.md.

Command:   python experiments/benchmark_peers.py      (the peers; see there)
           python experiments/speed.py jobs           (every job and scheduler: `fedhyper bench`)
           python experiments/speed.py cores          (a process a core, a device a core, one device)
           python experiments/speed.py scale          (cost and memory against population and cohort)
           python experiments/speed.py traces         (FedHyper at 10² to 10⁶ clients: accuracies and rates)
           python experiments/speed.py sweeps         (one sweep against single runs and against commands)
           python experiments/speed.py precision      (bfloat16 against float32: speed and accuracy)
           python experiments/speed.py profile        (where the time of a round goes)
           python experiments/on_accelerator.py       (on a GPU or TPU; see there)
           python experiments/speed.py page           (writes the page and its pictures from what is there)
Expected:  experiments/results/speed/*.json, and speed.md with its pictures. Nothing else may run on the machine
           meanwhile. Speeds are medians, with the smallest and the largest beside them.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
FOLDER = RESULTS / "speed"
FEDHYPER = [sys.executable, "-m", "fedhyper_jax.shell.cli"]
ONE_CORE = {"JAX_PLATFORMS": "cpu"}

POPULATIONS = (100, 1_000, 10_000, 100_000, 1_000_000)
COHORTS = (10, 100, 1_000, 10_000)
TRACED = dict(zip(POPULATIONS, (10, 30, 100, 300, 1_000), strict=True))
TRACE_METHODS, TRACE_RATES, TRACE_ROUNDS, TRACE_SEEDS = ("fedavg", "G", "SL", "CL", "G+CL"), (0.01, 0.1), 100, 3


def save(name: str, results: dict) -> None:
    """One file of results, written as a whole."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    temporary = FOLDER / f".{name}.tmp"
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, FOLDER / f"{name}.json")


def load(name: str) -> dict | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def execute(command: list, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"speed: {' '.join(map(str, command))} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def on_one_core() -> None:
    """Pins this process, before JAX starts its threads."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def here(*arguments) -> dict:
    """Output of another process of this script, pinned to one core."""
    return json.loads(execute([sys.executable, __file__, *arguments], **ONE_CORE).splitlines()[-1])


# jobs


def measure_jobs() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    repeats = ["--repeats", "15"]
    execute([*FEDHYPER, "bench", "mlp", "cnn", "logistic-1M", *repeats, "--out", FOLDER / "jobs.json"])
    execute([*FEDHYPER, "bench", "resnet18", "char_lstm", "--repeats", "5", "--out", FOLDER / "models.json"])


# cores


def measure_cores() -> None:
    """Each way in turn, five times over."""
    from fedhyper_jax.engine.cores import number_of_cores

    alone = ["--processes", 1]
    ways = {
        "a process a core, as the commands start them": ([], {}),
        "one process with a device a core (`use_all_cores`)": (alone, {"JAX_NUM_CPU_DEVICES": str(number_of_cores())}),
        "one process with one device": (alone, {}),
    }
    speeds = {job: {way: [] for way in ways} for job in ("mlp", "cnn")}
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "bench.json"
        for _ in range(5):
            for job, measured in speeds.items():
                for way, (options, environment) in ways.items():
                    only = ["--methods", "fedavg", "--repeats", 3, "--quiet", "--out", out]
                    execute([*FEDHYPER, "bench", job, *options, *only], **environment)
                    (method,) = json.loads(out.read_text())["jobs"][0]["methods"]
                    measured[way].append(method["client_steps_per_second"]["median"])
                    out.unlink()
    save("cores", {"client_steps_per_second": speeds})


# scale


def measure_scale() -> None:
    """One process, one core, for each point; and the largest cohort on all cores."""
    points = [here("point", population, 100) for population in POPULATIONS]
    points += [here("point", POPULATIONS[-1], cohort) for cohort in COHORTS if cohort != 100]
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "bench.json"
        options = ["--cohort-size", COHORTS[-1], "--rounds", 1, "--repeats", 5, "--methods", "fedavg", "SL"]
        execute([*FEDHYPER, "bench", "logistic-1M", *options, "--out", out])
        largest = json.loads(out.read_text())
    save("scale", {"points": points, "largest": largest})


def measure_point(population: int, cohort: int) -> dict:
    on_one_core()
    from fedhyper_jax.shell.bench import JOBS, measure
    from fedhyper_jax.shell.bench.jobs import logistic_1m

    build = functools.partial(logistic_1m, population)
    job = JOBS["logistic-1M"]._replace(build=build, clients=f"{population:,} clients made on demand")
    return measure(job, ["SL"], cohort_size=cohort, rounds=max(1, 1_000 // cohort), repeats=5)


# traces


def measure_traces() -> None:
    traces = []
    for population in POPULATIONS:
        for method in TRACE_METHODS:
            traces.append(here("trace", population, method))
            save("traces", {"rounds": TRACE_ROUNDS, "seeds": TRACE_SEEDS, "traces": traces})


def measure_trace(population: int, method: str) -> dict:
    """Accuracy on examples of clients outside of the federation, and both rates, from too small and from usual β⁰."""
    on_one_core()
    import jax
    import jax.numpy as jnp

    import fedhyper_jax as fh
    from fedhyper_jax import data, losses, metrics, models

    clients = data.procedural_logistic(population)
    model = models.logistic(10)

    def make(local_rate):
        return fh.make_method(
            method,
            losses.cross_entropy(model),
            work=fh.local_epochs(1, batch_size=20),
            local_rate=local_rate,
            population=population,
            strategy="chunked(10)",
        )

    keys = jax.random.split(jax.random.key(0), TRACE_SEEDS)
    params = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 64))))(keys)
    _, history = fh.sweep(
        make,
        {"local_rate": jnp.array(TRACE_RATES)},
        keys,
        params,
        clients,
        rounds=TRACE_ROUNDS,
        cohort_size=TRACED[population],
        evaluate=fh.make_evaluation(metrics.classification(model), batch_size=1000),
        evaluation_data=fh.EvaluationData(test=data.examples_of_strangers(clients, 2000)),
        eval_every=5,
    )
    evaluated = np.asarray(history.evaluated)[0, 0]
    numbers = lambda leaf, digits: np.asarray(leaf, float).round(digits).tolist()  # noqa: E731
    return {
        "population": population,
        "cohort_size": TRACED[population],
        "method": method,
        "local_rates": list(TRACE_RATES),
        "evaluated_rounds": np.flatnonzero(evaluated).tolist(),
        "accuracy": numbers(history.evaluation["test_accuracy"][:, :, evaluated], 4),
        "global_rate": numbers(history.info.global_rate, 5),
        "client_rate_median": numbers(history.info.client_rate_median, 6),
        "left_out": int(np.sum(history.info.left_out)),
    }


# sweeps

SWEPT = np.geomspace(0.003, 0.3, 16).round(5).tolist()
# The job `mlp` with the data of a package: as many clients a round, steps, features and units.
AS_MLP = (
    *("--data", "digits", "--partitioner", "iid", "--clients", "500", "--cohort-size", "500", "--model", "mlp"),
    *("--local-steps", "10", "--batch-size", "20", "--with-replacement", "--method", "G"),
    *("--rounds", "20", "--eval-every", "20", "--no-evaluate-clients"),
)


def measure_sweeps() -> None:
    """The whole, from the command line to the end, and the steady programs."""
    whole = {"sweep": [], "commands": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = {"XDG_CACHE_HOME": folder}  # empty at first, and as users find it from the second command on
        for repeat in range(5):
            start = time.perf_counter()
            execute([sys.executable, __file__, "sweep"])
            whole["sweep"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for index, rate in enumerate(SWEPT):
                out = f"{folder}/{repeat}-{index}"
                execute([*FEDHYPER, "run", *AS_MLP, "--local-rate", rate, "--quiet", "--out", out], **cache)
            whole["commands"].append(time.perf_counter() - start)
            save("sweeps", {"command": " ".join(AS_MLP), "rates": SWEPT, "whole": whole, "steady": None})
    save("sweeps", {"command": " ".join(AS_MLP), "rates": SWEPT, "whole": whole, "steady": here_unpinned("steady")})


def here_unpinned(*arguments) -> dict:
    return json.loads(execute([sys.executable, __file__, *arguments]).splitlines()[-1])


def _mlp_runs():
    """A function that sweeps the rates in one program, and one that runs them one after the other."""
    import jax
    import jax.numpy as jnp

    import fedhyper_jax as fh
    from fedhyper_jax.shell.bench import JOBS

    job = JOBS["mlp"]
    task = job.build()
    settings = {"rounds": 20, "cohort_size": job.cohort_size}

    def make(local_rate):
        return fh.make_method("G", task.loss_fn, work=task.work, local_rate=local_rate, strategy=job.strategy)

    key, rates = jax.random.key(1), jnp.array(SWEPT)
    stacked = jax.tree.map(lambda leaf: leaf[None], task.params)

    def sweep():
        return fh.sweep(make, {"local_rate": rates}, key[None], stacked, task.data, **settings)[0]

    @jax.jit
    def one(state):
        return fh.simulate(make(0.1), key, state, task.data, **settings)[0].params

    return sweep, lambda: [one(make(rate).init(task.params)) for rate in SWEPT]


def measure_sweep() -> dict:
    import jax

    jax.block_until_ready(_mlp_runs()[0]())
    return {}


def measure_steady() -> dict:
    import jax

    sweep, one_by_one = _mlp_runs()
    swept, single = jax.block_until_ready((sweep(), one_by_one()))  # compiles
    single = jax.tree.map(lambda *leaves: np.stack(leaves), *single)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 0], b, rtol=2e-3, atol=2e-4), swept, single)
    seconds = {"sweep": [], "one by one": []}
    for repeat in range(5):
        for name, run in (("sweep", sweep), ("one by one", one_by_one))[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


# precision


def measure_precision() -> None:
    """The same runs in both types."""
    runs = []
    options = ["--data", "fashion_mnist", "--model", "cnn", "--cohort-size", 10, "--local-steps", 20, "--rounds", 20]
    options += ["--eval-every", 10, "--no-evaluate-clients", "--method", "G", "--local-rate", 0.05, "--quiet"]
    options += ["--with-replacement", "--strategy", "sequential"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            for dtype in ("float32", "bfloat16"):
                out = f"{folder}/{dtype}-{seed}"
                execute([*FEDHYPER, "run", *options, "--seed", seed, "--compute-dtype", dtype, "--out", out])
                summary = json.loads(pathlib.Path(out, "summary.json").read_text())
                records = [json.loads(line) for line in pathlib.Path(out, "metrics.jsonl").read_text().splitlines()]
                accuracy = [r["accuracy"] for r in records if r["accuracy"] is not None][-1]
                speed = summary["seconds"]["steady_rounds_per_second"] * 10 * 20
                runs.append({"dtype": dtype, "seed": seed, "accuracy": accuracy, "client_steps_per_second": speed})
                save("precision", {"command": " ".join(map(str, options)), "runs": runs})


# profile


GROUPS = (
    ("matrix products and convolutions", r"^dot|ynn_fusion|^custom-call.*matmul|onednn|^conv(?!ert)"),
    ("shuffles (sort)", r"^sort"),
    ("pooling and windows", r"reduce-window|select-and-scatter"),
    ("gathers of examples", r"gather"),
    ("copies and transposes", r"copy|transpose|bitcast|concatenate|pad|slice"),
    ("element-wise and sums", r"fusion|broadcast|reduce|select|add|wrapped|iota|multiply|convert|compare"),
)


def measure_profile() -> None:
    save("profile", {"jobs": {job: here("profiled", job) for job in ("mlp", "cnn")}})


def measure_profiled(name: str) -> dict:
    """One traced round on one core: the operations of XLA's own profile, added up by kind."""
    on_one_core()
    import jax

    from fedhyper_jax.shell.bench import JOBS
    from fedhyper_jax.shell.bench.measure import compile_rounds

    job = JOBS[name]
    task = job.build()
    program = compile_rounds(job, task, task.data, "fedavg", job.strategy, 1)
    program.advance()
    start = time.perf_counter()
    program.advance()
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program.advance()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    spent, named = collections.Counter(), collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if line.name.startswith("python") or re.match(r"while|ThunkExecutor|call|end:|conditional", event.name):
                    continue  # what contains the others
                group = next((title for title, pattern in GROUPS if re.search(pattern, event.name)), "other")
                spent[group] += event.duration_ns / 1e9
                named[re.sub(r"[.\d]+$", "", event.name)] += event.duration_ns / 1e9
    return {"round_seconds": seconds, "operations": dict(spent.most_common()), "names": dict(named.most_common(15))}


# page


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def median(spread: dict, scale: float = 1.0) -> str:
    middle, low, high = (number(scale * spread[name]) for name in ("median", "min", "max"))
    return f"{middle} ({low}–{high})"


def over(a: list[float], b: list[float]) -> str:
    """Median, smallest and largest of the ratios of pairs."""
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def bench_tables(results: dict) -> list[str]:
    lines = []
    for job in results["jobs"]:
        if "error" in job:
            lines += [f"**{job['job']}**: not measured: {job['error']}", ""]
            continue
        memory, flops = job["memory_mib"]["peak"], job["flops_per_client_step"]
        lines += [
            f"**{job['job']}** — {job['description']}; {job['strategy']['used']}, {job['processes']} processes; "
            f"{job['repeats']} × {job['rounds_per_program']} rounds; peak memory {number(memory)} MiB; "
            f"{flops / 1e6:.3g} MFLOP a client-step; matrix products {job['gigaflops_ceiling']:.0f} GFLOP/s.",
            "",
            "| method | cost over FedAvg, % | client-steps/s | rounds/s | GFLOP/s (of the ceiling) | compile, s |",
            "|---|---|---|---|---|---|",
        ]
        for method in job["methods"]:
            cost = method["cost_over_fedavg"]
            cells = "–"
            if cost is not None and method["method"] != "fedavg":
                cells = "**{median:+.1f}** ({min:+.1f} to {max:+.1f})".format(
                    **{name: 100 * value for name, value in cost["wall"].items()}
                )
            lines.append(
                f"| {method['method']} | {cells} | {median(method['client_steps_per_second'])} "
                f"| {median(method['rounds_per_second'])} | {number(method['gigaflops']['median'])} "
                f"({100 * method['share_of_ceiling']:.0f} %) | {method['compile_seconds']:.1f} |"
            )
        lines.append("")
    return lines


PEER_TARGETS = {
    ("mlp", "fedjax"): 9,
    ("mlp", "torch"): 28,
    ("cnn", "torch"): 1.3,
    ("cnn", "fedjax"): 6,
    ("cnn", "flower"): 6,
}


def targets_section() -> list[str]:
    """Targets and results, all from the measurements."""
    peers, jobs, sweeps, scale = load_peers(), load("jobs"), load("sweeps"), load("scale")
    ratios = {(row["job"], row["peer"]): row for row in peers["ratios"]} if peers else {}
    rows = []
    for (job, peer), aim in PEER_TARGETS.items():
        if row := ratios.get((job, peer)):
            measured = row["ratio"]["median"]
            rows.append((f"`{job}` ≥ {aim} × {peer}", f"{number(measured)} ({row['pairs']} pairs)", measured >= aim))
    cnn = {m["method"]: m for job in (jobs or {"jobs": []})["jobs"] if job["job"] == "cnn" for m in job["methods"]}
    for method, aim in {"G": 5, "SL": 5, "CL": 15}.items():
        if method in cnn:
            cost = 100 * cnn[method]["cost_over_fedavg"]["wall"]["median"]
            rows.append((f"{method} costs ≤ {aim} % over FedAvg on `cnn`", f"{cost:+.1f} %", cost <= aim))
    if sweeps and sweeps["steady"]:
        for title, slow, quick, aim in (
            ("16 commands", sweeps["whole"]["commands"], sweeps["whole"]["sweep"], 3),
            ("16 calls of one compiled run", sweeps["steady"]["one by one"], sweeps["steady"]["sweep"], 1.3),
        ):
            measured = statistics.median(a / b for a, b in zip(slow, quick, strict=True))
            rows.append((f"a sweep ≥ {aim} × {title}", f"{measured:.2f} ({len(quick)} pairs)", measured >= aim))
    if scale:
        mib = scale["largest"]["jobs"][0]["memory_mib"]["peak"]
        rows.append(("10,000 clients a round of `logistic-1M` within 4 GiB", f"{mib / 1024:.1f} GiB", mib <= 4096))
    lines = ["## Targets", "", "| target | median measured | |", "|---|---|---|"]
    return lines + [f"| {aim} | {got} | {'met' if met else '**missed**'} |" for aim, got, met in rows] + [""]


def load_peers() -> dict | None:
    path = RESULTS / "benchmark_peers.json"
    return json.loads(path.read_text()) if path.exists() else None


def peers_section() -> list[str]:
    lines, results = ["## Against the peers", ""], load_peers()
    if results is None:
        return [*lines, "Not measured yet.", ""]
    lines += ["| job | peer | our speed over its | its client-steps/s | ours | pairs |", "|---|---|---|---|---|---|"]
    for row in results["ratios"]:
        ratio = "**{median:.2f}** ({min:.2f}–{max:.2f})".format(**row["ratio"])
        cells = (row["job"], row["peer"], ratio, median(row["theirs"]), median(row["ours"]), row["pairs"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = {name: text for pair in results["pairs"] for name, text in pair["theirs"]["versions"].items()}
    versions["our JAX"] = results["pairs"][-1]["ours"]["jax"]
    busiest = max(pair["busy_cores"] or 0 for pair in results["pairs"])
    lines += [
        "",
        f"Medians of pairs, smallest and largest in brackets. {', '.join(f'{k} {v}' for k, v in versions.items())}. "
        f"Before a pair at most {busiest:.1f} cores were busy with something else. `torch1` is the PyTorch loop with "
        "one thread.",
        "",
    ]
    return lines + [f"Failed: {failure}" for failure in results["failures"]]


def cores_section() -> list[str]:
    from fedhyper_jax.shell.bench import spread

    lines, results = ["## The cores of one machine", ""], load("cores")
    if results is None:
        return [*lines, "Not measured yet.", ""]
    lines += ["Client-steps/s of FedAvg, medians of five in turn:", ""]
    lines += ["| job | how | client-steps/s | over one device |", "|---|---|---|---|"]
    for job, measured in results["client_steps_per_second"].items():
        *_, one_device = measured.values()
        for way, speeds in measured.items():
            lines.append(f"| {job} | {way} | {median(spread(speeds))} | {over(speeds, one_device)} |")
    return [*lines, ""]


ACCELERATORS = "## On accelerators"


def accelerators_section(folder: pathlib.Path = RESULTS) -> list[str]:
    """A line for each result of experiments/on_accelerator.py, with the fastest strategy of each job."""
    files = sorted(folder.glob("accelerator-*.json"))
    results = [(path, found) for path in files if (found := json.loads(path.read_text()))["preset"] == "full"]
    if not results:
        return [ACCELERATORS, "", "No GPU or TPU was at hand: nothing has been measured on one.", ""]
    jobs = ("mlp", "cnn", "char_lstm", "logistic-1M", "resnet18")
    lines = [ACCELERATORS, "", "Client-steps/s of FedAvg by the fastest strategy that was tried; in brackets, how many"]
    lines += ["times as fast as the PyTorch loop on the same device.", ""]
    lines += ["| device | JAX | numbers | " + " | ".join(jobs) + " |", "|---" * (3 + len(jobs)) + "|"]
    for path, found in results:
        checks = [row["passed"] for part in ("numbers", "forms") for row in found.get(part, [])]
        cells = [f"[{found['device']['kind']}]({path.with_suffix('.md').name})", found["device"]["jax"]]
        cells.append(f"{sum(checks)} of {len(checks)} pass")
        torch = {row["job"]: row for row in found.get("torch", []) if "job" in row}
        for job in jobs:
            own = [row for row in found.get("strategies", []) if row["job"] == job]
            if not own:
                cells.append("not measured")
                continue
            best = max(own, key=lambda row: row["client_steps_per_second"]["median"])
            speed = best["client_steps_per_second"]["median"]
            cell = f"{number(speed)}, {best['strategy']}"
            if job in torch:
                cell += f" ({number(speed / torch[job]['client_steps_per_second']['median'])} ×)"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def scale_section() -> list[str]:
    lines, results = ["## A million clients", ""], load("scale")
    if results is None:
        return [*lines, "Not measured yet.", ""]
    draw_scale(results["points"])
    lines += [
        "![Seconds a round and memory against population and cohort](speed/scale.png)",
        "",
        "`logistic-1M`, SL, one process on one core; memory is the most that the process held, programs and compiler "
        "included.",
        "",
        "| population | clients a round | seconds a round | client-steps/s | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for point in results["points"]:
        (method,) = point["methods"]
        lines.append(
            f"| {point['population']:,} | {point['cohort_size']:,} | {median(method['round_seconds'])} "
            f"| {median(method['client_steps_per_second'])} | {number(point['memory_mib']['peak'])} |"
        )
    return [*lines, "", "10,000 clients a round on all cores:", "", *bench_tables(results["largest"])]


def new_figure(width: float, height: float, columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def draw_scale(points: list[dict]) -> None:
    figure, axes = new_figure(9, 3.4, 2)
    by_population = [point for point in points if point["cohort_size"] == 100]
    by_cohort = sorted((p for p in points if p["population"] == POPULATIONS[-1]), key=lambda p: p["cohort_size"])
    for ax, chosen, name, title in zip(
        axes,
        (by_population, by_cohort),
        ("population", "cohort_size"),
        ("100 clients a round", "of 10⁶ clients"),
        strict=True,
    ):
        x = [point[name] for point in chosen]
        ax.loglog(x, [point["methods"][0]["round_seconds"]["median"] for point in chosen], "o-", color="#0072B2")
        ax.set(xlabel={"population": "population", "cohort_size": "clients a round"}[name], title=title)
        ax.set_ylabel("seconds a round", color="#0072B2")
        ax.set_ylim(1e-3, 10)
        memory = ax.twinx()
        memory.semilogx(x, [point["memory_mib"]["peak"] for point in chosen], "s--", color="#D55E00")
        memory.set_ylabel("peak memory, MiB", color="#D55E00")
        memory.set_ylim(0, 1.2 * max(point["memory_mib"]["peak"] for point in points))
        ax.grid(alpha=0.3)
    figure.savefig(FOLDER / "scale.png", dpi=150)


def traces_section() -> list[str]:
    lines, results = ["## FedHyper from 10² to 10⁶ clients", ""], load("traces")
    if results is None:
        return [*lines, "Not measured yet.", ""]
    for index, rate in enumerate(TRACE_RATES):
        draw_traces(results["traces"], index, FOLDER / f"traces-{rate}.png")
    lines += [f"![From a local rate of {rate}](speed/traces-{rate}.png)" for rate in TRACE_RATES]
    sizes = sorted({(trace["population"], trace["cohort_size"]) for trace in results["traces"]})
    lines += [
        "",
        "Logistic regression on procedural clients (log-normal sizes of median 20, each with a labelling and inputs of "
        f"its own near common ones), one epoch in batches of 20, {results['rounds']} rounds, {results['seeds']} seeds; "
        "accuracy on 2,000 examples of clients outside of the federation, % after the last round, mean ± sd.",
        "",
        "| method | β⁰ | " + " | ".join(f"{population:,} ({cohort})" for population, cohort in sizes) + " |",
        "|---" * (2 + len(sizes)) + "|",
    ]
    by = {(trace["method"], trace["population"]): trace for trace in results["traces"]}
    for index, rate in enumerate(TRACE_RATES):
        for method in dict.fromkeys(trace["method"] for trace in results["traces"]):
            cells = []
            for population, _ in sizes:
                trace = by.get((method, population))
                final = 100 * np.array(trace["accuracy"])[index, :, -1] if trace else None
                cells.append("–" if final is None else f"{final.mean():.1f} ± {final.std(ddof=1):.1f}")
            lines.append(f"| {method} | {rate:g} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw_traces(traces: list[dict], index: int, path: pathlib.Path) -> None:
    """Rows: accuracy, α, median β; a column for each population."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(POPULATIONS), sharex=True, sharey="row")
    colours = dict(zip(TRACE_METHODS, ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00"), strict=True))
    rows = (("accuracy", "accuracy"), ("global_rate", "global rate α"), ("client_rate_median", "median client rate β"))
    for trace in traces:
        column = POPULATIONS.index(trace["population"])
        for row, (name, _) in enumerate(rows):
            values = np.array(trace[name])[index].mean(0)
            x = trace["evaluated_rounds"] if name == "accuracy" else np.arange(len(values))
            dashes = {"linestyle": "--"} if trace["method"] == "fedavg" else {}
            axes[row, column].plot(x, values, color=colours[trace["method"]], label=trace["method"], **dashes)
            if name != "accuracy":
                axes[row, column].set_yscale("log")
    for column, population in enumerate(POPULATIONS):
        axes[0, column].set_title(f"{population:,} clients,\n{TRACED[population]:,} a round")
        axes[-1, column].set_xlabel("round")
    for row, (_, title) in enumerate(rows):
        axes[row, 0].set_ylabel(title)
    axes[0, 0].legend(fontsize=8)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.suptitle(f"From a local rate of {traces[0]['local_rates'][index]:g}, mean of seeds")
    figure.savefig(path, dpi=130)


def sweeps_section() -> list[str]:
    lines, results = ["## Sweeps", ""], load("sweeps")
    if results is None:
        return [*lines, "Not measured yet.", ""]
    whole, steady = results["whole"], results["steady"]
    lines += [
        "16 local rates × 20 rounds of `mlp` with G, in one program of `sweep`:",
        "",
        "| against | times faster | sweep, s | the other, s |",
        "|---|---|---|---|",
        f"| 16 `fedhyper run` commands, from start to end | {over(whole['commands'], whole['sweep'])} "
        f"| {statistics.median(whole['sweep']):.1f} | {statistics.median(whole['commands']):.1f} |",
    ]
    if steady:
        lines.append(
            f"| 16 calls of one compiled run, nothing but the rounds | {over(steady['one by one'], steady['sweep'])} "
            f"| {statistics.median(steady['sweep']):.1f} | {statistics.median(steady['one by one']):.1f} |"
        )
    return [
        *lines,
        "",
        f"The commands ran `fedhyper run {results['command']}` with their default settings and cache, all of them "
        f"{len(whole['sweep'])} times, the first time with an empty cache.",
        "",
    ]


def precision_section() -> list[str]:
    from fedhyper_jax.shell.bench import spread

    lines, results = ["## bfloat16", ""], load("precision")
    if results is None:
        return [*lines, "Not measured yet.", ""]
    lines += [f"`fedhyper run {results['command']} --compute-dtype …`, seeds 0 to 2:", ""]
    lines += ["| compute dtype | client-steps/s | accuracy, % |", "|---|---|---|"]
    for dtype in ("float32", "bfloat16"):
        own = [run for run in results["runs"] if run["dtype"] == dtype]
        speeds, accuracies = zip(*((r["client_steps_per_second"], 100 * r["accuracy"]) for r in own), strict=True)
        lines.append(
            f"| {dtype} | {median(spread(speeds))} | {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f} |"
        )
    return [*lines, ""]


def profile_section() -> list[str]:
    lines, results = ["## Where the time of a round goes", ""], load("profile")
    if results is None:
        return [*lines, "Not measured yet.", ""]
    lines += ["One process on one core, one round of FedAvg in XLA's own profile:", ""]
    for job, measured in results["jobs"].items():
        total = sum(measured["operations"].values())
        lines += [
            f"**{job}**, {1000 * measured['round_seconds']:.0f} ms a round:",
            "",
            "| operations | share |",
            "|---|---|",
        ]
        lines += [f"| {name} | {100 * seconds / total:.0f} % |" for name, seconds in measured["operations"].items()]
        lines.append("")
    return lines


def page() -> str:
    _, commands = __doc__.strip().split("\n\n", 1)
    lines = ["# Fast, and far", "", "```text", commands, "```", ""]
    jobs, several = load("jobs"), load("models")
    if jobs:
        machine, versions = jobs["machine"], jobs["environment"]
        lines += [
            f"{machine['cores']} cores, {machine['vectors']}; JAX {versions['jax']} on {versions['device']}, but for "
            "the section on accelerators.",
            "",
        ]
    lines += [*targets_section(), *peers_section()]
    lines += ["## Every job and what a scheduler costs", ""]
    lines += bench_tables(jobs) if jobs else ["Not measured yet.", ""]
    lines += bench_tables(several) if several else []
    lines += [
        *sweeps_section(),
        *cores_section(),
        *accelerators_section(),
        *scale_section(),
        *traces_section(),
        *precision_section(),
        *profile_section(),
    ]
    reading = HERE / "speed_reading.md"
    lines += [reading.read_text()] if reading.exists() else []
    return "\n".join(lines)


COMMANDS = {
    "jobs": measure_jobs,
    "cores": measure_cores,
    "scale": measure_scale,
    "traces": measure_traces,
    "sweeps": measure_sweeps,
    "precision": measure_precision,
    "profile": measure_profile,
    "page": lambda: None,
}
# A process of its own for each, started by the commands above.
PARTS = {
    "point": lambda population, cohort: measure_point(int(population), int(cohort)),
    "trace": lambda population, method: measure_trace(int(population), method),
    "sweep": measure_sweep,
    "steady": measure_steady,
    "profiled": measure_profiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*COMMANDS, *PARTS), metavar="{" + ",".join(COMMANDS) + "}")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what in PARTS:
        print(json.dumps(PARTS[given.what](*given.arguments)))
        return
    COMMANDS[given.what]()
    (RESULTS / "speed.md").write_text(page())


if __name__ == "__main__":
    main()
