"""Layout of pictures of relations, without drawing."""

import itertools

import numpy as np
import pytest

from reldn_d2.structures.names import name_entities
from reldn_d2.vis.canvas import MIN_AREA, Row, fair_cap, plan_sheet, shorten, text_width
from reldn_d2.vis.graph import place_nodes, plan_graph, route_edges
from reldn_d2.vis.layout import (
    LabelPlacer,
    arc,
    arc_bulges,
    choose_anchors,
    entity_color,
    fit_size,
    predicate_color,
)


def test_colors_are_fixed_distinct_and_dark_enough_for_white_text():
    assert predicate_color(0) == pytest.approx((0xC6 / 255, 0x28 / 255, 0x28 / 255))
    for color, count in ((predicate_color, 100), (entity_color, 50)):
        colors = np.array([color(index) for index in range(count)])
        assert np.array_equal(colors, [color(index) for index in range(count)])
        assert len({tuple(c) for c in colors.round(2)}) == count
        linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        contrast = 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)
        assert contrast.min() > 4.5


def test_name_entities_repeated_class_is_numbered_from_left_to_right():
    boxes = np.array([[50, 0, 60, 9], [0, 0, 9, 9], [20, 0, 30, 9], [70, 0, 80, 9]], float)
    names = name_entities(boxes, [1, 1, 0, 7], [0, 1, 2, 3], ["person", "cup", "table"])
    assert names == {0: "cup 2", 1: "cup 1", 2: "person", 3: "class 7"}


def test_choose_anchors_nested_boxes_are_inside_and_apart():
    boxes = np.array([[0, 0, 200, 400], [40, 100, 160, 300], [60, 20, 140, 80]], float)
    anchors = choose_anchors(boxes, spacing=60)
    assert (anchors >= boxes[:, :2]).all() and (anchors <= boxes[:, 2:]).all()
    for first, second in itertools.combinations(anchors, 2):
        assert np.linalg.norm(first - second) >= 60
    within = (anchors[0] >= boxes[1:, :2]) & (anchors[0] <= boxes[1:, 2:])
    assert not within.all(axis=1).any()  # the person's point is on neither shirt nor hat


def test_arcs_both_directions_are_apart_and_inside_the_frame():
    anchors = {0: np.array([10.0, 50.0]), 1: np.array([190.0, 50.0])}
    pairs = [(0, 1), (1, 0)]
    bulges = arc_bulges(pairs, anchors, step=20)
    frame = (0, 0, 200, 80)
    arcs = [arc(anchors[s], anchors[o], b, frame, trim=5) for (s, o), b in zip(pairs, bulges)]
    middles = [points[20, 1] for points in arcs]
    assert middles[0] < 45 and middles[1] > 55  # the way back bends to the other side
    for points, (subject, object_) in zip(arcs, pairs):
        assert np.linalg.norm(points[0] - anchors[subject]) == pytest.approx(5, abs=0.5)
        assert np.linalg.norm(points[-1] - anchors[object_]) == pytest.approx(5, abs=0.5)
        assert (points >= 0).all() and (points <= frame[2:]).all()


def test_label_placer_label_far_from_its_line_gets_a_leader():
    placer = LabelPlacer((0, 0, 200, 100), taken=[], details=[])
    line = np.stack([np.linspace(40, 160, 41), np.full(41, 50.0)], axis=1)
    labels = [placer.place_on_line((60, 20), line, []) for _ in range(6)]
    assert labels[0].target is None and labels[0].rect == pytest.approx((70, 40, 130, 60))
    assert all(label.target is not None for label in labels if not 31 <= label.rect[1] <= 49)
    assert any(label.target is not None for label in labels)


def test_label_placer_full_frame_stays_inside():
    placer = LabelPlacer((0, 0, 50, 25), taken=[], details=[])
    line = np.stack([np.linspace(0, 50, 41), np.full(41, 12.0)], axis=1)
    rects = [placer.place_on_line((40, 20), line, []).rect for _ in range(3)]
    assert all(0 <= r[0] and r[2] <= 50 and 0 <= r[1] and r[3] <= 25 for r in rects)


def test_shorten_long_text_fits_the_width():
    assert shorten("cup", 13, 100) == "cup"
    short = shorten("a very long name of a class indeed", 13, 100)
    assert short.endswith("\u2026") and 60 < text_width(short, 13) <= 100


@pytest.mark.parametrize("ordinal", [" 2", " 12", " #3", " 7 #2"])
def test_shorten_long_name_keeps_its_ordinal(ordinal):
    short = shorten("a very long class name indeed" + ordinal, 13, 110)
    assert short.startswith("a very lo") and short.endswith("\u2026" + ordinal)
    assert text_width(short, 13) <= 110


def test_shorten_without_room_is_empty():
    ellipsis = text_width("\u2026", 13)
    assert shorten("cup 2", 13, ellipsis + 1) == "\u2026"  # the ordinal does not fit
    for width in (ellipsis - 1, 0, -50):
        assert shorten("cup 2", 13, width) == shorten("a class", 13, width) == ""


def test_fair_cap_cuts_only_the_longest_pieces():
    assert fair_cap([10, 20, 30], 60) == np.inf
    assert fair_cap([10, 50, 30], 80) == 40  # 10 + 40 + 30
    assert fair_cap([50, 10, 90, 90], 100) == 30
    assert fair_cap([10, 20], -5) == 0 and fair_cap([], 0) == np.inf


