"""Everything a report shows, computed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version

import pandas as pd

from nnunet_l2g import __version__
from nnunet_l2g.compare import tables
from nnunet_l2g.compare.ensemble import failure_table
from nnunet_l2g.compare.fairness import dropped_warnings, score_warnings
from nnunet_l2g.compare.results import Inputs
from nnunet_l2g.compare.without_method import lost_table
from nnunet_l2g.evaluation.cases import Options, score_pairs, with_unit
from nnunet_l2g.evaluation.names import LESION, Score, with_units


@dataclass
class Comparison:
    """Tables of one comparison; see comparison/tables.py for their columns.

    shown : the scores, by name
    shift : method, kind, strength, dice on perturbed images; None if not asked for
    without : Dice lost without the method (without_method.py); None if not asked for
    runs : of each pair of methods the mean of every run
    failures : method, case, disagreement of its runs, dice of their ensemble; None if not asked for
    more_runs : the command, or the option, that adds runs
    cost : method, parameters, seconds_per_epoch, epochs, and what was measured
    """

    inputs: Inputs
    options: Options
    command: str
    more_runs: str
    shown: dict[str, Score]
    cases: pd.DataFrame
    summary: pd.DataFrame
    paired: pd.DataFrame
    runs: pd.DataFrame
    empty: pd.DataFrame
    lesion_sizes: pd.DataFrame
    cost: pd.DataFrame
    warnings: list[str]
    shift: pd.DataFrame | None = None
    without: pd.DataFrame | None = None
    failures: pd.DataFrame | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return [method.name for method in self.inputs.methods]

    @property
    def trained(self) -> list[str]:
        """The methods without ensembles of them."""
        return [method.name for method in self.inputs.methods if not method.ensemble]

    @property
    def rows(self) -> list[str]:
        """Structures, and MEAN if there are several."""
        names = self.inputs.labels.names
        return [*names, tables.MEAN] if len(names) > 1 else names


def compare(
    inputs: Inputs,
    options: Options,
    *,
    processes: int,
    command: str,
    more_runs: str,
    cost: pd.DataFrame | None = None,
    shift: pd.DataFrame | None = None,
    without: pd.DataFrame | None = None,
    disagreement: pd.DataFrame | None = None,
) -> Comparison:
    """Scores all cases and computes all tables; `without` has the Dice without the method. UserError for files that cannot be
    compared.
    """
    inputs.labels, of_spacing = with_unit(inputs.labels, inputs.pairs())
    scores, of_headers = score_pairs(inputs.pairs(), inputs.labels, options, processes)
    shown = {name: s for name, s in with_units(inputs.labels.pixels).items() if options.lesions or name not in LESION}
    cases = tables.case_table(inputs, scores)
    paired, runs = tables.paired_tables(cases, shown)
    return Comparison(
        inputs=inputs,
        options=options,
        command=command,
        more_runs=more_runs,
        shown=shown,
        cases=cases,
        summary=tables.summary_table(cases, shown),
        paired=paired,
        runs=runs,
        empty=tables.empty_table(cases),
        lesion_sizes=tables.lesion_size_table(inputs, scores),
        cost=cost_table(inputs) if cost is None else cost,
        warnings=[*of_headers, *of_spacing, *inputs.warnings, *score_warnings(inputs, scores), *dropped_warnings(paired)],
        shift=shift,
        without=None if without is None else lost_table(cases, without),
        failures=None if disagreement is None else failure_table(disagreement, cases),
        versions={"nnunet_l2g": __version__}
        | {name: version(name) for name in ("nnunetv2", "torch", "SimpleITK", "numpy", "scipy")},
    )


def cost_table(inputs: Inputs) -> pd.DataFrame:
    """What checkpoints and logs tell: method, epochs, parameters, seconds_per_epoch (median over runs and folds of medians)."""
    rows = []
    for method in inputs.methods:
        if method.ensemble:
            continue
        seconds = [curve.seconds_per_epoch for run in method.runs for curve in run.curves.values()]
        seconds = [value for value in seconds if value is not None]
        epochs = sorted({number for run in method.runs for number in run.epochs.values()})
        rows.append(
            {
                "method": method.name,
                "epochs": epochs[-1] if epochs else None,
                "parameters": method.runs[0].parameters,
                "seconds_per_epoch": pd.Series(seconds).median() if seconds else None,
            }
        )
    return pd.DataFrame(rows)
