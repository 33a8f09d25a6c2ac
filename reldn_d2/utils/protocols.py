"""The evaluation protocols: what each matches, counts and asks of a model.

See ``docs/evaluation.md`` for the rules in words, :mod:`reldn_d2.evaluation.protocol_metrics` for
the metrics and ``docs/extending.md`` for a protocol of your own. Model and evaluator both read k
from here: a model keeps the triplets that any evaluation needs (:func:`kept_predicates_per_pair`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .registry import did_you_mean

__all__ = [
    "MATCHINGS",
    "METRIC_SETS",
    "OVERLAPS",
    "PROTOCOL_REGISTRY",
    "Protocol",
    "all_predicates_per_pair",
    "default_protocol",
    "distinct_limits",
    "find_protocol",
    "kept_predicates_per_pair",
    "predicates_per_pair",
]


MATCHINGS = ("one_to_one", "many_to_many", "true_positives")
OVERLAPS = ("relationship", "phrase")
METRIC_SETS = ("lu2016", "motifs", "openimages", "released", "relations")
_VERIFIED_LABELS = ("code", "text", None)


@dataclass(frozen=True)
class Protocol:
    """The rules of one protocol.

    Attributes:
        name: in results and file names: letters, digits and underscores.
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
        metrics: the name of a built-in set of metrics, see
            :mod:`reldn_d2.evaluation.protocol_metrics`; or a function ``metrics(matches, settings)
            -> dict[str, float]`` of a :class:`~reldn_d2.evaluation.protocol_metrics.Matches` and
            its ``Settings``. It is called for each k, also without images for the metrics' names.
        recall_overlaps, precision_overlaps: overlaps that recall and average precision use;
            "relationship" is always among them.
        strict_precision: average precision needs an overlap > 0.5, not >= 0.5.
        all_triplets: all triplets of an image count, not only the best 100.
        verified_labels: ignore triplets with a class that nobody looked for in their image, by the
            "code" of the OpenImages challenge or by its "text"; None ignores none. See
            :meth:`reldn_d2.evaluation.batches.Batch.judgeable`.
        attribute_relations: the attributes of entities count as well, as relations
            ``<entity, is, attribute>``: predictions with attributes get another block of results.
        distinct_relations: a relation that is annotated twice counts once.
        zero_shot: recall over the triplets that the training set lacks is reported.

    Raises:
        ValueError: a rule has another value than these.
    """

    name: str
    evaluator_type: str | None = None
    predicates_per_pair: tuple[int | None, ...] = (None,)
    recall_at: tuple[int, ...] = (20, 50, 100)
    matching: str = "one_to_one"
    metrics: str | Callable[..., Mapping[str, float]] = "relations"
    recall_overlaps: tuple[str, ...] = ("relationship",)
    precision_overlaps: tuple[str, ...] = ("relationship",)
    strict_precision: bool = False
    all_triplets: bool = False
    verified_labels: str | None = None
    attribute_relations: bool = False
    distinct_relations: bool = False
    zero_shot: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w+", self.name, re.ASCII):
            raise ValueError(
                f"Protocol {self.name!r}: the name may have letters, digits and underscores only."
            )
        for field in ("predicates_per_pair", "recall_at", "recall_overlaps", "precision_overlaps"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))  # it is frozen
        type_ = self.evaluator_type
        self._require("evaluator_type", type_ is None or _is_word(type_), "a string or None")
        ks, expected = self.predicates_per_pair, "positive integers, or None for no limit"
        self._require("predicates_per_pair", bool(ks) and _are_counts(ks, None), expected)
        self._require("recall_at", _are_counts(self.recall_at), "positive integers")
        self._require("matching", self.matching in MATCHINGS, f"one of {', '.join(MATCHINGS)}")
        for field in ("recall_overlaps", "precision_overlaps"):
            values = getattr(self, field)
            fits = isinstance(values, tuple) and "relationship" in values
            fits = fits and all(value in OVERLAPS for value in values)
            self._require(field, fits, '("relationship",) or ("relationship", "phrase")')
        rule = self.verified_labels
        self._require("verified_labels", rule in _VERIFIED_LABELS, '"code", "text" or None')
        for switch in (x.name for x in fields(self) if isinstance(x.default, bool)):
            self._require(switch, isinstance(getattr(self, switch), bool), "True or False")
        fits = callable(self.metrics) or self.metrics in METRIC_SETS
        expected = f"a function, or one of {', '.join(METRIC_SETS)}"
        self._require("metrics", fits, expected)
        needs_phrases = self.metrics in ("openimages", "released")
        fits = not needs_phrases or "phrase" in self.precision_overlaps
        expected = f'("relationship", "phrase") for the metrics of {self.metrics}'
        self._require("precision_overlaps", fits, expected)
        fits = self.metrics != "lu2016" or "phrase" in self.recall_overlaps
        expected = '("relationship", "phrase") for the metrics of lu2016'
        self._require("recall_overlaps", fits, expected)

    def _require(self, field: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(
                f"Protocol '{self.name}': {field} is {getattr(self, field)!r}; expected {expected}."
            )


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_counts(values: Any, *also: Any) -> bool:
    """Tell whether a tuple has distinct positive integers only, or values of ``also``."""
    return (
        isinstance(values, tuple)
        and all(x in also or (type(x) is int and x > 0) for x in values)
        and len(set(values)) == len(values)
    )


class _ProtocolRegistry(Mapping[str, Protocol]):
    """Protocols by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Protocol] = {}

    def register(self, protocol: Protocol) -> Protocol:
        """Add a protocol and return it.

        Raises:
            ValueError: its name, or its ``evaluator_type``, is that of another protocol.
        """
        if not isinstance(protocol, Protocol):
            raise ValueError(f"Expected a Protocol, got {protocol!r}.")
        if protocol.name in self:
            raise ValueError(f"Protocol '{protocol.name}' is registered already; rename yours.")
        other = self.of_evaluator_type(protocol.evaluator_type)
        if other is not None:
            raise ValueError(
                f"Protocol '{protocol.name}': evaluator_type {protocol.evaluator_type!r} belongs "
                f"to protocol '{other.name}'. Choose another one, or None and name the protocol "
                "with TEST.RELATIONS.PROTOCOL."
            )
        self._by_name[protocol.name] = protocol
        return protocol

    def of_evaluator_type(self, evaluator_type: str | None) -> Protocol | None:
        """Return the default protocol of datasets with this ``evaluator_type``, if there is one."""
        if evaluator_type is None:
            return None
        protocols = [x for x in self.values() if x.evaluator_type == evaluator_type]
        return protocols[0] if protocols else None

    def __getitem__(self, name: str) -> Protocol:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


