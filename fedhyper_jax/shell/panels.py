"""The panels of pictures: what is drawn into one pair of axes, and how the curves of methods look.

`figures` puts panels together.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from fedhyper_jax.base import SHARES
from fedhyper_jax.shell.records import Record, column
from fedhyper_jax.shell.report import target_text
from fedhyper_jax.tasks import Measure

# Okabe and Ito's colours, told apart with any colour vision; FedAvg, the baseline, in black and drawn dashed.
STYLES = {
    "fedavg": ("#000000", (0, (4, 2))),
    "G": ("#E69F00", "solid"),
    "SL": ("#56B4E9", "solid"),
    "CL": ("#009E73", "solid"),
    "G+SL": ("#0072B2", (0, (6, 1.5))),
    "G+CL": ("#D55E00", (0, (6, 1.5))),
    "retained_gain": ("#6A3D9A", "solid"),
    "SL+CL": ("#CC79A7", "solid"),
    "G+SL+CL": ("#882255", (0, (6, 1.5))),
    "decay_global": ("#777777", (0, (1, 1.5))),
    "decay_local": ("#AAAAAA", (0, (1, 1.5))),
}
# Of other methods, in the order in which they take part.
_OTHERS = ("#332288", "#999933", "#AA4499", "#44AA99", "#882255", "#88CCEE", "#661100", "#117733")
_DASHES = ("solid", (0, (6, 1.5)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
_NAMES = {"retained_gain": "retained gain", "fedavg": "FedAvg", "decay_global": "Decay-G", "decay_local": "Decay-SL"}
_NOTHING = 1e-12  # a rate below moves nothing: that of the round in which `retained_gain` measures


class Curve(NamedTuple):
    """One method's records, seed by seed."""

    method: str
    runs: list[list[Record]]
    number: int = 0  # among the methods without a style of their own
    alone: bool = False  # no other curve to be told apart from

    @property
    def label(self) -> str:
        """The method's name as readers know it."""
        return _NAMES.get(self.method, f"FedHyper-{self.method}" if self.method in STYLES else self.method)

    @property
    def style(self) -> dict[str, Any]:
        """Colour and dashes, the same in every picture; a curve alone is solid."""
        again, colour = divmod(self.number, len(_OTHERS))
        colour, dashes = STYLES.get(self.method, (_OTHERS[colour], _DASHES[again % len(_DASHES)]))
        dashes = "solid" if self.alone else dashes
        return {"color": colour, "linestyle": dashes, "linewidth": 2.4 if self.method == "fedavg" else 1.7}

    @property
    def rounds(self) -> int:
        """Rounds that all seeds have done; those of a killed comparison may differ."""
        return min(map(len, self.runs))

    def draw(self, axes: Axes, rounds: np.ndarray, values: np.ndarray) -> None:
        """A line; a point where there is but one, of which no line can be drawn."""
        axes.plot(rounds, values, label=self.label, marker="o" if len(rounds) == 1 else None, **self.style)

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Rounds done (from 1) and a field, (seeds, rounds); rounds without any value are left out."""
        rounds = column(self.runs[0][: self.rounds], "round") + 1
        values = np.stack([column(run[: self.rounds], name) for run in self.runs])
        if name in ("local_rate", "client_rate_min", "client_rate_median", "client_rate_max"):
            values = np.where(values > _NOTHING, values, np.nan)
        known = np.isfinite(values).any(axis=0)
        return rounds[known], values[:, known]

    def moves(self, name: str) -> bool:
        """Whether the field ever changes."""
        _, values = self.values(name)
        return values.size > 0 and float(np.nanmax(values)) > float(np.nanmin(values))


class Marks(NamedTuple):
    """Marks that are drawn besides the records."""

    measure: Measure | None  # None: the folder does not say; it is an accuracy then
    global_bounds: list[float | None] | None
    local_bounds: list[float | None] | None

    @property
    def metric(self) -> str:
        """Name of the metric that is drawn."""
        return "accuracy" if self.measure is None else self.measure.name

    @property
    def title(self) -> str:
        """Of the panel of the metric."""
        return f"Test {self.metric.replace('_', ' ')}"


def panel(axes: Axes, name: str, lines: list[Curve], marks: Marks, title: str | None = None) -> None:
    """Draws the panel of that name of `PANELS`, with its title."""
    standard, draw = PANELS[name]
    draw(axes, lines, marks)
    known = name == "metric" and marks.measure is not None
    note = f" (target {target_text(marks.measure)})" if known else ""
    finish(axes, lines, (title or (marks.title if name == "metric" else standard)) + note)


def _draw_metric(axes: Axes, lines: list[Curve], marks: Marks) -> None:
    measure = marks.measure
    for line in lines:
        _mean_and_spread(axes, line, marks.metric)
    if measure is not None:
        axes.axhline(measure.target, color="#888888", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    if measure is None or measure.higher_is_better:
        axes.set_ylim(0, 1)
    else:
        # from perfection to a little more than guessing has: what diverges leaves the picture
        axes.axhline(measure.guessing, color="#888888", linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
        axes.annotate("guessing", (0.99, measure.guessing), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set_ylim(0, 1.2 * measure.guessing)
    if measure is None or measure.unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_global_rate(axes: Axes, lines: list[Curve], marks: Marks) -> None:
    for line in _distinct(lines, "global_rate"):
        _mean_and_spread(axes, line, "global_rate")
    low, high = axes.get_ylim()
    if high - low < 0.2 * high:  # a rate that hardly moves is drawn so
        axes.set_ylim((low + high) / 2 - 0.1 * high, (low + high) / 2 + 0.1 * high)
    _draw_bounds(axes, marks.global_bounds)


def _draw_local_rates(axes: Axes, lines: list[Curve], marks: Marks) -> None:
    """The median client (its median over seeds), and the range over all clients of all seeds."""
    for line in lines:
        rounds, low = line.values("client_rate_min")
        _, high = line.values("client_rate_max")
        if len(rounds):
            smallest, largest = np.nanmin(low, axis=0), np.nanmax(high, axis=0)
            axes.fill_between(rounds, smallest, largest, color=line.style["color"], alpha=0.18, lw=0, label="range")
    draw_median_rates(axes, lines, marks)


def draw_median_rates(axes: Axes, lines: list[Curve], marks: Marks) -> None:
    """The median client's rate, its median over seeds, and the bounds."""
    for line in _distinct(lines, "client_rate_median"):
        rounds, median = line.values("client_rate_median")
        if len(rounds):
            line.draw(axes, rounds, np.nanmedian(median, axis=0))
    axes.set_yscale("log")
    if marks.local_bounds is not None:
        lower, upper = marks.local_bounds
        if upper is not None and 0 < lower < upper:
            # rates of methods without bounds may lie outside
            lowest, highest = axes.dataLim.minposy, axes.dataLim.y1
            axes.set_ylim(min(lower / 1.25, lowest), max(upper * 1.25, highest))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _draw_bounds(axes, marks.local_bounds)


