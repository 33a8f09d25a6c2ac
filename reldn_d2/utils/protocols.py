"""The evaluation protocols by name, and how many predicates a pair each asks a model for.

What each one matches, averages and ignores stands in ``docs/evaluation.md``; the rules themselves
are in :mod:`reldn_d2.evaluation`. Model and evaluator both ask this module for k, so that a model
keeps what its evaluation needs.
"""

from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = ["DEFAULT_PROTOCOLS", "PROTOCOLS", "Protocol", "find_protocol", "predicates_per_pair"]


@dataclass(frozen=True)
class Protocol:
    """What is fixed by a protocol's name."""

    name: str
    predicates_per_pair: tuple[int, ...]  # the values of k; 0: all predicates of a pair
    recall_at: tuple[int, ...]  # the n of R@n
    all_triplets: bool = False  # average precision takes every triplet given, not the best 100


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("lu2016", (1, 10, 70), (50, 100)),
        Protocol("motifs", (1, 0), (20, 50, 100)),
        Protocol("openimages", (0,), (50, 100), all_triplets=True),
        Protocol("released", (2,), (20, 50, 100)),
        Protocol("relations", (0,), (20, 50, 100)),
    )
}

# evaluator_type in a data set's metadata: the protocol of its tables in the paper.
DEFAULT_PROTOCOLS = {
    "vrd": "lu2016",
    "scene_graph": "motifs",
    "openimages_vrd": "released",
    "relation": "relations",
}


def find_protocol(name: str, evaluator_type: str | None = None) -> Protocol:
    """A protocol by its name or, if that is empty, the default of an ``evaluator_type``.

    Raises:
        ValueError: neither is known.
    """
    if name:
        if name not in PROTOCOLS:
            raise ValueError(
                f"Unknown protocol {name!r} (TEST.RELATIONS.PROTOCOL); known are "
                f"{', '.join(PROTOCOLS)}."
            )
        return PROTOCOLS[name]
    if evaluator_type not in DEFAULT_PROTOCOLS:
        raise ValueError(
            f"No protocol belongs to evaluator_type {evaluator_type!r}; one does to each of "
            f"{', '.join(DEFAULT_PROTOCOLS)}. Set it in the data set's metadata, or name a "
            f"protocol (TEST.RELATIONS.PROTOCOL): {', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[DEFAULT_PROTOCOLS[evaluator_type]]


def predicates_per_pair(cfg: CfgNode, dataset_name: str | None = None) -> tuple[int, ...]:
    """The values of k that are to be evaluated, and that a model has to keep triplets for.

    Args:
        cfg: config with the keys of ``add_reldn_config``. What
            ``TEST.RELATIONS.PREDICATES_PER_PAIR`` lists is taken; where it is empty, what the
            protocols ask for.
        dataset_name: the data set whose protocol is asked; None: all of ``DATASETS.TEST``.

    Returns:
        Distinct values, 0 standing for all predicates; (1,) where no protocol is known.
    """
    relations = cfg.TEST.RELATIONS
    if relations.PREDICATES_PER_PAIR:
        return tuple(dict.fromkeys(relations.PREDICATES_PER_PAIR))
    names = cfg.DATASETS.TEST if dataset_name is None else (dataset_name,)
    values = []
    if relations.PROTOCOL:
        values.extend(find_protocol(relations.PROTOCOL).predicates_per_pair)
    else:
        for name in names:
            evaluator_type = MetadataCatalog.get(name).get("evaluator_type", None)
            if evaluator_type in DEFAULT_PROTOCOLS:
                values.extend(find_protocol("", evaluator_type).predicates_per_pair)
    return tuple(dict.fromkeys(values)) or (1,)
