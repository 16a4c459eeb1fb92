"""The figures of a run or of a comparison, put together of panels."""

from typing import Any

from matplotlib.figure import Figure

from fedhyper_jax.shell.config import Config, RunConfig
from fedhyper_jax.shell.panels import PANELS, STYLES, Curve, Marks, draw_median_rates, finish, legend, panel
from fedhyper_jax.shell.records import Record, group_records
from fedhyper_jax.tasks import Measure


def common_marks(summary: dict[str, Any], local_rate: float | None = None) -> Marks:
    """The metric, and the bounds of the runs from a local rate (of all if None); none where methods differ in them."""
    own = [bounds for bounds in summary.get("rate_bounds", []) if local_rate in (None, bounds["initial_local_rate"])]
    common = {}
    for rate in ("global", "local"):
        found = {tuple(bounds[rate]) for bounds in own if bounds[rate] is not None}
        common[rate] = list(found.pop()) if len(found) == 1 else None
    measure = Measure(**summary["metric"]) if "metric" in summary else None
    return Marks(measure, common["global"], common["local"])


def run_figures(records: list[Record], config: RunConfig | None, summary: dict[str, Any]) -> dict[str, Figure]:
    """Of a run: a figure a panel, and all panels in one, by name."""
    lines = [Curve("" if config is None else config.method.name, [records], alone=True)]
    marks = common_marks(summary)
    figures = {}
    for name in PANELS:
        file = marks.metric if name == "metric" else name
        figures[file] = Figure(figsize=(6.4, 4.0), layout="constrained")
        panel(figures[file].subplots(), name, lines, marks)
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    places = {
        "metric": grid[0, 0:3],
        "local_rates": grid[0, 3:6],
        "global_rate": grid[1, 0:2],
        "inner_product": grid[1, 2:4],
        "clipped_share": grid[1, 4:6],
    }
    for name, place in places.items():
        panel(figure.add_subplot(place), name, lines, marks)
    if config is not None:
        start = f"from local rate {config.method.local_rate:g}, seed {config.run.seed}"
        figure.suptitle(f"{lines[0].label} on {config.data.name}, {start}", fontsize=12)
    return {**figures, "overview": figure}


def comparison_figures(records: list[Record], config: Config | None, summary: dict[str, Any]) -> dict[str, Figure]:
    """Of a comparison: all initial local rates in one figure, and one figure each, by name."""
    groups = group_records(records)
    methods = list(dict.fromkeys(method for method, _ in groups))
    others = [method for method in methods if method not in STYLES]
    lines = {
        rate: [
            Curve(method, list(groups[method, rate].values()), others.index(method) if method in others else 0)
            for method in methods
            if (method, rate) in groups
        ]
        for rate in sorted({rate for _, rate in groups})
    }
    marks = {rate: common_marks(summary, rate) for rate in lines}
    data = "" if config is None else f" on {config.data.name}"
    seeds = max(len(line.runs) for rate in lines for line in lines[rate])
    bands = f"{seeds} seeds: means, bands ± one standard deviation" if seeds > 1 else "one seed"
    metric = common_marks(summary).metric.replace("_", " ").capitalize()
    figures = {"overview": _overview(lines, marks, f"{metric}{data} and the rates behind it ({bands})")}
    for rate, at_rate in lines.items():
        title = f"All methods{data} from local rate {rate!r} ({bands})"
        figures[f"rate_{rate!r}"] = _rate_figure(at_rate, marks[rate], title)
    return figures


def _overview(lines: dict[float, list[Curve]], marks_of: dict[float, Marks], title: str) -> Figure:
    """A row an initial local rate: the metric, and the local and the global rate behind it."""
    figure = Figure(figsize=(10, 1.1 + 2.8 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), 3, squeeze=False, width_ratios=(1.6, 1, 1))
    figure.suptitle(title, fontsize=12)
    for row, (rate, at_rate) in zip(panels, lines.items(), strict=True):
        marks = marks_of[rate]
        panel(row[0], "metric", at_rate, marks, title=f"{marks.title} from local rate {rate!r}")
        draw_median_rates(row[1], at_rate, marks)
        finish(row[1], at_rate, "Local rate (median client)")
        panel(row[2], "global_rate", at_rate, marks)
    for axes in panels[:-1].ravel():
        axes.set_xlabel("")
    legend(figure, panels[0, 0])
    return figure


def _rate_figure(lines: list[Curve], marks: Marks, title: str) -> Figure:
    """The metric and the global rate; the local rates method by method; inner products and clipped shares."""
    moving = [line for line in lines if line.moves("client_rate_max") or line.moves("client_rate_min")]
    figure = Figure(figsize=(10, 8.6 if moving else 6.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    rows = figure.subfigures(3 if moving else 2, 1, height_ratios=(1.2, 0.9, 1.0) if moving else (1.2, 1.0))
    top = rows[0].subplots(1, 2, width_ratios=(1.7, 1))
    panel(top[0], "metric", lines, marks)
    panel(top[1], "global_rate", lines, marks)
    if moving:
        for axes, line in zip(rows[1].subplots(1, len(moving), sharey=True, squeeze=False)[0], moving, strict=True):
            panel(axes, "local_rates", [line], marks, title=f"{line.label}: local rates")
            axes.label_outer()
            axes.set_xlabel("rounds")
    bottom = rows[-1].subplots(1, 2)
    panel(bottom[0], "inner_product", lines, marks, title="Inner product ⟨Δᵗ, Δᵗ⁻¹⟩, median of seeds")
    panel(bottom[1], "clipped_share", lines, marks)
    legend(figure, top[0])
    return figure
