"""The table of methods for readers: on the terminal, and as the page docs/methods.md."""

import re

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhyper_jax.methods import KINDS, METHODS, method_options, method_table
from fedhyper_jax.shell.config import MethodSettings


def print_methods(console: Console | None = None) -> None:
    """Prints name, equation and options of every method, a table a kind."""
    console = console or Console()
    rows, widest = method_table(), max(map(len, METHODS))
    for kind in KINDS:
        table = Table(
            title=_capital(kind), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("name", width=widest)
        table.add_column("equation", width=max(30, console.width - widest - 28))
        table.add_column("options", width=20)
        for row in rows:
            if row["kind"] == kind:
                table.add_row(*(Text(cell) for cell in (row["name"], row["equation"], _option_names(row["name"]))))
        console.print(table)
    text = (
        "Δ = Σ p_m Δ_m is the pseudo-gradient, old minus new; α the global rate, β the local rate. A method without a "
        "rule of the global rate of its own takes global_rate too. Names joined by '+' act together, e.g. fedprox+G. "
        "`fedhyper methods NAME` prints all about one; `fedhyper methods --markdown` the whole page."
    )
    console.print(Text(text))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _option_names(name: str) -> str:
    return ", ".join(METHODS[name].options) or "–"


def print_method(name: str, console: Console | None = None) -> None:
    """Prints all about one method: what it is, and how its options are set.

    Args:
      name: a key of METHODS.
      console: where to; standard output if None.
    """
    console = console or Console()
    method = METHODS[name]
    table = Table(
        title=f"{name}: {method.title}",
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        pad_edge=False,
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    options = [f"{_flag(option)} (default {default})" for option, default in method_options(name).items()]
    rows = {
        "kind": method.kind,
        "equation": method.equation,
        "state": method.state,
        "extra communication": method.communication,
        "options": "\n".join(options) or "–",
        "source": method.source,
        "note": method.note,
    }
    for label, text in rows.items():
        if text:
            table.add_row(label, Text(text))
    console.print(table)
    console.print()


def _flag(option: str) -> str:
    """How an option is written on the command line."""
    return f"--{option.replace('_', '-')}" if hasattr(MethodSettings, option) else f"--options {option}"


_PAGE = """\
# Methods

This page is what `fedhyper methods --markdown` prints; `fedhyper methods NAME` prints one of its lines.

## Notation

w are the d parameters, t counts rounds and k local steps; Δ_m = w^t − w_m is the update of client m, **old minus new**,
Δ = Σ p_m Δ_m the mean over the cohort S with weights p_m by examples (n_m / Σ n) or uniform, and g a client's gradient.
α is the global rate, which multiplies the server's step (w ← w − α Δ), β the local rate, which multiplies a client's
step (w ← w − β g), β_m^k that of client m at its k-th of K_m steps, and N the number of clients.

Of the options, where a method has them: κ is `hyper_rate` or `cosine_rate`, μ `momentum` or `proximal_weight`,
ε `epsilon`, τ `adaptivity`, γ `scale`, δ `growth`, ℓ* `lower_bound`, a `smoothing` or `gradient_weight`, b `shrink`,
c `polyak_scale` or `decrease`, C `clip_norm`, α of FedDyn `dynamic_weight`, factor `decay_factor` or `plateau_factor`;
clip keeps a rate inside `global_bounds` (α) or `local_bounds` (β), where names stand for `global_gamma` and
`local_gamma`. State is what is kept between rounds besides w, rates and Δ^{{t-1}}.

The products of G, SL and CL scale with the square of the loss. `normalise` makes pure numbers h of them:
`squared_norm` divides by ‖Δ^{{t-1}}‖², `cosine` by ‖Δ^t‖ ‖Δ^{{t-1}}‖ and `debiased` (G and SL only) by the mean product
of the updates of two different clients, which does not grow in small cohorts as ‖Δ^{{t-1}}‖² does.
`update` is `additive`, r + κ h, or `exponential`, r exp(κ h), with |κ h| at most `max_change` (0.2 of exponential
updates if not given). With both, the units of the loss do not matter; a good start is κ = 0.2, divided by the number of
local steps for CL whose rates go on from round to round:

```console
fedhyper run --method SL --hyper-rate 0.2 --options normalise squared_norm update exponential
```

## Names and options

A method is a function of its options, and of a loss: `fh.fedprox(proximal_weight=0.01)` is a value, and
`fh.fedprox(loss_fn, proximal_weight=0.01, work=…, local_rate=0.1)` an algorithm.

On the command line, these are flags of their own:
{own}.
The other options follow `--options`, each name before its value, and stand in the table `[method.options]` of a
configuration file:

```console
fedhyper run --method fedprox --global-rate 0.5 --options proximal_weight 0.01
```

Methods add up: `fh.scaffold(population=100) + fh.fedexp(epsilon=0.01)`, or by name, on the command line too,
`scaffold+fedexp`, `fedprox+G`, `G+SL+CL`. Names take the options of all; one that two of them have is given to both,
unless it is a mapping by their names (`hyper_rate={{"SL": 0.1}}`). G beside a method that starts from another global
rate does so too, in bounds relative to it: `fedadam+G` starts from 0.1, between 0.03 and 0.3.

What has no meaning together is refused, and the message says why:

- two rules for one thing: the global rate (`G`, `fedexp`, `server_mechanic`, those of kind “global rate”), the local
  rate from round to round (`SL`, those of kind “local rate”), the local rate from step to step (`CL`, those of kind
  “client step”), or the server's optimizer (those of kind “server step” but `fedavg`, and `--server-optimizer`);
- two definitions of the server's mean: `fednova` with `feddyn`, and `fedexp` with `feddyn`, whose step is no mean of
  updates; `median` and `clipped` with `fedexp`, `fednova` or `feddyn`, which presume a mean;
- `scaffold`, `fednova` and `fedcm` with `mime_lite` or an adaptive client optimizer: they take a client's mean gradient
  from how far it went, which needs steps along gradients;
- `delta_sgd`, `fedsps`, `ngn` and `fedsls` with `mime_lite` or a client optimizer: they find the length of a step along
  the gradient;
- `fedsps` and `ngn` with `scaffold`, `feddyn` or `fedcm`: these add a linear term, and the objective has no lower bound
  then;
- methods of the authors' code with any but those of kind “client drift”: they fix both rates and the server's step.
"""


def methods_page() -> str:
    """The documentation page of the methods, docs/methods.md, as Markdown.

    Example:
      >>> methods_page().splitlines()[0]
      '# Methods'
    """
    options = dict.fromkeys(option for name in METHODS for option in method_options(name))
    own = ", ".join(f"`{_flag(option)}`" for option in options if hasattr(MethodSettings, option))
    return _PAGE.format(own=own) + "".join(f"\n## {_capital(kind)}\n\n{_kind_section(kind)}" for kind in KINDS)


def _kind_section(kind: str) -> str:
    rows = [row for row in method_table() if row["kind"] == kind]
    lines = [
        "| name | method | equation | state | extra communication per round | options (defaults) | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        options = [f"{option}={default!r}" for option, default in method_options(row["name"]).items()]
        cells = (
            _code(row["name"]),
            _escaped(row["method"]),
            _code(row["equation"]),
            _escaped(row["state"]),
            _escaped(row["communication"]),
            ", ".join(map(_code, options)) or "–",
            _escaped(row["source"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {_code(row['name'])}: {_escaped(row['note'])}." for row in rows if row["note"]]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _escaped(text: str) -> str:
    """Text for a cell of a Markdown table, with nothing in it that Markdown would take for markup."""
    return re.sub(r"([\\`*_<|\[\]])", r"\\\1", text)


def _code(text: str) -> str:
    """The same as a code span, in which tables read only | as markup."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"
