"""Other simulators and ours on the same two jobs, in turn on the same machine: how many times faster are we?

Command:   python experiments/benchmark_peers.py                       (about an hour on 2 cores; nothing else may run)
           python experiments/benchmark_peers.py --only-environments   (makes the peers' environments and stops)
Expected:  experiments/results/benchmark_peers.json and the table that it prints: for each job and peer the median of
           our client-steps a second over the peer's in each pair of runs, with the smallest and the largest of them.

Peers: a plain PyTorch loop, FedJAX, pfl-research and Flower with Ray, each as fast as its own documentation has it
(experiments/peers/; common.py describes the jobs). Each run, ours included, is a process of its own. A pair is one run
of a peer and one of ours, one after the other, in an order that alternates. A run's speed is its client-steps a round
over the median of its steady rounds; compilation and start are left out. A run whose loss did not fall is refused.
On a machine that does other work PyTorch's threads wait for each other and the ratios mean nothing: before each pair
it is looked at for a second, and how many of its cores were busy stands in the results.

Each peer has a virtual environment of its own, made with pip in the folder --environments, since their pins clash. The
wheel of PyTorch that pip finds first may bring a GPU's libraries along; --pip-arguments
"--extra-index-url https://download.pytorch.org/whl/cpu" avoids them. `cnn` reads the IDX files of Fashion-MNIST.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from fedhyper_jax.shell.bench import machine, spread

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "benchmark_peers.json"


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another simulator: its script, what pip installs for it, and its timed rounds of each job.

    ``environment`` is whose environment it shares, ``threads`` how many it gets, where it is not all.
    """

    title: str
    script: str
    packages: tuple[str, ...]
    rounds: dict[str, int]
    launcher: tuple[str, ...] = ()
    environment: str | None = None
    threads: int | None = None


TORCH = ("torch==2.13.0", "numpy")
PEERS = {
    "torch": Peer("plain PyTorch loop", "torch_loop.py", TORCH, {"mlp": 5, "cnn": 5}),
    "torch1": Peer(
        "plain PyTorch loop, 1 thread",
        "torch_loop.py",
        TORCH,
        {"mlp": 5, "cnn": 5},
        environment="torch",
        threads=1,
    ),
    "fedjax": Peer(
        "FedJAX",
        "fedjax_run.py",
        (
            *("fedjax==0.0.17", "jax==0.4.30", "jaxlib==0.4.30", "numpy<2"),
            *("scipy<1.13", "optax==0.2.3", "dm-haiku==0.0.12"),
        ),
        {"mlp": 10, "cnn": 3},
    ),
    "pfl": Peer(
        "pfl-research",
        "pfl_run.py",
        ("pfl==0.6.0", "torch==2.13.0"),
        {"mlp": 5, "cnn": 5},
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node={threads}"),
    ),
    "flower": Peer(
        "Flower + Ray",
        "flower_run.py",
        ("flwr[simulation]==1.42.0", "torch==2.13.0"),
        {"mlp": 2, "cnn": 3},
    ),
}


