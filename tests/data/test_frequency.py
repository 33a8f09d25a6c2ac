"""Predicate counts, compared with loops written from their definition."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reldn_d2.data import count_predicates, frequency, log_frequencies

from detectron2.structures import BoxMode

CLASSES, PREDICATES = 3, 2


def annotation(box, category, mode=BoxMode.XYXY_ABS, iscrowd=0):
    return {"bbox": box, "bbox_mode": mode, "category_id": category, "iscrowd": iscrowd}


def image(annotations, relations):
    return {"file_name": "a.png", "annotations": annotations, "relations": relations}


def count_by_loops(dicts, overlap_filter):
    counts = torch.zeros(CLASSES, CLASSES, PREDICATES + 1, dtype=torch.int64)
    counts[:, :, -1] = 1
    for record in dicts:
        entities = record["annotations"]
        for i, first in enumerate(entities):
            for j, second in enumerate(entities):
                if i == j or first["iscrowd"] or second["iscrowd"]:
                    continue
                s, o = first["category_id"], second["category_id"]
                for subject, object_, predicate in record["relations"]:
                    if (subject, object_) == (i, j):
                        counts[s, o, predicate] += 1
                ax0, ay0, ax1, ay1 = first["bbox"]
                bx0, by0, bx1, by1 = second["bbox"]
                width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
                if not overlap_filter or (width > 0 and height > 0):
                    counts[s, o, -1] += 1
    return counts


@st.composite
def dataset_dicts(draw):
    dicts = []
    for _ in range(draw(st.integers(0, 3))):
        entities = []
        for _ in range(draw(st.integers(0, 5))):
            x, y, w, h = (draw(st.integers(low, 6)) for low in (0, 0, 1, 1))
            crowd = int(draw(st.integers(0, 5)) == 5)
            entities.append(
                annotation([x, y, x + w, y + h], draw(st.integers(0, 2)), iscrowd=crowd)
            )
        pairs = [(i, j) for i in range(len(entities)) for j in range(len(entities)) if i != j]
        relations = []
        if pairs:
            triplet = st.tuples(st.sampled_from(pairs), st.integers(0, PREDICATES - 1))
            relations = [(*pair, p) for pair, p in draw(st.lists(triplet, max_size=6))]
        dicts.append(image(entities, relations))
    return dicts


@settings(max_examples=100, deadline=None)
@given(dataset_dicts(), st.booleans())
def test_count_predicates_equals_loops(dicts, overlap_filter):
    counts = count_predicates(dicts, CLASSES, PREDICATES, overlap_filter)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, count_by_loops(dicts, overlap_filter))


@pytest.mark.parametrize("pairs_at_once", [1, 7, 40])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(dicts=dataset_dicts())
def test_count_pairs_any_chunk_size_equals_loops(monkeypatch, pairs_at_once, dicts):
    monkeypatch.setattr(frequency, "_PAIRS_AT_ONCE", pairs_at_once)
    counts = frequency.count_pairs(iter(dicts), CLASSES, PREDICATES)
    for overlap_filter in (False, True):
        assert torch.equal(counts.table(overlap_filter), count_by_loops(dicts, overlap_filter))


def test_count_pairs_memory_does_not_grow_with_images():
    """30 images of 1,000 boxes have 30 million pairs; one byte each would exceed the bound."""
    rng = np.random.default_rng(0)

    def images():
        for _ in range(30):
            low = rng.uniform(0, 800, (1000, 2))
            boxes = np.concatenate([low, low + rng.uniform(5, 200, (1000, 2))], axis=1).tolist()
            yield image([annotation(box, i % CLASSES) for i, box in enumerate(boxes)], [(0, 1, 0)])

    tracemalloc.start()
    try:
        counts = frequency.count_pairs(images(), CLASSES, PREDICATES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts.pairs.sum() == 30 * 1000 * 999
    assert peak < 90e6


def test_count_related_pairs_by_hand():
    entities = [
        annotation([0, 0, 4, 4], 0),
        annotation([2, 2, 6, 6], 1),  # overlaps the first
        annotation([4, 0, 8, 4], 1),  # only touches the first
        annotation([2, 2, 3, 3], 1, iscrowd=1),
    ]
    relations = [(0, 1, 0), (0, 1, 1), (0, 1, 1), (0, 2, 1), (2, 0, 0), (0, 3, 0)]
    assert frequency.count_related_pairs([image(entities, relations)] * 2) == (6, 4)


def test_count_predicates_several_chunks(monkeypatch):
    """The last chunk is not full."""
    monkeypatch.setattr(frequency, "_PAIRS_AT_ONCE", 1000)
    one = image([annotation([0, 0, 4, 4], 0), annotation([2, 2, 6, 6], 1)], [(0, 1, 1)])
    counts = count_predicates([one] * 2345, CLASSES, PREDICATES, True)
    assert counts[0, 1].tolist() == [0, 2345, 2346]
    assert counts[1, 0].tolist() == [0, 0, 2346]
    assert counts.sum() == 3 * 2345 + CLASSES**2


def test_count_predicates_by_hand():
    entities = [
        annotation([0, 0, 4, 4], 0),
        annotation([2, 2, 6, 6], 1),  # overlaps the first
        annotation([4, 0, 8, 4], 1),  # touches the first along an edge, overlaps the second
    ]
    relations = [(0, 1, 0), (0, 1, 1), (0, 2, 1)]
    counts = count_predicates([image(entities, relations)], CLASSES, PREDICATES, True)
    assert counts[0, 1].tolist() == [1, 2, 2]  # one overlapping pair, plus 1
    assert counts[1, 0].tolist() == [0, 0, 2]
    assert counts[1, 1].tolist() == [0, 0, 3]
    unfiltered = count_predicates([image(entities, relations)], CLASSES, PREDICATES, False)
    assert unfiltered[0, 1].tolist() == [1, 2, 3]


def test_count_predicates_box_modes():
    corners = [annotation([0, 0, 4, 4], 0), annotation([3, 3, 5, 5], 1)]
    sizes = [annotation([0, 0, 4, 4], 0), annotation([3, 3, 2, 2], 1, BoxMode.XYWH_ABS)]
    expected = count_predicates([image(corners, [])], CLASSES, PREDICATES, True)
    assert expected[0, 1, -1] == 2
    assert torch.equal(count_predicates([image(sizes, [])], CLASSES, PREDICATES, True), expected)


def test_log_frequencies():
    counts = count_predicates([], CLASSES, PREDICATES, True)
    counts[0, 1] = torch.tensor([3, 0, 1])
    logits = log_frequencies(counts)
    assert logits.dtype == torch.float32 and logits.shape == (CLASSES, CLASSES, PREDICATES + 1)
    expected = [math.log(0.75 + 1e-3), math.log(1e-3), math.log(0.25 + 1e-3)]
    np.testing.assert_allclose(logits[0, 1], expected, rtol=1e-6)
    # Classes that never co-occur: only "no relationship" has a count.
    unseen = [math.log(1e-3), math.log(1e-3), math.log(1 + 1e-3)]
    np.testing.assert_allclose(logits[2, 2], unseen, rtol=1e-5)


@pytest.mark.parametrize(
    ("entities", "relations", "message"),
    [
        ([annotation([0, 0, 1, 1], 3)], [], r"a\.png: annotation 0 has category_id 3.* 3 classes"),
        ([annotation([0, 0, 1, 1], 0)] * 2, [(0, 1, 2)], r"a\.png: relation 0 .*2 predicates"),
        ([annotation([0, 0, 1, 1], 0)], [(0, 1, 0)], r"a\.png: relation 0 .*1 annotations"),
    ],
)
def test_count_predicates_invalid_record_raises(entities, relations, message):
    with pytest.raises(ValueError, match=message):
        count_predicates([image(entities, relations)], CLASSES, PREDICATES, True)
