"""The evaluation protocols: what each matches, counts and asks of a model.

See ``docs/evaluation.md`` for the rules in words and :mod:`reldn_d2.evaluation.protocol_metrics`
for the metrics. Model and evaluator both read k from here: a model keeps the triplets that any
evaluation needs (:func:`kept_predicates_per_pair`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "default_protocol",
    "distinct_limits",
    "find_protocol",
    "kept_predicates_per_pair",
    "predicates_per_pair",
]


@dataclass(frozen=True)
class Protocol:
    """The rules of one protocol.

    Attributes:
        evaluator_type: datasets with this ``evaluator_type`` in their metadata use the protocol by
            default, because the tables of the paper do; None for none.
        predicates_per_pair: values of k, each with results of its own; None means no limit.
        recall_at: the n of R@n.
        matching: which triplets find a relation, for recall:

            - ``one_to_one``: in descending score each triplet takes its best-overlapping relation
              that is still free;
            - ``many_to_many``: each triplet finds every relation that it matches;
            - ``true_positives``: each triplet is tested against its best-overlapping relation, and
              finds it if no earlier triplet was tested against the same one.
        recall_overlaps, precision_overlaps: overlaps that recall and average precision use.
        strict_precision: average precision needs an overlap > 0.5, not >= 0.5.
        all_triplets: all triplets of an image count, not only the best 100.
        verified_labels: ignore triplets with a class that nobody looked for in their image, by the
            "code" of the OpenImages challenge or by its "text"; None ignores none. See
            :meth:`reldn_d2.evaluation.batches.Batch.judgeable`.
        attribute_relations: the attributes of entities count as well, as relations
            ``<entity, is, attribute>``: predictions with attributes get another block of results.
        distinct_relations: a relation that is annotated twice counts once.
        zero_shot: recall over the triplets that the training set lacks is reported.
    """

    name: str
    evaluator_type: str | None
    predicates_per_pair: tuple[int | None, ...]
    recall_at: tuple[int, ...]
    matching: str
    recall_overlaps: tuple[str, ...] = ("relationship",)
    precision_overlaps: tuple[str, ...] = ("relationship",)
    strict_precision: bool = False
    all_triplets: bool = False
    verified_labels: str | None = None
    attribute_relations: bool = False
    distinct_relations: bool = False
    zero_shot: bool = False


_BOTH = ("relationship", "phrase")
_OPENIMAGES = Protocol(
    name="openimages",
    evaluator_type=None,
    predicates_per_pair=(None,),
    recall_at=(50, 100),
    matching="true_positives",
    precision_overlaps=_BOTH,
    all_triplets=True,
    verified_labels="code",
    attribute_relations=True,
)
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="lu2016",
            evaluator_type="vrd",
            predicates_per_pair=(1, 10, 70),
            recall_at=(50, 100),
            matching="one_to_one",
            recall_overlaps=_BOTH,
            zero_shot=True,
        ),
        Protocol(
            name="motifs",
            evaluator_type="scene_graph",
            predicates_per_pair=(1, None),
            recall_at=(20, 50, 100),
            matching="many_to_many",
            zero_shot=True,
        ),
        _OPENIMAGES,
        replace(_OPENIMAGES, name="openimages_text", verified_labels="text"),
        Protocol(
            name="released",
            evaluator_type="openimages_vrd",
            predicates_per_pair=(2,),
            recall_at=(20, 50, 100),
            matching="many_to_many",
            precision_overlaps=_BOTH,
            strict_precision=True,
        ),
        Protocol(
            name="relations",
            evaluator_type="relation",
            predicates_per_pair=(None,),
            recall_at=(20, 50, 100),
            matching="one_to_one",
            distinct_relations=True,
        ),
    )
}
_BY_EVALUATOR_TYPE = {p.evaluator_type: p for p in PROTOCOLS.values() if p.evaluator_type}


def default_protocol(dataset_name: str) -> Protocol | None:
    """Return the protocol of a dataset's ``evaluator_type``; None if it has none."""
    return _BY_EVALUATOR_TYPE.get(MetadataCatalog.get(dataset_name).get("evaluator_type", None))


def find_protocol(
    name: str, evaluator_type: str | None = None, dataset_name: str | None = None
) -> Protocol:
    """Return a protocol by name or, if the name is empty, the default of an ``evaluator_type``.

    Args:
        name: a key of :data:`PROTOCOLS`, or empty.
        evaluator_type: from a dataset's metadata.
        dataset_name: the dataset, for the error message.

    Raises:
        ValueError: there is no such protocol, or no default.
    """
    if name:
        if name not in PROTOCOLS:
            raise ValueError(
                f"Unknown protocol {name!r} (TEST.RELATIONS.PROTOCOL); expected one of "
                f"{', '.join(PROTOCOLS)}."
            )
        return PROTOCOLS[name]
    if evaluator_type not in _BY_EVALUATOR_TYPE:
        who = f"Dataset '{dataset_name}'" if dataset_name else "The dataset"
        raise ValueError(
            f"{who} has evaluator_type {evaluator_type!r} in its metadata; protocols are known "
            f"for: {', '.join(sorted(_BY_EVALUATOR_TYPE))}. Set the one that fits: "
            f'MetadataCatalog.get("{dataset_name or "NAME"}").evaluator_type = "relation" (any '
            "dataset whose dicts have relations), or name a protocol (TEST.RELATIONS.PROTOCOL): "
            f"{', '.join(PROTOCOLS)}."
        )
    return _BY_EVALUATOR_TYPE[evaluator_type]


def distinct_limits(values: Iterable[int | None]) -> tuple[int | None, ...]:
    """Return the distinct values of k; 0, which meant no limit once, becomes None."""
    return tuple(dict.fromkeys(k or None for k in values))


def predicates_per_pair(cfg: CfgNode, dataset_name: str | None = None) -> tuple[int | None, ...]:
    """Return the values of k to evaluate; see :func:`kept_predicates_per_pair` for what is kept.

    Args:
        cfg: config with the keys of ``add_reldn_config``.
            ``TEST.RELATIONS.PREDICATES_PER_PAIR`` decides; if it is empty, the protocols do.
        dataset_name: the dataset whose protocol is asked; None: all of ``DATASETS.TEST``.

    Returns:
        Distinct values, None for no limit; (1,) if no protocol is known.
    """
    relations = cfg.TEST.RELATIONS
    if relations.PREDICATES_PER_PAIR:
        return distinct_limits(relations.PREDICATES_PER_PAIR)
    if relations.PROTOCOL:
        return find_protocol(relations.PROTOCOL).predicates_per_pair
    names = cfg.DATASETS.TEST if dataset_name is None else (dataset_name,)
    protocols = [protocol for protocol in map(default_protocol, names) if protocol]
    return distinct_limits(k for protocol in protocols for k in protocol.predicates_per_pair) or (
        1,
    )


def kept_predicates_per_pair(cfg: CfgNode) -> tuple[int | None, ...]:
    """Return the values of k for each of which a model keeps its exact best triplets.

    Args:
        cfg: config with the keys of ``add_reldn_config``.

    Returns:
        ``TEST.RELATIONS.PREDICATES_PER_PAIR``; if it is empty, the values of all protocols, so that
        any protocol can score the predictions later. None means no limit.
    """
    if cfg.TEST.RELATIONS.PREDICATES_PER_PAIR:
        return distinct_limits(cfg.TEST.RELATIONS.PREDICATES_PER_PAIR)
    return distinct_limits(k for p in PROTOCOLS.values() for k in p.predicates_per_pair)