def main():
    parser = argparse.ArgumentParser(description="Times other simulators and ours in turn.")
    parser.add_argument("--jobs", nargs="+", choices=("mlp", "cnn"), default=["mlp", "cnn"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs for each job and peer")
    parser.add_argument("--rounds", type=int, help="timed rounds of each run of a peer; each has its own default")
    parser.add_argument("--threads", type=int, default=machine()["cores"], help="threads or processes for peers")
    parser.add_argument("--ours", default="", help="more arguments of `fedhyper bench`, e.g. '--strategy sequential'")
    parser.add_argument("--environments", type=pathlib.Path, default=pathlib.Path("~/.cache/fedhyper-peers"))
    parser.add_argument("--pip-arguments", default="", help="more arguments of `pip install`")
    parser.add_argument("--only-environments", action="store_true", help="make the environments and stop")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args()
    if given.pairs < 1 or given.threads < 1 or (given.rounds or 1) < 1:
        parser.error("pairs, threads and rounds must be at least 1")
    folder = given.environments.expanduser().absolute()
    try:
        for name in given.peers:
            make_environment(
                folder / (PEERS[name].environment or name), PEERS[name].packages, shlex.split(given.pip_arguments)
            )
        if not given.only_environments:
            compare(given, folder)
    except RunError as error:
        sys.exit(f"benchmark_peers: {error}")


def compare(given, folder: pathlib.Path) -> None:
    """All pairs; what is known so far is written after each, beside earlier pairs of jobs and peers not asked for."""
    pairs, failures = [], []
    if given.out.exists():
        earlier = json.loads(given.out.read_text())["pairs"]
        pairs = [pair for pair in earlier if pair["job"] not in given.jobs or pair["peer"] not in given.peers]
    for number, job, name in itertools.product(range(given.pairs), given.jobs, given.peers):
        sides = {"theirs": lambda: run_peer(name, job, given, folder), "ours": lambda: run_ours(job, given)}  # noqa: B023
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        label = f"pair {number + 1}, {job}, {name}"
        busy = busy_cores()
        if busy is not None and busy > 0.2:
            print(f"{label}: {busy:.1f} cores are busy with something else", file=sys.stderr, flush=True)
        try:
            runs = {side: sides[side]() for side in order}
        except RunError as error:
            failures.append(f"{label}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        pairs.append({"job": job, "peer": name, "pair": number, "busy_cores": busy, "first": order[0], **runs})
        ours, theirs = (runs[side]["client_steps_per_second"] for side in ("ours", "theirs"))
        print(f"{label}: ours {ours:,.0f}, {theirs:,.0f} client-steps/s", file=sys.stderr, flush=True)
        write(given.out, {"machine": machine(), "ratios": ratios(pairs), "failures": failures, "pairs": pairs})
    if pairs:
        print_table(ratios(pairs), pairs)
    if failures:
        raise RunError(f"{len(failures)} runs failed and their pairs are missing")


def ratios(pairs: list[dict]) -> list[dict]:
    """For each job and peer: our speed over theirs, and both speeds."""
    rows = []
    for job, peer in dict.fromkeys((pair["job"], pair["peer"]) for pair in pairs):
        own = [pair for pair in pairs if (pair["job"], pair["peer"]) == (job, peer)]
        speeds = {side: [pair[side]["client_steps_per_second"] for pair in own] for side in ("ours", "theirs")}
        rows.append(
            {
                "job": job,
                "peer": peer,
                "pairs": len(own),
                "ratio": spread([ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]),
                **{side: spread(values) for side, values in speeds.items()},
            }
        )
    return rows


def print_table(rows: list[dict], pairs: list[dict]) -> None:
    """The table in Markdown."""
    print("| job | peer | its client-steps/s | ours | ratio, median of pairs (min–max) | pairs |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio, theirs, ours = (row[name] for name in ("ratio", "theirs", "ours"))
        print(
            f"| {row['job']} | {PEERS[row['peer']].title} | {theirs['median']:,.0f} | {ours['median']:,.0f} "
            f"| **{ratio['median']:.2f}** ({ratio['min']:.2f}–{ratio['max']:.2f}) | {row['pairs']} |"
        )
    versions = {name: number for pair in pairs for name, number in pair["theirs"]["versions"].items()}
    versions["our JAX"] = pairs[-1]["ours"]["jax"]
    where = machine()
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"\n{where['cores']} cores, {where['vectors']}; {named}; ours with strategy "
          + ", ".join(sorted({f"{pair['ours']['strategy']} ({pair['job']})" for pair in pairs})))  # fmt: skip


def busy_cores() -> float | None:
    """How many cores were at work during a second in which we are not; None where the system does not tell."""

    def idle_and_all():
        times = [int(word) for word in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return times[3] + times[4], sum(times)  # idle and waiting for disks

    try:
        before = idle_and_all()
        time.sleep(1.0)
        idle, total = (after - first for after, first in zip(idle_and_all(), before, strict=True))
    except (OSError, ValueError, IndexError):
        return None
    return (os.cpu_count() or 1) * (1 - idle / max(total, 1))


class RunError(Exception):
    """A run that gave no result that can be used."""


def make_environment(folder: pathlib.Path, packages: tuple[str, ...], pip_arguments: list[str]) -> None:
    """A virtual environment with some packages; one that has them already is left alone."""
    ready, wanted = folder / "packages.txt", "\n".join(packages)
    if ready.is_file() and ready.read_text() == wanted:
        return
    print(f"making {folder.name}'s environment", file=sys.stderr, flush=True)
    if not (folder / "bin" / "python").exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            execute([sys.executable, "-m", "venv", folder])
        except RunError:  # Debian's Python has no ensurepip
            bootstrap = folder.parent / "bootstrap"
            execute([sys.executable, "-m", "pip", "install", "--quiet", "--target", bootstrap, "virtualenv"])
            execute([sys.executable, "-m", "virtualenv", "--quiet", folder], PYTHONPATH=str(bootstrap))
    execute([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *pip_arguments, *packages])
    ready.write_text(wanted)


def run_peer(name: str, job: str, given, folder: pathlib.Path) -> dict:
    """One run of a peer: what its script reported."""
    peer = PEERS[name]
    folder, threads = folder / (peer.environment or name), peer.threads or given.threads
    launcher = [word.format(threads=threads) for word in peer.launcher]
    rounds = given.rounds or peer.rounds[job]
    command = [folder / "bin" / "python", *launcher, HERE / "peers" / peer.script, job, rounds, threads]
    lines = execute(command).splitlines()
    result = next((json.loads(line) for line in reversed(lines) if line.startswith('{"peer"')), None)
    if result is None:
        raise RunError(f"{name} printed no result for {job}; its last line: {(lines or [''])[-1]}")
    if not result["loss_after"] < result["loss_before"]:
        raise RunError(f"{name}'s loss did not fall on {job}: {result['loss_before']} to {result['loss_after']}")
    speed = result["client_steps_per_round"] / statistics.median(result["seconds"])
    return {"client_steps_per_second": speed, **result}


def run_ours(job: str, given) -> dict:
    """One run of `fedhyper bench`, FedAvg alone."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "bench.json"
        command = [sys.executable, "-m", "fedhyper_jax.shell.cli", "bench", job, "--methods", "fedavg", "--quiet"]
        execute([*command, "--out", out, *shlex.split(given.ours)])
        results = json.loads(out.read_text())
    (measured,) = results["jobs"]
    (method,) = measured["methods"]
    loss = method["client_loss"]
    if method["left_out"] or loss["last"] is None or not loss["last"] < loss["first"]:
        raise RunError(f"our loss did not fall on {job}: {loss}")
    return {
        "client_steps_per_second": method["client_steps_per_second"]["median"],
        "client_steps_per_round": measured["client_steps_per_round"],
        "round_seconds": method["round_seconds"],
        "compile_seconds": method["compile_seconds"],
        "strategy": measured["strategy"]["used"],
        "processes": measured["processes"],
        "loss_before": loss["first"],
        "loss_after": loss["last"],
        "jax": results["environment"]["jax"],
    }


def execute(command: list, **environment: str) -> str:
    """Standard output of a command."""
    files = find_fashion_mnist()
    defaults = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # Flower and Ray would report home
    defaults["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    environment = {**os.environ, **defaults, **({"FASHION_MNIST": files} if files else {}), **environment}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        tail = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise RunError(f"{' '.join(pathlib.Path(str(word)).name for word in command[:4])} failed: {tail}")
    return done.stdout


def find_fashion_mnist() -> str | None:
    """The folder of the IDX files, wherever our own loader finds them."""
    from fedhyper_jax.data.sources import locate_files

    files, _ = locate_files("fashion_mnist", None)
    return None if files is None else str(files["train_images"].absolute().parent)


def write(out: pathlib.Path, results: dict) -> None:
    """As a whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, out)


if __name__ == "__main__":
    main()
