"""Reports of a partition: in numbers, as a text table and as a picture."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.data.partition import Partition

# Paul Tol's "muted" scheme, told apart with any colour vision; nine hues and a grey for the tenth class.
_MUTED = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB")
_MAX_BARS = 200  # wider pictures show a sample of the clients: bars thinner than a pixel or two blur into each other
_SAMPLE_BARS = 100
_TABLE_ROWS = 12


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PartitionReport:
    """Numbers that describe a partition; ``str(report)`` is a table.

    Attributes:
      method: name of the partitioner.
      settings: its arguments.
      digest: hex SHA-256 of the assignment.
      moved: examples moved to give every client its minimum.
      client_sizes: (clients,) number of examples of each client.
      classes: (classes,) the distinct labels, ascending; None without labels.
      label_counts: (clients, classes) examples of each label at each client; None without labels.
    """

    method: str
    settings: Mapping[str, Any]
    digest: str
    moved: int
    client_sizes: np.ndarray
    classes: np.ndarray | None = None
    label_counts: np.ndarray | None = None

    @property
    def size_summary(self) -> tuple[int, float, int]:
        """Minimum, median and maximum number of examples of a client."""
        return int(self.client_sizes.min()), float(np.median(self.client_sizes)), int(self.client_sizes.max())

    @property
    def effective_classes(self) -> np.ndarray | None:
        """(clients,) exp(−Σ_c q_c log q_c), q a client's label shares: 1 for one class, C for C equal ones."""
        if self.label_counts is None:
            return None
        shares = self.label_counts / np.maximum(self.client_sizes, 1)[:, None]
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.exp(-(shares * logs).sum(axis=1))

    @property
    def label_distance(self) -> float | None:
        """Σ_m (n_m/N) ½ Σ_c |q_mc − q_c|: total variation from the pool's labels, 0 for IID, towards 1 for skew."""
        if self.label_counts is None:
            return None
        pool = self.label_counts.sum(axis=0) / self.label_counts.sum()
        return float(np.abs(self.label_counts - self.client_sizes[:, None] * pool).sum() / 2 / self.label_counts.sum())

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        low, median, high = self.size_summary
        lines = [
            f"{self.method}({settings})",
            f"{int(self.client_sizes.sum()):,} examples over {len(self.client_sizes):,} clients; "
            f"smallest {low:,}, median {median:,.6g}, largest {high:,}",
            f"moved to reach the minimum: {self.moved:,}; digest {self.digest[:16]}…",
        ]
        if self.label_counts is None:
            return "\n".join(lines)
        effective = self.effective_classes
        lines += [
            f"effective classes a client: smallest {effective.min():.2f}, median {np.median(effective):.2f}, "
            f"largest {effective.max():.2f}, of {len(self.classes)}; "
            f"distance from the pool's labels {self.label_distance:.3f}",
            "",
        ]
        return "\n".join(lines + self._table(effective))

    def __repr__(self) -> str:
        return f"<PartitionReport {self.method}: {len(self.client_sizes)} clients, digest {self.digest[:12]}>"

    def _table(self, effective: np.ndarray) -> list[str]:
        """A row a client, or evenly spaced ones by size; a column a label, as many as fit a terminal."""
        clients = np.arange(len(self.client_sizes))
        note = ""
        if len(clients) > _TABLE_ROWS:
            by_size = np.argsort(self.client_sizes, kind="stable")
            clients = by_size[np.linspace(0, len(by_size) - 1, _TABLE_ROWS).round().astype(int)]
            note = f"({_TABLE_ROWS} of {len(self.client_sizes):,} clients, evenly spaced from smallest to largest)"
        columns = len(self.classes) if len(self.classes) <= 12 else 0
        header = ["client", "examples", "effective", *(f"{label}" for label in self.classes[:columns])]
        rows = [
            [f"{client}", f"{self.client_sizes[client]:,}", f"{effective[client]:.2f}"]
            + [f"{count:,}" for count in self.label_counts[client, :columns]]
            for client in clients
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        return [*lines, note] if note else lines


def partition_report(partition: Partition, labels: np.ndarray | None = None) -> PartitionReport:
    """Sizes, label histogram and effective classes of every client.

    Args:
      partition: what to describe.
      labels: (N,) integer labels of the pool; None leaves the label columns out.

    Returns:
      A `PartitionReport`; print it, or hand it to `plot_partition`.

    Raises:
      ValueError: labels not 1-D integers, or too few for the partition's rows.

    Example:
      >>> from fedhyper_jax.data.partition import shards
      >>> labels = np.repeat(np.arange(3), 4)
      >>> print(partition_report(shards(labels, 3, shards_per_client=1, seed=0), labels))
      shards(num_clients=3, shards_per_client=1, seed=0)
      12 examples over 3 clients; smallest 4, median 4, largest 4
      moved to reach the minimum: 0; digest ...
      effective classes a client: smallest 1.00, median 1.00, largest 1.00, of 3; distance from the pool's labels 0.667
      <BLANKLINE>
      client  examples  effective  0  1  2
           0         4       1.00  ...
           1         4       1.00  ...
           2         4       1.00  ...
    """
    sizes = partition.client_sizes
    classes = counts = None
    if labels is not None:
        labels = np.asarray(labels)
        rows = np.concatenate(partition.client_rows)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) <= rows.max():
            raise ValueError(
                f"labels must be a 1-D integer array with one label for each row up to {rows.max()}, got shape "
                f"{labels.shape} and dtype {labels.dtype}; give the labels the partition was made from"
            )
        classes, index = np.unique(labels, return_inverse=True)
        client = np.repeat(np.arange(len(sizes)), sizes)
        flat = np.bincount(client * len(classes) + index[rows], minlength=len(sizes) * len(classes))
        counts = flat.reshape(len(sizes), len(classes))
    return PartitionReport(
        method=partition.method,
        settings=partition.settings,
        digest=partition.digest,
        moved=partition.moved,
        client_sizes=sizes,
        classes=classes,
        label_counts=counts,
    )


