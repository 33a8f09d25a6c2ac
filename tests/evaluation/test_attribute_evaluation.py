"""Attributes in the evaluation: as relations of the challenge, and entity by entity.

The challenge's score is computed again in plain loops, in which an attribute is never a relation.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import write_openimages
from evaluation_data import NAME, dataset_dicts, output, registered
from evaluation_oracles import area, mean, percent
from evaluation_utils import loop_iou, loop_union, random_case

from reldn_d2.data.datasets import load_openimages_vrd
from reldn_d2.evaluation import RelationDatasetEvaluator
from reldn_d2.evaluation.attribute_evaluation import (
    add_attribute_scores,
    attribute_relations,
    score_entities,
)
from reldn_d2.evaluation.protocol_metrics import Settings
from reldn_d2.evaluation.scoring import score
from reldn_d2.structures.attributes import EntityAttributes
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.protocols import find_protocol

NUM_CLASSES, PREDICATES, ATTRIBUTES = 3, ["holds", "on"], ["red", "old", "wet"]


def random_attributes(rng, count, with_scores):
    """Return random attributes of some of ``count`` entities, as they are in a scene graph."""
    known = rng.random(count) < 0.7
    rows = [
        (entity, attribute)
        for entity in range(count)
        for attribute in range(len(ATTRIBUTES))
        if (with_scores or known[entity]) and rng.random() < 0.5
    ]
    entities, ids = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    if not with_scores:
        return EntityAttributes(entities, ids, known=known)
    scores = rng.random(len(rows))
    order = np.argsort(-scores)
    return EntityAttributes(entities[order], ids[order], scores[order])


def random_images(seed, count=12):
    """Return cases with their scene graphs: [(case, ground truth, prediction)]."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        case = random_case(rng, 5, 6, NUM_CLASSES, len(PREDICATES), ("near",))
        case.triplets[:] = [(*t[:3], rng.random()) for t in case.triplets]  # no ties
        truth, predicted = case.pair()
        truth = replace(truth, attributes=random_attributes(rng, len(truth.boxes), False))
        predicted = replace(
            predicted,
            box_scores=rng.random(len(predicted.boxes)),
            attributes=random_attributes(rng, len(predicted.boxes), True),
        )
        images.append((case, truth, predicted))
    return images


# ------------------------------------------------------------ the challenge's score in plain loops


def detections_of(case, predicted, is_judged):
    """All relations and attributes of an image that count, best first.

    Each is (score, predicate, first class, second label, first box, second box); the second label
    of an attribute is ("attribute", id).
    """
    result = []
    for s, o, p, value in case.triplets:
        result.append(
            (value, PREDICATES[p], case.classes[s], case.classes[o], case.boxes[s], case.boxes[o])
        )
    for entity, attribute, value in predicted.attributes.rows():
        value *= predicted.box_scores[entity]
        box = case.boxes[entity]
        result.append((value, "is", case.classes[entity], ("attribute", attribute), box, box))
    return [x for x in sorted(result, key=lambda x: -x[0]) if is_judged(x[2], x[3])]


def truths_of(case, truth):
    result = []
    for s, o, p in case.relations:
        ends = (case.gt_classes[s], case.gt_classes[o], case.gt_boxes[s], case.gt_boxes[o])
        result.append((PREDICATES[p], *ends))
    for entity, attribute, _ in truth.attributes.rows():
        box = case.gt_boxes[entity]
        result.append(("is", case.gt_classes[entity], ("attribute", attribute), box, box))
    return result


def judge(case, truth, rule):
    """Return a function that says whether a triplet of two labels counts."""
    annotated = {label for x in truths_of(case, truth) for label in x[1:3]}
    if rule == "text":
        annotated |= set(case.gt_classes)
    verified = {c: v for c, v in case.verified.items() if rule == "code" or v == 0}
    negative = set(verified) - annotated
    known = annotated | set(case.verified)
    return lambda *labels: bool(set(labels) & negative) or set(labels) <= known


def overlap_of(detection, relation, phrase):
    (a, b), (c, d) = detection[4:6], relation[3:5]
    if detection[1] == "is":
        return loop_iou(a, c)  # one box
    return (
        loop_iou(loop_union(a, b), loop_union(c, d))
        if phrase
        else min(loop_iou(a, c), loop_iou(b, d))
    )


