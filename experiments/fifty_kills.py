"""Kills a real `fedhyper run` fifty times, resumes it each time, and compares what it leaves with an undisturbed run.

    python experiments/fifty_kills.py                 # five minutes of one core
    python experiments/fifty_kills.py --command compare --processes 2 --kills 10

A run of 100 rounds with a checkpoint every round gets SIGKILL, all its processes at once, at random moments; every
other kill comes while a checkpoint is being written, as far as its half-written file can be seen. Expected last lines:

    50 kills: 20 of them before the first new checkpoint, 32 with a half-written checkpoint left behind
    metrics.jsonl: the same 61,677 bytes
    parameters: the same 2,600 bytes

and exit status 0 (the first line differs from time to time). Any difference is named, with exit status 1.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from fedhyper_jax.shell.checkpoint import load_parameters

TINY = "--model logistic --clients 30 --cohort-size 4 --local-steps 2 --batch-size 8 --no-evaluate-clients --quiet"
SETTINGS = {
    "run": "--method scaffold+G --server-optimizer momentum --strategy sequential",
    "compare": "--methods fedavg G+SL CL --local-rates 0.03 0.3 --seeds 2 --strategy sequential",
}
FEDHYPER = [sys.executable, "-m", "fedhyper_jax.shell.cli"]


def start(arguments: list[str], log) -> subprocess.Popen:
    """The command in a process group of its own, so that all its processes can be killed at once."""
    return subprocess.Popen([*FEDHYPER, *arguments], stdout=log, stderr=log, start_new_session=True)


def rounds_done(folder: pathlib.Path) -> int:
    """Rounds in all checkpoints, of all methods."""
    newest: dict[pathlib.Path, int] = {}
    for path in folder.glob("checkpoints/**/round-*.ckpt"):
        newest[path.parent] = max(newest.get(path.parent, 0), int(path.stem.removeprefix("round-")))
    return sum(newest.values())


def half_written(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is being written, or was when its process was killed."""
    return any(folder.glob("checkpoints/**/.*.tmp"))


def wait_for(condition, process: subprocess.Popen, seconds: float, pause: float) -> None:
    """Returns when the condition holds, the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(pause)


def kill_somewhere(process: subprocess.Popen, folder: pathlib.Path, wanted: int, during_save: bool, draw) -> None:
    """Lets a run come to a number of rounds and a random moment after it, or to its next save, and kills it."""
    wait_for(lambda: rounds_done(folder) >= wanted, process, 120, pause=0.002)
    if during_save:
        wait_for(lambda: half_written(folder), process, 2, pause=0.0)
    else:
        time.sleep(draw.uniform(0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parameter_bytes(folder: pathlib.Path) -> dict[str, bytes]:
    """The final parameters by name."""
    if not (folder / "parameters").exists():
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(load_parameters(folder))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def compare_folders(given: pathlib.Path, expected: pathlib.Path) -> bool:
    """Prints whether two finished folders are the same."""
    a, b = ((folder / "metrics.jsonl").read_bytes() for folder in (given, expected))
    same = a == b
    print(f"metrics.jsonl: {'the same' if a == b else 'OTHER'} {len(b):,} bytes")
    a, b = parameter_bytes(given), parameter_bytes(expected)
    if b:
        same &= a == b
        print(f"parameters: {'the same' if a == b else 'OTHER'} {sum(map(len, b.values())):,} bytes")
    return same


def main() -> int:
    """Runs, kills, resumes, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--command", choices=SETTINGS, default="run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as parent:
        work = pathlib.Path(parent)
        arguments = [options.command, *f"{TINY} {SETTINGS[options.command]}".split()]
        arguments += ["--rounds", str(options.rounds), "--checkpoint-every", "1"]
        arguments += ["--processes", str(options.processes)]
        whole, folder = work / "undisturbed", work / "killed"
        with open(work / "log", "w+") as log:
            subprocess.run([*FEDHYPER, *arguments, "--out", str(whole)], stdout=log, stderr=log, check=True)
            total = options.rounds * (1 if options.command == "run" else 3)
            process = start([*arguments, "--out", str(folder)], log)
            early = halves = 0
            for number in range(options.kills):
                before = rounds_done(folder)
                # so far into what is left that the other kills find something to kill
                wanted = before + draw.randint(0, max(1, 2 * (total - before) // (options.kills - number + 1)))
                kill_somewhere(process, folder, min(wanted, total - 1), number % 2 == 1, draw)
                if process.returncode != -signal.SIGKILL:
                    log.seek(0)
                    print(f"kill {number} came too late: exit status {process.returncode}\n{log.read()}")
                    return 1
                early += rounds_done(folder) == before
                halves += half_written(folder)
                print(f"kill {number + 1}: {rounds_done(folder)} of {total} rounds", flush=True)
                process = start([options.command, "--resume", str(folder), "--quiet"], log)
            status = process.wait()
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.startswith("fedhyper:")]
        print("\n".join(said))
        if status != 0 or json.loads((folder / "summary.json").read_text())["status"] != "finished":
            print(f"the resumed run ended with exit status {status}")
            return 1
        print(
            f"{options.kills} kills: {early} of them before the first new checkpoint, {halves} with a half-written "
            "checkpoint left behind"
        )
        return 0 if compare_folders(folder, whole) else 1


if __name__ == "__main__":
    sys.exit(main())