def _distinct(lines: list[Curve], name: str) -> list[Curve]:
    """Rates that never move and are the same are one line, the first method's: FedAvg's, where it takes part."""
    still = {}
    for line in lines:
        if not line.moves(name):
            _, values = line.values(name)
            still.setdefault(tuple(np.unique(values[np.isfinite(values)])), line)
    return [*still.values(), *(line for line in lines if line.moves(name))]


def _draw_bounds(axes: Axes, bounds: list[float | None] | None) -> None:
    """Bounds as dotted lines, where they lie in sight: they do not stretch the axis."""
    low, high = axes.get_ylim()
    for bound in bounds or ():
        if bound is not None and low <= bound <= high:
            axes.axhline(bound, color="#888888", linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)


def _draw_inner_product(axes: Axes, lines: list[Curve], marks: Marks) -> None:
    del marks
    largest = 0.0
    for line in lines:
        rounds, values = line.values("inner_product")
        if not len(rounds):
            continue
        middle = np.nanmedian(values, axis=0)
        largest = max(largest, float(np.abs(middle).max()))
        # points: the signs flip from round to round, and lines between them would cover everything
        axes.plot(rounds, middle, ".", color=line.style["color"], markersize=4.5, label=line.label)
    # linear within a thousandth of the largest: a rate moves by the product, so smaller ones move nothing to be seen
    threshold = largest * 1e-3 or 1.0
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.4)
    decades = largest * np.array([1.0, 1e-1, 1e-2])
    rounded = 10.0 ** np.floor(np.log10(decades)) if largest else np.array([1.0])
    axes.set_yticks([*-rounded, 0.0, *rounded[::-1]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)


def _draw_clipped_share(axes: Axes, lines: list[Curve], marks: Marks) -> None:
    """Share of a round's rate updates, of both rates and over all seeds, that lay outside the bounds."""
    del marks
    for line in lines:
        rounds, clipped = _total(line, [part for part, _ in SHARES.values()])
        _, updates = _total(line, [whole for _, whole in SHARES.values()])
        made = updates > 0
        if made.any():
            line.draw(axes, rounds[made], clipped[made] / updates[made])
    if not axes.lines:
        axes.text(0.5, 0.5, "no rate was updated", transform=axes.transAxes, ha="center", color="#555555")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


PANELS: dict[str, tuple[str, Callable[[Axes, list[Curve], Marks], None]]] = {
    "metric": ("", _draw_metric),  # its title is the task's
    "global_rate": ("Global rate", _draw_global_rate),
    "local_rates": ("Local rates: median and range of clients", _draw_local_rates),
    "inner_product": ("Inner product ⟨Δᵗ, Δᵗ⁻¹⟩", _draw_inner_product),
    "clipped_share": ("Rate updates clipped", _draw_clipped_share),
}
"""Title of each panel, and how it is drawn."""


def _total(line: Curve, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = [line.values(name) for name in names]
    return parts[0][0], sum(np.nansum(values, axis=0) for _, values in parts)


def _mean_and_spread(axes: Axes, line: Curve, name: str) -> None:
    rounds, values = line.values(name)
    if not len(rounds):
        return
    known = np.isfinite(values)
    mean = np.nanmean(values, axis=0)
    line.draw(axes, rounds, mean)
    if known.sum(axis=0).min() > 1:
        spread = np.nanstd(values, axis=0, ddof=1)
        # not beyond what was seen: an accuracy above 100 % or a negative rate would be nonsense
        low = np.maximum(mean - spread, np.nanmin(values, axis=0))
        high = np.minimum(mean + spread, np.nanmax(values, axis=0))
        axes.fill_between(rounds, low, high, color=line.style["color"], alpha=0.15, lw=0)


def finish(axes: Axes, lines: list[Curve], title: str) -> None:
    """Title and axes as all panels have them."""
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlabel("rounds")
    # the same in all panels of a picture, be it evaluated in few of the rounds
    axes.set_xlim(0, 1.02 * max(line.rounds for line in lines))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def legend(figure: Figure, axes: Axes) -> None:
    """The curves of one panel, named below the whole picture."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 6),
        columnspacing=1.4,
        handlelength=2.4,
        frameon=False,
        fontsize=10,
    )