def test_plan_sheet_low_image_is_as_high_as_its_panel():
    rows = [Row([(f"row {index}", (0, 0, 0), False)]) for index in range(101)]
    sheet = plan_sheet(1000, 10, 0.5, rows, "right", title=False)
    assert sheet.area[3] == MIN_AREA
    assert sheet.size[1] >= sheet.rows_per_column * sheet.row_height
    assert sheet.size[0] >= sheet.area[2] + sheet.column_width * -(-101 // sheet.rows_per_column)
    assert fit_size(10, 5, 640, 1600) == 64 and fit_size(800, 5, 640, 1600) == 1


@pytest.mark.parametrize(
    "edges",
    [
        [(0, 1), (1, 0)],
        [(0, i) for i in range(1, 40)],
        [(2 * i, 2 * i + 1) for i in range(20)],
        list(itertools.permutations(range(12), 2)),
    ],
    ids=["pair", "star", "many parts", "everything"],
)
def test_place_nodes_any_graph_is_apart_and_inside(edges):
    generator = np.random.default_rng(0)
    count = max(max(edge) for edge in edges) + 1
    sizes = np.stack([generator.uniform(30, 200, count), np.full(count, 25.0)], axis=1)
    labels = np.tile([60.0, 25.0], (len(edges), 1))
    for centers in (generator.random((count, 2)) * 500, np.zeros((count, 2))):
        places, whole = place_nodes(centers, sizes, edges, labels, gap=30.0)
        assert (places - sizes / 2 >= 15 - 1e-6).all()
        assert (places + sizes / 2 <= np.array(whole) - 15 + 1e-6).all()
        offset = np.abs(places[:, None] - places[None])
        apart = offset - (sizes[:, None] + sizes[None]) / 2
        np.fill_diagonal(apart[..., 0], np.inf)
        assert (apart.max(axis=2) >= 30 - 1e-4).all()


def test_place_nodes_keeps_directions_and_order_of_the_image():
    centers = np.array([[400.0, 50], [410, 300], [20, 40], [200, 60], [30, 300]])
    edges = [(0, 1), (2, 3), (2, 4)]
    sizes, labels = np.full((5, 2), 30.0), np.full((3, 2), 20.0)
    places, _ = place_nodes(centers, sizes, edges, labels, gap=10.0)
    assert places[[2, 3, 4], 0].max() < places[[0, 1], 0].min()  # the part on the left
    assert places[0, 1] < places[1, 1] and abs(places[0, 0] - places[1, 0]) < 30
    assert places[3, 0] > places[2, 0] and places[4, 1] > places[2, 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [2, 8, 11])
def test_plan_graph_complete_graph_labels_cover_nothing(count, seed):
    generator = np.random.default_rng(seed)
    edges = list(itertools.permutations(range(count), 2))
    sizes = np.stack([generator.uniform(40, 150, count), np.full(count, 24.0)], axis=1)
    labels = np.stack([generator.uniform(40, 200, len(edges)), np.full(len(edges), 43.0)], axis=1)
    centers = generator.random((count, 2)) * 500
    plan = plan_graph(centers, sizes, edges, labels, gap=37.5, min_size=(360, 240))
    rects = np.concatenate([plan.nodes, [label.rect for label in plan.labels]])
    assert len(rects) == count + len(edges)
    assert (rects[:, :2] >= 0).all() and (rects[:, 2:] <= np.array(plan.size)).all()
    for a, b in itertools.combinations(rects, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_plan_graph_dense_is_larger_than_sparse():
    centers, sizes = np.random.default_rng(0).random((8, 2)), np.full((8, 2), 30.0)
    ring = [(i, (i + 1) % 8) for i in range(8)]
    everything = list(itertools.permutations(range(8), 2))

    def area(edges):
        labels = np.tile([60.0, 25.0], (len(edges), 1))
        return np.prod(place_nodes(centers, sizes, edges, labels, gap=30.0)[1])

    one_way = [(i, j) for i, j in everything if i < j]
    assert area(everything) > 1.5 * area(one_way)  # twice the labels on the same lines
    labels = np.tile([60.0, 25.0], (8, 1))
    plan = plan_graph(centers, sizes, ring, labels, gap=30.0, min_size=(10, 10))
    assert np.prod(plan.size) <= 1.02 * area(ring)


def test_label_placer_large_frame_checks_few_positions(monkeypatch):
    looked_at = []
    area = LabelPlacer._taken_area
    monkeypatch.setattr(
        LabelPlacer,
        "_taken_area",
        lambda self, rects: (looked_at.append(len(rects)), area(self, rects))[1],
    )
    taken = [[900, 900, 1100, 1100], *np.random.default_rng(0).random((200, 4)) * 5]
    placer = LabelPlacer((0, 0, 4000, 4000), taken=taken, details=[])
    line = np.full((41, 2), 1000.0)
    left, top, right, bottom = placer.place_on_line((60, 20), line, []).rect
    assert max(abs((left + right) / 2 - 1000) - 130, abs((top + bottom) / 2 - 1000) - 110) < 11
    assert sum(looked_at) < 5000 and not placer.crowded
    full = LabelPlacer((0, 0, 100, 100), taken=[[0, 0, 100, 100]], details=[])
    full.place_on_line((60, 20), np.full((41, 2), 50.0), [])
    assert full.crowded


def test_route_edges_node_in_between_is_avoided():
    centers = np.array([[50.0, 100], [350, 100], [200, 90]])
    sizes = np.tile([40.0, 20], (3, 1))
    (route,) = route_edges([(0, 1)], centers, sizes, (0, 0, 400, 200))
    assert not (np.abs(route - centers[2]) <= sizes[2] / 2 + 1).all(axis=1).any()
