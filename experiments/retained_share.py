"""The share of the predicted gain that FedAvg retains, and how many steps pull one way, rate by rate.

Command:   python experiments/retained_share.py                     (some 10 minutes)
           python experiments/retained_share.py digits digits01     (a minute; prints, and writes nothing)
Expected:  both fall as the rate grows. At the best rate the share lies between 0.2 and 0.5 on all tasks, lower where
           clients pull one way (n large): the target of `retained_gain` is 0.35 · min(n, 5)^−0.2.
Writes:    experiments/results/retained_share.md

FedAvg (`retained_gain` whose two rules do not act: share_rate=0, global_hyper_rate=0) on the tasks of rates_atlas.py;
one seed (200). ρ: mean of the second half of the run; n: exponential average at its end; accuracy: last 3 evaluations.
"""

import pathlib
import sys

import numpy as np
from rates_atlas import TASKS, Federation, final_accuracy

RATES = {
    "digits": (0.1, 0.2, 0.4, 0.8),
    "digits01": (0.1, 0.2, 0.4, 0.8),
    "digits_k1": (0.15, 0.3, 0.6, 1.2),
    "digits_k100": (0.05, 0.1, 0.2, 0.4),
    "fm": (0.05, 0.1, 0.2, 0.4),
    "fm_iid": (0.05, 0.1, 0.2, 0.4),
    "fm01": (0.025, 0.05, 0.1, 0.2),
    "fm_noise": (0.05, 0.1, 0.2, 0.4),
}
SEED = 200


def measure(name: str) -> list[tuple[float, float, float, float]]:
    """(rate, accuracy in %, ρ, n) for each rate."""
    federation, kept = Federation(TASKS[name]), {}
    history = federation.sweep(
        "retained_gain",
        {"local_rate": RATES[name]},
        (SEED,),
        callbacks=[lambda progress: kept.update(rule=progress.copied().local_rate)],
        start="given",
        share_rate=0.0,
        global_hyper_rate=0.0,
        evaluate_at="last",
    )
    accuracy = final_accuracy(history)[:, 0]
    shares = np.asarray(history.info.retained_share)[:, 0, federation.task.rounds // 2 :].mean(axis=1)
    coherence = np.asarray(kept["rule"].predicted / kept["rule"].descent)[:, 0]
    return list(zip(RATES[name], accuracy.tolist(), shares.tolist(), coherence.tolist(), strict=True))


def main() -> None:
    """Writes the page."""
    names = sys.argv[1:] or list(RATES)
    lines = [
        "# The retained share at fixed rates",
        "",
        "`python experiments/retained_share.py`, whose first lines say what the numbers are; the best rate is bold.",
        "",
    ]
    lines += ["| task | rate | accuracy | ρ | n |", "|---|---|---|---|---|"]
    for name in names:
        rows = measure(name)
        best = max(row[1] for row in rows)
        for rate, accuracy, share, coherence in rows:
            told = f"**{rate:g}**" if accuracy == best else f"{rate:g}"
            lines.append(f"| {TASKS[name].title} | {told} | {accuracy:.1f} | {share:.2f} | {coherence:.2f} |")
        print(*lines[-len(rows) :], sep="\n", flush=True)
    if sys.argv[1:]:
        return
    results = pathlib.Path(__file__).parent / "results" / "retained_share.md"
    results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