PROTOCOL_REGISTRY = _ProtocolRegistry()
PROTOCOL_REGISTRY.__doc__ = """
Registry for evaluation protocols: ``PROTOCOL_REGISTRY.register(Protocol(name="mine", ...))``.

A registered protocol is found by its name, with ``TEST.RELATIONS.PROTOCOL`` and ``--protocol``, and
as the default of datasets with its ``evaluator_type``.
"""

_BOTH = ("relationship", "phrase")
_OPENIMAGES = Protocol(
    name="openimages",
    evaluator_type=None,
    predicates_per_pair=(None,),
    recall_at=(50, 100),
    matching="true_positives",
    metrics="openimages",
    precision_overlaps=_BOTH,
    all_triplets=True,
    verified_labels="code",
    attribute_relations=True,
)
for _protocol in (
    Protocol(
        name="lu2016",
        evaluator_type="vrd",
        predicates_per_pair=(1, 10, 70),
        recall_at=(50, 100),
        matching="one_to_one",
        metrics="lu2016",
        recall_overlaps=_BOTH,
        zero_shot=True,
    ),
    Protocol(
        name="motifs",
        evaluator_type="scene_graph",
        predicates_per_pair=(1, None),
        recall_at=(20, 50, 100),
        matching="many_to_many",
        metrics="motifs",
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
        metrics="released",
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
):
    PROTOCOL_REGISTRY.register(_protocol)


def default_protocol(dataset_name: str) -> Protocol | None:
    """Return the protocol of a dataset's ``evaluator_type``; None if it has none."""
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    return PROTOCOL_REGISTRY.of_evaluator_type(evaluator_type)


def find_protocol(
    name: str, evaluator_type: str | None = None, dataset_name: str | None = None
) -> Protocol:
    """Return a protocol by name or, if the name is empty, the default of an ``evaluator_type``.

    Args:
        name: a key of :data:`PROTOCOL_REGISTRY`, or empty.
        evaluator_type: from a dataset's metadata.
        dataset_name: the dataset, for the error message.

    Raises:
        ValueError: there is no such protocol, or no default.
    """
    if name:
        if name not in PROTOCOL_REGISTRY:
            raise ValueError(
                f"Unknown protocol {name!r} (TEST.RELATIONS.PROTOCOL, --protocol); expected one of "
                f"{', '.join(PROTOCOL_REGISTRY)}.{did_you_mean(name, PROTOCOL_REGISTRY)} "
                "Pass --module to import the module that registers your own."
            )
        return PROTOCOL_REGISTRY[name]
    protocol = PROTOCOL_REGISTRY.of_evaluator_type(evaluator_type)
    if protocol is None:
        known = sorted(x.evaluator_type for x in PROTOCOL_REGISTRY.values() if x.evaluator_type)
        who = f"Dataset '{dataset_name}'" if dataset_name else "The dataset"
        raise ValueError(
            f"{who} has evaluator_type {evaluator_type!r} in its metadata; protocols are known "
            f"for: {', '.join(known)}. Set the one that fits: "
            f'MetadataCatalog.get("{dataset_name or "NAME"}").evaluator_type = "relation" (any '
            "dataset whose dicts have relations), or name a protocol (TEST.RELATIONS.PROTOCOL): "
            f"{', '.join(PROTOCOL_REGISTRY)}."
        )
    return protocol


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
    return all_predicates_per_pair()


def all_predicates_per_pair() -> tuple[int | None, ...]:
    """Return the values of k of all protocols; with these, any protocol can score a file."""
    return distinct_limits(k for p in PROTOCOL_REGISTRY.values() for k in p.predicates_per_pair)
