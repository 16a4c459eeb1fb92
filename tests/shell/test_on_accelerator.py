"""experiments/on_accelerator.py: its checks on this machine, its limit of time, what it concludes and writes."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import on_accelerator as script
from experiments import speed
from fedhyper_jax import data, models
from fedhyper_jax.models.forms import ASSUMED, FORMS, Forms
from tests.helpers import product
from tests.shell.test_bench import load_script, tiny

HERE = pathlib.Path(script.__file__)
CHECKS = {item.name: item.do for item in script.number_items()}
SOON = ("rounds of G+CL, chunked(2)", "random numbers", "convolution, derived by JAX", "sums in bfloat16")


@pytest.mark.parametrize("name", [name if name in SOON else product(name) for name in CHECKS])
def test_numbers_are_right_here(name):
    found = CHECKS[name]()
    assert found["passed"] and 0 <= found["difference"] <= found["tolerance"]


def test_rates_move_in_the_transcription_and_a_wrong_rate_would_not_pass():
    w, alphas, betas = script.rounds_in_numpy(["G", "SL", "CL"])
    assert len(set(alphas)) == script.ROUNDS and len(set(betas)) == script.ROUNDS - 1  # SL moves the next round's
    others = [script.rounds_in_numpy(schedulers)[0] for schedulers in ([], ["G"], ["SL"], ["CL"])]
    assert all(script.relative_difference(a, b) > 1e-3 for i, a in enumerate(others) for b in [w, *others[:i]])
    assert not script.verdict(np.nan, 1.0)["passed"] and not script.verdict(2.0, 1.0)["passed"]


def test_the_convolution_in_numpy_against_finite_differences():
    rng = np.random.default_rng(0)
    x, kernel, g = rng.normal(size=(1, 4, 5, 2)), rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(1, 2, 5, 3))
    _, dx, dkernel = script.convolution_in_numpy(x, kernel, g, (2, 1))
    along_x, along_kernel = rng.normal(size=x.shape), rng.normal(size=kernel.shape)

    def value(s, t):
        return np.sum(script.convolution_in_numpy(x + s * along_x, kernel + t * along_kernel, g, (2, 1))[0] * g)

    assert np.sum(dx * along_x) == pytest.approx((value(1e-5, 0) - value(-1e-5, 0)) / 2e-5)
    assert np.sum(dkernel * along_kernel) == pytest.approx((value(0, 1e-5) - value(0, -1e-5)) / 2e-5)


def test_what_does_not_fit_is_named_and_each_item_is_written():
    clock = {"left": 10.0}
    written = []

    def take(seconds, **found):
        clock["left"] -= seconds
        return found

    def fail():
        raise MemoryError("too\nlarge")

    items = [
        script.Item("a", "first", lambda: take(4, value=1)),
        script.Item("b", "broken", fail),
        script.Item("a", "second", lambda: take(7, value=2)),
        script.Item("a", "third", lambda: take(1, value=3)),
    ]
    results = {}
    script.work_through(items, results, lambda found: written.append(json.dumps(found)), lambda: clock["left"])
    assert [(row["name"], row["value"]) for row in results["a"]] == [("first", 1), ("second", 2)]
    assert results["not_measured"]["b: broken"] == "MemoryError: too large"
    assert list(results["not_measured"]) == ["b: broken", "a: third"]
    first = json.loads(written[0])  # what a run leaves that is killed at once
    assert len(first["not_measured"]) == len(items) and len(written) == 1 + 3


def layer(kind, **milliseconds):
    times = {name.replace("__", ", "): ms for name, ms in milliseconds.items()}
    return {"kind": kind, "milliseconds": times, "failed": {}}


def test_the_forms_that_follow_from_times():
    """Geometric means: the second of two layers is a hundred times as large, and has no more to say for it."""
    layers = [
        layer("conv", one_by_one__in_parts=1.0, at_once__derived=4.0),
        layer("conv", one_by_one__in_parts=300.0, at_once__derived=100.0),
        layer("rnn", own=1.0, flax=2.0),
    ]
    forms = script.best_forms(layers, ASSUMED, "there")
    assert forms == Forms("one_by_one", "in_parts", im2col_channels=3, norm="flax", rnn="own", measured="there")
    image = layer("image", one_by_one__in_parts=1.0, one_by_one__im2col=2.0, at_once__derived=9.0, at_once__im2col=0.1)
    assert script.best_forms([*layers, image], ASSUMED, "there").im2col_channels == 0
    failed = layer("conv", one_by_one__in_parts=1.0)  # the other form did not run here
    assert script.best_forms([layers[1], failed], ASSUMED, "there").gradients == "in_parts"
    assert script.best_forms([], FORMS["cpu"], "there") == FORMS["cpu"]._replace(measured="there")


def test_images_for_ours_and_for_the_peers(tmp_path, monkeypatch):
    script.make_images(tmp_path, examples=200)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    images = data.load("fashion_mnist", standardise=False).train
    assert images["x"].shape == (200, 28, 28, 1) and np.bincount(images["y"]).tolist() == [20] * 10
    common = load_script(HERE.parent / "peers" / "common.py")
    monkeypatch.setitem(common.JOBS["cnn"], "examples", 2)
    x, y = common.clients("cnn")
    order = np.random.default_rng(0).permutation(200)
    assert np.allclose(x.reshape(200, 28, 28, 1), images["x"][order]) and np.array_equal(y.ravel(), images["y"][order])


def canned():
    """Results as a card would leave them."""
    speeds = {"median": 900.0, "min": 800.0, "max": 1000.0}
    row = {"client_steps_per_second": speeds, "compile_seconds": 1.0, "program_mib": 12.0, "device_peak_mib": None}
    slower = row | {"client_steps_per_second": {"median": 300.0, "min": 1.0, "max": 400.0}}
    return {
        "preset": "full",
        "file": "accelerator-card",
        "command": "python experiments/on_accelerator.py",
        "device": {"kind": "Card", "platform": "cuda", "devices": 1, "jax": "0.11"},
        "numbers": [{"name": "rounds", **script.verdict(1e-7, 1e-5)}, {"name": "sums", **script.verdict(2.0, 1.0)}],
        "strategies": [
            {"job": "mlp", "strategy": "sequential", **slower},
            {"job": "mlp", "strategy": "vectorized", **row},
        ],
        "torch": [{"name": "mlp", "job": "mlp", "torch": "2", "device": "cuda", "client_steps_per_second": speeds}],
        "forms": [{"name": "a layer", **layer("rnn", own=1.0, flax=2.0), **script.verdict(0.0, 1.0)}],
        "not_measured": {"schedulers: mlp": "the time was over"},
        "seconds": 570.0,
    }


def test_page_line_and_table_of_a_card(tmp_path, monkeypatch):
    found = canned()
    found["forms_line"] = script.forms_line(found)
    made = eval(f"dict({{{found['forms_line']}}})", {"Forms": Forms, "null": None})  # the line is Python
    assert made == {"gpu": ASSUMED._replace(rnn="own", measured="experiments/results/accelerator-card.md")}
    page = script.markdown(found)
    assert "| mlp | **vectorized** | 900 (800–1,000) |" in page and "ours is 1 times as fast" in page
    assert "Wrong: sums." in page and "- schedulers: mlp: the time was over" in page and found["forms_line"] in page

    (tmp_path / "accelerator-card.json").write_text(json.dumps(found))
    (tmp_path / "accelerator-rehearsal.json").write_text(json.dumps(found | {"preset": "small"}))
    section = functools.partial(speed.accelerators_section, tmp_path)
    monkeypatch.setitem(sys.modules, "speed", speed)
    monkeypatch.setattr(speed, "accelerators_section", section)
    (tmp_path / "speed.md").write_text((speed.RESULTS / "speed.md").read_text())
    for _ in range(2):  # a second time it changes nothing
        script.join(tmp_path / "speed.md")
        text = (tmp_path / "speed.md").read_text()
        line = "| [Card](accelerator-card.md) | 0.11 | 2 of 3 pass | 900, vectorized (1 ×) | not measured |"
        assert text.count(line) == 1 and text.count("accelerator-rehearsal") == 0
        assert text.count(speed.ACCELERATORS) == 1 and "## A million clients" in text


def test_a_job_under_a_strategy(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    found = script.measure_strategy(tiny(), "sequential", repeats=1)
    assert found["client_steps_per_second"]["median"] > 0 and found["program_mib"] > 0
    assert (found["job"], found["strategy"]) == ("tiny", "sequential")
    assert found["client_loss"]["last"] < found["client_loss"]["first"]


def test_a_table_for_a_while_is_what_layers_read():
    x, kernel = jnp.zeros((1, 4, 4, 4)), jnp.zeros((3, 3, 4, 2))

    def program():
        return jax.jit(jax.grad(lambda k, x: models.convolution(x, k).sum())).lower(kernel, x).as_text()

    before = program()
    with script.the_table(ASSUMED._replace(gradients="derived")):
        assert program() != before
    assert program() == before and FORMS["cpu"].measured and FORMS["gpu"].measured is None


@pytest.mark.product  # its items one by one stand above
def test_the_rehearsal_ends_within_its_time(tmp_path):
    command = [sys.executable, str(HERE), "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "accelerator-cpu.json").read_text())
    assert found["seconds"] < 130
    assert found["numbers"] and all(row["passed"] for row in found["numbers"])  # on an idle machine all of it is there
    assert "No number was wrong." in (tmp_path / "accelerator-cpu.md").read_text()