def plot_partition(report: PartitionReport, path: str | os.PathLike[str]) -> None:
    """Draws the label counts of the clients, stacked, above a histogram of client sizes.

    Above 200 clients the upper panel shows 100 of them, evenly spaced from the smallest to the largest, since averages
    over groups of clients would hide the very skew the picture is for. Where the largest client shown has more than
    20 times the median's examples, the bars show label shares in place of counts.

    Args:
      report: what `partition_report` returned.
      path: file to write; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``).

    Example:
      >>> import pathlib, tempfile
      >>> from fedhyper_jax.data.partition import iid
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "partition.png")
      ...     plot_partition(partition_report(iid(100, 5, seed=0), np.arange(100) % 10), path)
      ...     path.stat().st_size > 1000
      True
    """
    _validate.installed("plot_partition", "matplotlib")
    from matplotlib.figure import Figure  # the object-oriented interface: no backend, no global state

    figure = Figure(figsize=(9.0, 6.2), dpi=150, layout="constrained")
    stacked, histogram = figure.subplots(2, 1, height_ratios=(1.7, 1.0))
    settings = ", ".join(f"{name}={value}" for name, value in report.settings.items() if name != "num_clients")
    figure.suptitle(f"{report.method}({settings}): {len(report.client_sizes):,} clients", fontsize=12)
    _draw_labels(figure, stacked, report)
    _draw_sizes(histogram, report.client_sizes)
    for axes in (stacked, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        for patch in axes.patches:  # they lie inside the axes; measuring a thousand bars is most of the drawing time
            patch.set_in_layout(False)
    figure.savefig(path)


def _draw_labels(figure: Any, axes: Any, report: PartitionReport) -> None:
    clients = np.arange(len(report.client_sizes))
    axes.set_xlabel("client")
    if len(clients) > _MAX_BARS:
        by_size = np.argsort(report.client_sizes, kind="stable")
        clients = by_size[np.linspace(0, len(by_size) - 1, _SAMPLE_BARS).round().astype(int)]
        axes.set_xlabel(f"{_SAMPLE_BARS} of {len(by_size):,} clients, evenly spaced from smallest to largest")
        axes.set_xticks([])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("examples")
    positions, width = np.arange(len(clients)), 0.85 if len(clients) <= 50 else 1.0
    axes.set_xlim(-0.5 - 0.01 * len(clients), len(clients) - 0.5 + 0.01 * len(clients))
    sizes = report.client_sizes[clients]
    extreme = sizes.max() > 20 * np.median(sizes)
    if report.label_counts is None:
        axes.bar(positions, sizes, width, color=_MUTED[0])
        if extreme:
            axes.set_yscale("log")
        return
    counts, classes = report.label_counts[clients], report.classes
    if extreme:  # one client would flatten all others; their sizes are in the histogram below
        counts = counts / np.maximum(sizes, 1)[:, None]
        axes.set_ylabel("share of the client's examples")
    few = len(classes) <= len(_MUTED)
    colours = list(_MUTED[: len(classes)]) if few else _sequential(len(classes))
    bottom = np.zeros(len(clients))
    for column, (label, colour) in enumerate(zip(classes, colours, strict=True)):
        axes.bar(positions, counts[:, column], width, bottom=bottom, color=colour, label=f"{label}")
        bottom += counts[:, column]
    if few:
        handles, names = axes.get_legend_handles_labels()
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "frameon": False}
        axes.legend(handles[::-1], names[::-1], title="label", **place)  # in the order of the stack, top first
    else:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm, ListedColormap

        edges = np.arange(len(classes) + 1) - 0.5
        mappable = ScalarMappable(BoundaryNorm(edges, len(classes)), ListedColormap(colours))
        ticks = np.unique(np.linspace(0, len(classes) - 1, 8).round().astype(int))
        bar = figure.colorbar(mappable, ax=axes, ticks=ticks, label="label", pad=0.01)
        bar.ax.set_yticklabels([f"{classes[tick]}" for tick in ticks])
        bar.ax.minorticks_off()


def _sequential(number: int) -> list:
    """Colours along cividis, which reads the same with and without colour vision."""
    import matplotlib

    return list(matplotlib.colormaps["cividis"](np.linspace(0, 1, number)))


def _draw_sizes(axes: Any, sizes: np.ndarray) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    if high > 50 * max(low, 1):
        bins = np.unique(np.geomspace(max(low, 1), high + 1, 31).round())  # whole numbers: no empty bins at the left
        axes.set_xscale("log")
    else:
        step = max(1, -(-(high - low + 1) // 30))
        bins = np.arange(low, high + step + 1, step) - 0.5
    axes.hist(sizes, bins=bins, color=_MUTED[1], edgecolor="white", linewidth=0.5)
    if low == high:
        axes.set_xlim(low - 5, high + 5)
    median = float(np.median(sizes))
    axes.axvline(median, color=_MUTED[7], linewidth=1.5, label=f"median {median:,.6g}")
    axes.legend(frameon=False, title=f"smallest {low:,}, largest {high:,}")
    axes.set_xlabel("examples of a client")
    axes.set_ylabel("clients")
    axes.yaxis.get_major_locator().set_params(integer=True)
