"""Pictures of a run or of a comparison, drawn from its folder alone. No pyplot: no backend, no global state.

The numbers come from ``metrics.jsonl``; ``config.toml`` adds names, ``summary.json`` the metric and the rates' bounds.
"""

import os
import pathlib

from fedhyper_jax.shell.config import ConfigError, load_config
from fedhyper_jax.shell.records import CONFIG, PLOTS, read_records, read_summary

_DPI = 150


def plot_folder(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Draws the pictures of a run folder, of `fedhyper run` or of `fedhyper compare`, into its ``plots/``.

    Args:
      folder: the run folder.

    Returns:
      The files written. Of a run: one named by its metric (such as ``accuracy``), ``global_rate``, ``local_rates``,
      ``inner_product``, ``clipped_share`` and ``overview``. Of a comparison: ``overview`` and one ``rate_…`` an initial
      local rate.

    Raises:
      ConfigError: not a run folder, no record in it yet, or no place for the pictures.
    """
    # matplotlib takes a second to import, and of several processes of a run one draws
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fedhyper_jax.shell.figures import comparison_figures, run_figures

    folder = pathlib.Path(folder)
    records = read_records(folder)
    try:
        config = load_config(folder / CONFIG)
    except ConfigError:  # of another version: the numbers can be drawn all the same
        config = None
    summary = read_summary(folder)
    figures = (comparison_figures if "method" in records[0] else run_figures)(records, config, summary)
    paths = []
    try:
        (folder / PLOTS).mkdir(exist_ok=True)
        for name, figure in figures.items():
            FigureCanvasAgg(figure)
            path = folder / PLOTS / f"{name}.png"
            figure.savefig(path, dpi=_DPI)
            paths.append(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder / PLOTS}: {error.strerror}; make room for the plots there"
        ) from error
    return paths
