"""Log the results of an evaluation, and write the tables of its predicates."""

import logging
from collections.abc import Mapping

from tabulate import tabulate

from ..structures.names import table_cell
from .per_predicate import PredicateTable
from .scoring import Scores

__all__ = ["report_scores"]

logger = logging.getLogger(__name__)


def report_scores(scores: Scores, dataset_name: str, output_dir: str | None) -> None:
    """Log every block of results and write the tables of the predicates.

    Args:
        scores: results and tables.
        dataset_name: the dataset that was evaluated.
        output_dir: folder of the tables; None writes none.
    """
    for block, metrics in scores.results.items():
        shown, left_out = _shown_metrics(metrics, scores.predicates.get(block))
        table = tabulate(
            [(table_cell(name), f"{value:.2f}") for name, value in shown.items()],
            headers=("metric", "value"),
            tablefmt="pipe",
            colalign=("left", "right"),
            disable_numparse=True,
        )
        if left_out:
            table += (
                f"\n{left_out} metrics of predicates in between are not shown; "
                f"per_predicate_{block}.md in the output folder has all."
            )
        logger.info("'%s', %s:\n%s", dataset_name, block, table)
    for block, predicates in scores.predicates.items() if output_dir else ():
        paths = predicates.write(output_dir, block, f"{dataset_name}, {block}")
        logger.info("'%s', %s: every predicate in %s", dataset_name, block, paths[1])


def _shown_metrics(
    metrics: Mapping[str, float], predicates: PredicateTable | None
) -> tuple[dict[str, float], int]:
    """Return the metrics for a log, and how many those of the predicates in between are."""
    if predicates is None:
        return dict(metrics), 0
    shown = {predicates.names[p] for part in predicates.shown() for p in part}
    hidden = {
        f"AP{suffix}-{name}"
        for name in set(predicates.names) - shown
        for suffix in ("", "_rel", "_phr")
    }
    kept = {name: value for name, value in metrics.items() if name not in hidden}
    return kept, len(metrics) - len(kept)