def challenge(images, rule):
    names = [*PREDICATES, "is"]
    totals = dict.fromkeys(names, 0)
    found = {"rel": [], "phr": []}
    for index, (case, truth, predicted) in enumerate(images):
        relations = truths_of(case, truth)
        for relation in relations:
            totals[relation[0]] += 1
        for kind, list_of_kind in found.items():
            for rank, x in enumerate(detections_of(case, predicted, judge(case, truth, rule))):
                best, best_overlap = None, 0.0
                for place, relation in enumerate(relations):
                    if x[1:4] == relation[:3]:
                        overlap = overlap_of(x, relation, kind == "phr")
                        if overlap > best_overlap:
                            best, best_overlap = (index, place), overlap
                list_of_kind.append((x[0], x[1], rank, best if best_overlap >= 0.5 else None))
    metrics, hits = {}, {}
    for kind, detections in found.items():
        taken, hits[kind] = set(), []
        for _, name, rank, match in sorted(detections, key=lambda x: -x[0]):
            hits[kind].append((name, rank, match is not None and match not in taken))
            taken.add(match)
        values = [area([h for n, _, h in hits[kind] if n == x], totals[x]) for x in names]
        metrics.update({f"AP_{kind}-{x}": v for x, v in zip(names, values)})
        metrics[f"mAP_{kind}"] = mean(values)
    recall = percent(sum(h and rank < 50 for _, rank, h in hits["rel"]), sum(totals.values()))
    metrics["R@50"] = recall
    metrics["score"] = 0.2 * recall + 0.4 * metrics["mAP_rel"] + 0.4 * metrics["mAP_phr"]
    return metrics


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("protocol", "rule"), [("openimages", "code"), ("openimages_text", "text")]
)
def test_challenge_score_with_attributes_equals_plain_loops(seed, protocol, rule):
    images = random_images(seed)
    pairs = [(truth, predicted) for _, truth, predicted in images]
    settings = Settings(PREDICATES, topk=None)
    boxes_alone = score(pairs, find_protocol(protocol), settings)
    scores = score(pairs, find_protocol(protocol), settings)
    add_attribute_scores(scores, pairs, find_protocol(protocol), settings, NUM_CLASSES, ATTRIBUTES)
    block = f"{protocol}_sgdet"
    np.testing.assert_equal(scores.results[block], boxes_alone.results[block])
    assert set(scores.results) == {block, f"{block}_full", *boxes_alone.results}
    full, expected = scores.results[f"{block}_full"], challenge(images, rule)
    for name, value in expected.items():
        np.testing.assert_allclose(full[name], value, err_msg=name, atol=1e-9)
    assert 0 < full["AP_rel-is"] < 100 and full["AP_rel-is"] == full["AP_phr-is"]
    assert scores.predicates[f"{block}_full"].names == (*PREDICATES, "is")


def test_dataset_with_attributes_as_relations_has_no_second_block():
    pairs = [(truth, predicted) for _, truth, predicted in random_images(0)]
    settings = Settings(["holds", "is"], topk=None)
    scores = score(pairs, find_protocol("openimages"), settings)
    before = set(scores.results)
    add_attribute_scores(scores, pairs, find_protocol("openimages"), settings, 3, ATTRIBUTES)
    assert set(scores.results) == before


def test_attribute_relations_by_hand():
    graph = SceneGraph.from_arrays(
        "a", [[0, 0, 2, 2], [1, 1, 3, 3]], [1, 0], [0.5, 1.0], [[0, 1]], [1], [0.3]
    )
    assert attribute_relations(graph, 2, 3) is graph
    attributes = EntityAttributes.from_lists([[4], [0, 2]], [[0.9], [0.1, 0.6]], 2, "it")
    found = attribute_relations(replace(graph, attributes=attributes), 2, 3)
    triplets = zip(found.labels.tolist(), found.scores.tolist(), found.boxes[found.pairs].tolist())
    assert list(triplets) == [
        ([0, 3, 4], 0.6, [[1, 1, 3, 3]] * 2),
        ([1, 3, 6], 0.45, [[0, 0, 2, 2]] * 2),
        ([1, 1, 0], 0.3, [[0, 0, 2, 2], [1, 1, 3, 3]]),
        ([0, 3, 2], 0.1, [[1, 1, 3, 3]] * 2),
    ]


# ------------------------------------------------------------------------------ entity by entity


def entities_in_loops(images):
    """mAP, R@n, mR@n of given boxes, from lists of (scores by attribute, true attributes)."""
    entities = []
    for truth, predicted in images:
        tables = [{} for _ in truth.boxes]
        for entity, attribute, value in predicted.attributes.rows():
            tables[entity][attribute] = value
        true = [set() for _ in truth.boxes]
        for entity, attribute, _ in truth.attributes.rows():
            true[entity].add(attribute)
        entities += [x for x, k in zip(zip(tables, true), truth.attributes.known) if k]
    precision, hits = [], dict.fromkeys(range(len(ATTRIBUTES)), 0)
    totals = {a: sum(a in true for _, true in entities) for a in hits}
    for a in hits:
        listed = sorted((x for x in entities if a in x[0]), key=lambda x: -x[0][a])
        precision.append(area([a in true for _, true in listed], totals[a]))
    for table, true in entities:
        best = sorted(table, key=lambda a: -table[a])[: len(true)]
        for a in true & set(best):
            hits[a] += 1
    recalls = [percent(hits[a], totals[a]) for a in hits]
    overall = percent(sum(hits.values()), sum(totals.values()))
    return {"mAP": mean(precision), "R@n": overall, "mR@n": mean(recalls)}, precision


