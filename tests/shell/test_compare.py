"""A comparison compiles a program a family of methods, and each method leaves what is its own."""

import pytest

from fedhyper_jax.engine import sweep
from fedhyper_jax.methods import method_families
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.compare import divided_families
from fedhyper_jax.shell.records import group_records, read_records

METHODS = ("fedavg", "G", "SL", "CL", "G+SL", "G+CL")
TINY = ["--model", "logistic", "--clients", "12", "--cohort-size", "3", "--local-steps", "2", "--batch-size", "4"]
TINY += ["--no-evaluate-clients", "--quiet", "--rounds", "5", "--checkpoint-every", "4"]


def test_methods_that_differ_in_hyper_rates_share_a_program(tmp_path, monkeypatch):
    """Two programs for six methods, the timing of strategies and a short last chunk included."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    advance = sweep.__globals__["_advance"]
    before = advance._cache_size()
    arguments = ["compare", *TINY, "--methods", *METHODS, "--local-rates", "0.05", "--seeds", "2"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert advance._cache_size() == before + 2
    model, rate, clients = 4 * 650, 4, 3
    updates = {"fedavg": (0, 0), "G": (1, 0), "SL": (0, 1), "CL": (0, 3), "G+SL": (1, 1), "G+CL": (1, 3)}
    cells = group_records(read_records(tmp_path / "run"))
    assert list(cells) == [(method, 0.05) for method in METHODS]
    for (method, _), runs in cells.items():
        sent = model * (2 if "CL" in method else 1) + rate
        for record in (record for records in runs.values() for record in records):
            assert (record["global_rate_updates"], record["local_rate_updates"]) == updates[method]
            assert record["bytes_down"] == clients * sent
    last = {method: runs[0][-1] for (method, _), runs in cells.items()}
    assert last["fedavg"]["global_rate"] == last["SL"]["global_rate"] == 1 != last["G"]["global_rate"]
    assert last["fedavg"]["local_rate"] == last["G"]["local_rate"] == last["CL"]["local_rate"] == pytest.approx(0.05)
    assert last["SL"]["local_rate"] != pytest.approx(0.05)


@pytest.mark.parametrize("methods", [METHODS, ("fedavg", "fedprox", "scaffold", "G"), ("fedavg",)])
def test_processes_divide_the_methods(methods):
    families = method_families(methods)
    for processes in range(1, 9):
        shares = divided_families(families, processes)
        assert 1 <= len(shares) <= processes and all(shares)
        done = [method for share in shares for family in share for method in family.hyper_rates]
        assert sorted(done) == sorted(methods)
        longest = max(sum(len(family.hyper_rates) for family in share) for share in shares)
        assert longest <= -(-len(methods) // processes) + 1