@pytest.mark.parametrize("seed", range(4))
def test_score_entities_equals_plain_loops(seed):
    rng = np.random.default_rng(100 + seed)
    images = []
    for _, truth, _ in random_images(seed):
        attributes = random_attributes(rng, len(truth.boxes), True)
        ones = np.ones(len(truth.boxes))
        given = replace(truth, attributes=attributes, box_scores=ones, scores=np.zeros(0))
        images.append((truth, given))
    found = score_entities(images, ATTRIBUTES)
    expected, precision = entities_in_loops(images)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name)
    np.testing.assert_allclose([found[f"AP-{x}"] for x in ATTRIBUTES], precision)


def test_score_entities_nothing_to_find_is_nan():
    assert all(math.isnan(x) for x in score_entities([], ATTRIBUTES).values())
    _, truth, predicted = random_images(0, 1)[0]
    found = score_entities([(replace(truth, attributes=None), predicted)], ATTRIBUTES)
    assert all(math.isnan(x) for x in found.values())


def test_score_entities_dropped_boxes_and_equal_boxes_are_matched():
    box = [0.0, 0.0, 4.0, 4.0]
    truth = SceneGraph.from_arrays(
        "a", [[9, 9, 9.5, 9.5], box, box], [0, 1, 2], [1] * 3, [], [], []
    )
    of_truth = EntityAttributes.from_annotations([{}, {"attributes": [0]}, {"attributes": [1]}])
    predicted = SceneGraph.from_arrays("a", [box, box], [1, 2], [1] * 2, [], [], [])
    of_predicted = EntityAttributes.from_lists([[0], [1]], [[0.9], [0.9]], 2, "it")
    pair = (replace(truth, attributes=of_truth), replace(predicted, attributes=of_predicted))
    assert score_entities([pair], ["red", "old"])["R@n"] == 100


# ---------------------------------------------------------------------------------- the evaluator


def attributed_dicts():
    dicts = dataset_dicts()
    dicts[0]["annotations"] = [dict(x) for x in dicts[0]["annotations"]]
    dicts[0]["annotations"][0]["attributes"] = [1]
    dicts[0]["annotations"][3]["attributes"] = []
    return dicts


def evaluate(task, scores_of_attributes, protocol="relations", attributes=None):
    """Evaluate the ground truth as prediction, with these scores for every entity."""
    evaluator = RelationDatasetEvaluator(
        NAME, None, False, task=task, protocol=protocol, attributes=attributes
    )
    for record in attributed_dicts():
        out = output(record, record["relations"])
        if scores_of_attributes is not None:
            count = len(record["annotations"])
            out["instances"].pred_attributes = torch.tensor([scores_of_attributes] * count).reshape(
                count, 2
            )
        evaluator.process([{"image_id": record["image_id"]}], [out])
    return evaluator.evaluate(), evaluator.result_names()


def test_evaluator_adds_blocks_of_attributes():
    with registered(attributed_dicts, attribute_classes=["red", "old"]):
        results, _ = evaluate("prdcls", [0.2, 0.9])
        assert results["attributes_prdcls"]["R@n"] == 100
        assert results["attributes_prdcls"]["AP-old"] == 100, "the other entity comes later"
        assert math.isnan(results["attributes_prdcls"]["AP-red"])
        results, names = evaluate("prdcls", [0.2, 0.9], attributes=True)
        assert {block: list(x) for block, x in results.items()} == names
        results, names = evaluate("prdcls", None)
        assert set(results) == set(names) == {"relations_prdcls"}
        results, _ = evaluate("sgdet", [0.2, 0.9])
        assert set(results) == {"relations_sgdet"}
        results, _ = evaluate("sgdet", [0.2, 0.9], "openimages")
        full = results["openimages_sgdet_full"]
        # "red" is not annotated in this image: ignored. "old" is right for one of two persons; the
        # second, tested against the first one's box, does not overlap it.
        assert full["AP_rel-is"] == 100 and full["R@50"] > 0
        assert "AP_rel-is" not in results["openimages_sgdet"]


def test_evaluator_attributes_out_of_range_raise():
    with registered(attributed_dicts, attribute_classes=["red"]):
        with pytest.raises(
            ValueError, match="annotations have the id 1, but attribute_classes has"
        ):
            evaluate("prdcls", [0.2, 0.9])


@pytest.mark.parametrize("metadata", [{}, {"attribute_classes": []}])
def test_evaluator_dataset_without_attributes_ignores_those_of_the_model(metadata):
    with registered(dataset_dicts, **metadata):
        results, names = evaluate("prdcls", [0.2, 0.9], attributes=True)
        assert set(results) == set(names) == {"relations_prdcls"}


def test_attribute_relations_equal_those_of_the_openimages_loader(tmp_path):
    arguments = write_openimages(tmp_path)
    plain = load_openimages_vrd(**arguments)
    expected = load_openimages_vrd(**arguments, attributes_as_relations=True)
    graphs = [attribute_relations(SceneGraph.from_dataset_dict(x), 3, 9) for x in plain]
    assert sum(len(x.pairs) for x in graphs) > sum(len(x["relations"]) for x in plain)
    for found, record in zip(graphs, expected, strict=True):
        wanted = SceneGraph.from_dataset_dict(record)
        both = [
            sorted(zip(x.labels.tolist(), x.boxes[x.pairs].reshape(-1, 8).tolist()))
            for x in (found, wanted)
        ]
        assert both[0] == both[1]
