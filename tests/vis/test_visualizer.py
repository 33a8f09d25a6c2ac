"""Pictures of relations: their content, and that nothing covers anything else."""

import gc
import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from reldn_d2.structures.attributes import EntityAttributes
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.fonts import font_families
from reldn_d2.vis.canvas import RelationImage
from reldn_d2.vis.compare import compare_models
from reldn_d2.vis.correspondence import same_entities
from reldn_d2.vis.visualizer import RelationVisualizer

from detectron2.data import Metadata
from detectron2.structures import BoxMode

THINGS = ["person", "cup", "table"]
PREDICATES = ["holds", "on"]
BOXES = [[10, 20, 40, 120], [45, 60, 60, 75], [90, 58, 105, 73], [40, 74, 150, 130]]
CLASSES = [0, 1, 1, 2]
RELATIONS = [(0, 1, 0), (2, 3, 1), (1, 3, 1)]
RELATIONS_WITH_SCORES = [(*relation, 0.5) for relation in RELATIONS]


@pytest.fixture
def metadata():
    return Metadata(
        name="drawn",
        thing_classes=THINGS,
        predicate_classes=PREDICATES,
        evaluator_type="relation",
    )


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)


def dataset_dict(boxes=BOXES, classes=CLASSES, relations=RELATIONS, size=(160, 160)):
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
        for box, label in zip(boxes, classes)
    ]
    return {
        "file_name": "drawn.png",
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
        "relations": relations,
    }


def prediction(triplets=(), boxes=BOXES, classes=CLASSES):
    """Return a prediction for the image."""
    pairs, predicates = [t[:2] for t in triplets], [t[2] for t in triplets]
    scores = [t[3] for t in triplets]
    ones = [1.0] * len(boxes)
    return SceneGraph.from_arrays(None, boxes, classes, ones, pairs, predicates, scores)


def scene_of(triplets):
    return SceneGraph.from_triplets(BOXES, CLASSES, triplets)


def texts(picture):
    return [child.get_text() for child in picture.overlay.texts]


def all_pairs(count):
    """Return ``count`` predictions over the four entities, in descending order of score."""
    pairs = itertools.cycle(itertools.permutations(range(4), 2))
    return [(s, o, (n + n // 12) % 2, 0.9 - 0.02 * n) for n, (s, o) in zip(range(count), pairs)]


@pytest.mark.parametrize(
    "size, scale",
    [
        ((160, 160), 7.2),
        ((800, 1200), 1.0),
        ((1500, 3200), 0.5),
        ((1, 1), 1152.0),
        ((400, 10000), 0.48),
    ],
)
def test_visualizer_image_size_decides_the_scale(size, scale, metadata):
    visualizer = RelationVisualizer(np.zeros((*size, 3), np.uint8), metadata)
    picture = visualizer.draw_triplets(np.zeros((0, 4)), [], [])
    shown = picture.get_image()
    assert visualizer.scale == pytest.approx(scale)
    assert shown.dtype == np.uint8 and shown.shape[2] == 3
    assert shown.shape[0] >= size[0] * scale and shown.shape[1] > size[1] * scale


def test_visualizer_scale_1_keeps_the_pixels_next_to_a_white_panel(metadata):
    image = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    picture = RelationVisualizer(image, metadata, scale=1.0).draw_triplets([], [], [])
    shown = picture.get_image()
    assert np.array_equal(shown[:300, :400], image)
    panel = shown[:, 400:]
    assert (panel[-5:] == 255).all() and panel.min() < 200  # white, with the words on it
    assert texts(picture) == ["no relations"]


def test_draw_predictions_twice_gives_the_same_pixels(image, metadata):
    output = prediction(all_pairs(20))
    first, second = (
        RelationVisualizer(image, metadata, scale=2.0).draw_predictions(output).get_image()
        for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_draw_predictions_panel_lists_ranked_triplets_with_scores(image, metadata):
    triplets = [(0, 1, 0, 0.873), (2, 3, 1, 0.5), (0, 2, 0, 0.0042)]
    picture = RelationVisualizer(image, metadata).draw_predictions(prediction(triplets), topk=2)
    words = texts(picture)
    assert "2 best of 3 relations" in words and "0.87" in words and "0.50" in words
    assert "0.0042" not in words
    row = words[words.index("0.87") :]
    assert row[1:7] == ["\u20071  ", "person", " \u2013 ", "holds", " \u2013 ", "cup 1"]


def test_draw_predictions_min_score_leaves_relations_out(image, metadata):
    output = prediction([(0, 1, 0, 0.8), (2, 3, 1, 0.3)])
    visualizer = RelationVisualizer(image, metadata)
    words = texts(visualizer.draw_predictions(output, min_score=0.5))
    assert "1 best of 2 relations" in words and "table" not in words
    words = texts(visualizer.draw_predictions(output, min_score=0.9))
    assert words == ["none of 2 relations scores 0.9"]


def test_draw_ground_truth_unrelated_entities_are_not_drawn(image, metadata):
    picture = RelationVisualizer(image, metadata).draw_ground_truth(
        dataset_dict(relations=[(0, 2, 0)])
    )
    assert texts(picture)[:3] == ["person", "cup", "holds"]  # one cup takes part: no ordinal
    assert "table" not in texts(picture)


def test_draw_predictions_and_truth_show_attributes(image, metadata):
    metadata.attribute_classes = ["tall", "ol\nd"]
    attributes = EntityAttributes.from_lists(
        [[0], [1, 0], [1], []], [[0.9], [0.8, 0.6], [0.4], []], 4, "it"
    )
    predicted = replace(prediction(RELATIONS_WITH_SCORES), attributes=attributes)
    visualizer = RelationVisualizer(image, metadata)
    names = {"person (tall)", "cup 1 (ol d, tall)", "cup 2", "table"}
    assert names <= set(texts(visualizer.draw_predictions(predicted)))
    assert names <= set(texts(visualizer.draw_graph(predicted)))
    record = dataset_dict()
    record["annotations"][3]["attributes"] = [1]
    shown = texts(visualizer.draw_ground_truth(record))
    assert {"person", "cup 1", "cup 2", "table (ol d)"} <= set(shown)


@pytest.mark.parametrize("panel", ["right", "below", "none"])
def test_draw_triplets_texts_stay_on_the_sheet(panel, image, metadata):
    picture = RelationVisualizer(image, metadata).draw_triplets(
        BOXES, CLASSES, all_pairs(45), panel=panel, title="A title"
    )
    width, height = picture.sheet.size
    renderer = picture.canvas.get_renderer()
    for text in picture.overlay.texts:
        extent = text.get_window_extent(renderer)
        assert extent.x0 >= 0 and extent.x1 <= width, text.get_text()
        assert extent.y0 >= 0 and extent.y1 <= height, text.get_text()


def test_draw_triplets_twenty_relations_texts_do_not_overlap(image, metadata):
    picture = RelationVisualizer(image, metadata).draw_triplets(BOXES, CLASSES, all_pairs(20))
    renderer = picture.canvas.get_renderer()
    extents = [text.get_window_extent(renderer).padded(-1) for text in picture.overlay.texts]
    assert len(extents) > 20 * 7
    for first, second in itertools.combinations(extents, 2):
        assert not first.overlaps(second)


@pytest.mark.parametrize("size", [(160, 160), (40, 400), (400, 40)])
def test_draw_triplets_plates_do_not_overlap(size, metadata, monkeypatch):
    plates = []
    draw = RelationImage.plate
    monkeypatch.setattr(
        RelationImage,
        "plate",
        lambda self, label, *a: (plates.append(label), draw(self, label, *a)),
    )
    boxes = np.array(BOXES) * np.array([size[1], size[0], size[1], size[0]]) / 160
    picture = RelationVisualizer(np.zeros((*size, 3), np.uint8), metadata).draw_triplets(
        boxes, CLASSES, all_pairs(12)
    )
    assert len(plates) == 4 + 12
    x0, y0, x1, y1 = picture.sheet.area
    for left, top, right, bottom in (plate.rect for plate in plates):
        assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1
    assert_no_overlap([plate.rect for plate in plates])


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 160, 160], [0, 0, 160, 160]],  # the same, and at the border
        [[-20, -30, 10, 10], [150, 150, 400, 300]],  # partly outside
        [[300, 300, 310, 310], [50, 50, 50, 50]],  # outside, and without an area
    ],
)
def test_draw_triplets_degenerate_boxes_are_drawn(boxes, image, metadata):
    triplets = [(0, 1, 0, None), (0, 1, 1, None), (1, 0, 0, None)]
    picture = RelationVisualizer(image, metadata).draw_triplets(boxes, [0, 1], triplets)
    plain = RelationVisualizer(image, metadata).draw_triplets(boxes, [0, 1], [])
    shown, empty = picture.get_image(), plain.get_image()
    assert (shown[:768, :768] != empty[:768, :768]).any()
    assert texts(picture).count("holds") == 4  # on the arrows and in the panel


def test_visualizer_empty_inputs_are_drawn(image, metadata):
    visualizer = RelationVisualizer(image, metadata)
    nothing = prediction(boxes=[], classes=[])
    assert texts(visualizer.draw_predictions(nothing)) == ["no relations"]
    unrelated = dataset_dict(relations=[])
    assert texts(visualizer.draw_ground_truth(unrelated)) == ["no relations"]
    empty = dataset_dict([], [], [])
    for record in (empty, unrelated, dataset_dict()):
        assert compare_models(image, record, {"Prediction": nothing}, metadata, side=200).ndim == 3
    invented = prediction([(0, 1, 0, 0.5)])
    assert compare_models(image, unrelated, {"Prediction": invented}, metadata, side=200).ndim == 3


def test_draw_triplets_without_names_shows_ids(image):
    words = texts(RelationVisualizer(image).draw_triplets(BOXES, CLASSES, [(0, 3, 5, None)]))
    assert {"class 0", "class 2", "predicate 5"} <= set(words)


def test_draw_triplets_math_characters_in_names_are_literal(image):
    odd = SimpleNamespace(thing_classes=["$cup$", "_x^2"], predicate_classes=["a_{b}$"])
    metadata = Metadata(name="odd", **vars(odd))
    picture = RelationVisualizer(image, metadata).draw_triplets(BOXES, CLASSES, [(0, 1, 0, None)])
    assert "$cup$" in texts(picture) and picture.get_image().ndim == 3


@pytest.mark.parametrize("shape", [(160, 160), (160, 160, 4), (0, 160, 3)])
def test_visualizer_wrong_image_shape_raises(shape, metadata):
    with pytest.raises(ValueError, match="expected .height, width, 3."):
        RelationVisualizer(np.zeros(shape, np.uint8), metadata)


def test_draw_ground_truth_other_image_size_raises(image, metadata):
    with pytest.raises(ValueError, match="drawn.png: the image is 160 x 160 .* says 300 x 200"):
        RelationVisualizer(image, metadata).draw_ground_truth(dataset_dict(size=(200, 300)))


def test_visualizer_relation_outside_the_entities_raises(image, metadata):
    visualizer = RelationVisualizer(image, metadata)
    with pytest.raises(ValueError, match="drawn.png: relation 0 .* object index 9"):
        visualizer.draw_ground_truth(dataset_dict(relations=[(0, 9, 0)]))
    with pytest.raises(ValueError, match="object index 9"):
        visualizer.draw_triplets(BOXES, CLASSES, [(0, 9, 0, None)])


def test_same_entities_best_overlap_goes_first():
    truth = SceneGraph.from_triplets(BOXES[:2], CLASSES[:2], [(0, 1, 0, None)])
    # Two detections of the cup (the second fits better), one of another cup, and an idle one.
    boxes = np.array([BOXES[0], [45, 60, 60, 70], [45, 60, 60, 75], BOXES[2], BOXES[3]], float)
    other = SceneGraph.from_triplets(
        boxes, [0, 1, 1, 1, 2], [(0, 1, 0, 0.9), (0, 2, 0, 0.8), (0, 3, 0, 0.7)]
    )
    everything, maps = same_entities(truth, [other, other])
    assert maps[0] == {0: 0, 2: 1, 1: 2, 3: 3} and maps[1] == maps[0]
    assert everything.classes.tolist() == [0, 1, 1, 1]


def test_compare_models_two_models_in_one_row(image, metadata):
    right = prediction([(*r, 0.9) for r in RELATIONS])
    wrong = prediction([(0, 2, 0, 0.9), (2, 3, 1, 0.8), (2, 1, 1, 0.7)])
    arguments = (image, dataset_dict(), {"A": wrong, "B": right}, metadata)
    row = compare_models(*arguments, side=300)
    assert row.dtype == np.uint8
    assert row.shape[1] == 3 * 300 + 2 * 12 and row.shape[0] > 300
    assert np.array_equal(row, compare_models(*arguments, side=300))


def test_compare_models_marks_hits_and_misses(image, metadata, monkeypatch):
    drawn = []
    draw = RelationVisualizer.draw_scene

    def record(self, *args, **style):
        picture = draw(self, *args, **style)
        drawn.append((style, texts(picture)))
        return picture

    monkeypatch.setattr(RelationVisualizer, "draw_scene", record)
    output = prediction([(0, 2, 0, 0.9), (2, 3, 1, 0.8), (2, 1, 1, 0.7), (0, 1, 0, 0.6)])
    compare_models(image, dataset_dict(), {"Prediction": output}, metadata)
    (truth, _), (predicted, words) = drawn
    assert truth["marks"] == [False, True, False]
    assert predicted["marks"] == [False, True, False]
    assert predicted["title"] == "Prediction: 1 of 3 found (relations)"
    assert words.count("\u2713  ") == 1 and words.count("\u2717  ") == 2
    assert truth["names"][2] == predicted["names"][2] == "cup 2"
    assert truth["colors"] == {e: predicted["colors"][e] for e in truth["colors"]}

    drawn.clear()
    compare_models(image, dataset_dict(), {"Prediction": output}, metadata, topk=4)
    assert drawn[1][0]["marks"] == [False, True, False, True]
    assert drawn[0][0]["marks"] == [True, True, False]

    drawn.clear()
    compare_models(image, dataset_dict(), {"Prediction": output}, metadata, protocol="lu2016")
    assert drawn[1][0]["title"].endswith(" of 3 found (lu2016, k = 1)")


@pytest.mark.parametrize(
    "name, message", [("", "has evaluator_type None"), ("x", "Unknown protocol")]
)
def test_compare_models_without_protocol_raises(name, message, image):
    unknown = Metadata(name="unknown", thing_classes=THINGS, predicate_classes=PREDICATES)
    with pytest.raises(ValueError, match=message):
        compare_models(
            image, dataset_dict(), {"Prediction": SceneGraph.empty()}, unknown, protocol=name
        )


def test_draw_triplets_hits_are_green_and_misses_red(image, metadata):
    visualizer = RelationVisualizer(np.full((160, 160, 3), 128, np.uint8), metadata)
    for mark, strong, weak in ((True, 1, 0), (False, 0, 1)):
        picture = visualizer.draw_triplets(BOXES, CLASSES, [(0, 3, 0, None)], marks=[mark])
        arrow = picture.overlay.patches[0].get_facecolor()
        assert arrow[strong] > 2 * arrow[weak]


def test_visualizer_figures_are_freed_and_unknown_to_pyplot(image, metadata):
    import matplotlib.pyplot as plt

    figures = []
    for _ in range(3):
        picture = RelationVisualizer(image, metadata, scale=1.0).draw_ground_truth(dataset_dict())
        picture.get_image()
        figures.append(weakref.ref(picture.fig))
    del picture
    gc.collect()
    assert [figure() for figure in figures] == [None] * 3
    assert plt.get_fignums() == []


def test_visualizer_draw_box_uses_the_image_frame(metadata):
    visualizer = RelationVisualizer(np.zeros((400, 600, 3), np.uint8), metadata, scale=1.0)
    before = visualizer.draw_triplets(BOXES, CLASSES, [(0, 1, 0, None)]).get_image()
    after = visualizer.draw_box((300, 200, 400, 300), edge_color="r").get_image()
    changed = np.argwhere((before != after).any(axis=2))
    assert changed.min(axis=0) == pytest.approx([200, 300], abs=3)
    assert changed.max(axis=0) == pytest.approx([300, 400], abs=3)


def test_visualizer_save_writes_the_picture(tmp_path, image, metadata):
    from PIL import Image

    picture = RelationVisualizer(image, metadata).draw_ground_truth(dataset_dict())
    picture.save(str(tmp_path / "picture.png"))
    saved = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert np.array_equal(saved, picture.get_image())


def test_draw_triplets_relations_of_a_pair_share_an_arrow(image, metadata):
    triplets = [(0, 1, 0, 0.9), (0, 1, 1, 0.8), (1, 0, 1, 0.7)]
    picture = RelationVisualizer(image, metadata).draw_triplets(
        BOXES, CLASSES, triplets, panel="none"
    )
    assert len([x for x in picture.overlay.patches if type(x).__name__ == "Polygon"]) == 2
    assert sorted(texts(picture)) == ["cup", "holds", "on", "on", "person"]


def test_draw_triplets_many_predicates_label_is_cut(image, metadata):
    triplets = [(0, 1, n, 0.9 - 0.1 * n) for n in range(6)]
    words = texts(RelationVisualizer(image, metadata).draw_triplets(BOXES, CLASSES, triplets))
    assert "and 3 more" in words


LONG = "a very long name of a class that no one can read in one go, nor in two or in three"


def test_draw_triplets_long_panel_row_keeps_all_parts(image):
    odd = Metadata(name="long", thing_classes=[LONG] * 3, predicate_classes=[LONG])
    triplets = [(0, 1, 0, 0.87), (1, 2, 0, 0.5)]
    picture = RelationVisualizer(image, odd).draw_triplets(BOXES, CLASSES, triplets)
    words = texts(picture)
    row = words[words.index("0.87") :][:7]
    assert row[1] == "\u20071  " and row[3] == row[5] == " \u2013 "
    for text in (row[2], row[4], row[6]):
        assert text.startswith("a very long name") and "\u2026" in text
    assert row[6].endswith("\u2026 1")
    renderer = picture.canvas.get_renderer()
    extents = [text.get_window_extent(renderer).padded(-1) for text in picture.overlay.texts]
    for first, second in itertools.combinations(extents[words.index("0.87") :], 2):
        assert not first.overlaps(second)


@pytest.mark.parametrize("draw", ["draw_scene", "draw_graph"])
@pytest.mark.parametrize("known", [True, False])
def test_visualizer_long_names_keep_their_ordinals(draw, known, image):
    names = {1: f"{LONG} 1", 2: f"{LONG} 2"} if known else {1: f"{LONG} 7 #1", 2: f"{LONG} 7 #2"}
    visualizer = RelationVisualizer(image, Metadata(name="none"))
    picture = getattr(visualizer, draw)(scene_of([(1, 2, 0, None)]), names=names)
    for ordinal in (" 1", " 2") if known else (" 7 #1", " 7 #2"):
        shown = [text for text in texts(picture) if text.endswith("\u2026" + ordinal)]
        assert len(shown) == 2  # on the picture and in the panel


def test_draw_graph_long_predicates_stay_small(image):
    odd = Metadata(name="long", thing_classes=THINGS, predicate_classes=[LONG * 5] * 2)
    picture = RelationVisualizer(image, odd).draw_graph(scene_of(all_pairs(4)))
    assert max(picture.sheet.area) < 1500


def graph_rects(picture):
    plates = [x for x in picture.overlay.patches if type(x).__name__ == "FancyBboxPatch"]
    corners = [(x.get_x(), x.get_y()) for x in plates]
    sizes = [(x.get_width(), x.get_height()) for x in plates]
    low, high = np.array(corners), np.add(corners, sizes)
    return np.concatenate([low - 2.2, high + 2.2], axis=1)  # with their rounded borders


def assert_no_overlap(rects):
    for a, b in itertools.combinations(rects, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("title", [None, "A title"])
def test_draw_graph_dense_labels_do_not_overlap(title, image):
    boxes = np.random.default_rng(1).random((8, 2)) * 400
    boxes = np.concatenate([boxes, boxes + 60], axis=1)
    triplets = [(s, o, (s + o) % 9, None) for s, o in itertools.permutations(range(8), 2)]
    scene = SceneGraph.from_triplets(boxes, range(8), triplets)
    visualizer = RelationVisualizer(image)
    rects = graph_rects(visualizer.draw_graph(scene, title=title))
    assert len(rects) == 8 + 56
    assert_no_overlap(rects)
    if title:  # the whole graph is below it
        plain = graph_rects(visualizer.draw_graph(scene))
        moved = rects - plain
        assert np.allclose(moved[:, [0, 2]], 0) and np.allclose(moved[:, [1, 3]], moved[0, 1])
        assert moved[0, 1] > 10


def test_draw_graph_one_node_per_entity_without_overlap(image, metadata):
    triplets = all_pairs(8)
    picture = RelationVisualizer(image, metadata).draw_graph(scene_of(triplets))
    rects = graph_rects(picture)
    assert len(rects) == 4 + 8  # nodes, and a label for each arrow
    assert_no_overlap(rects)
    again = RelationVisualizer(image, metadata).draw_graph(scene_of(triplets))
    assert np.array_equal(picture.get_image(), again.get_image())


def test_draw_graph_one_pair_and_empty(image, metadata):
    visualizer = RelationVisualizer(image, metadata)
    assert "cup" in texts(visualizer.draw_graph(scene_of([(0, 1, 0, None)])))
    assert texts(visualizer.draw_graph(scene_of([]))) == ["no relations"]


def test_visualizer_chinese_names_are_drawn(image):
    names = ["\u4eba", "\u9a6c", "\u684c"]  # person, horse, table
    if len(font_families("".join(names))) == 1:
        pytest.skip("no installed font has Chinese characters (apt-get install fonts-noto-cjk)")
    pictures = []
    for name in names:
        metadata = Metadata(name="chinese", thing_classes=[name] * 3, predicate_classes=PREDICATES)
        visualizer = RelationVisualizer(image, metadata)
        pictures.append(visualizer.draw_triplets(BOXES, CLASSES, RELATIONS_WITH_SCORES).get_image())
    # Squares would be the same for all characters.
    assert all(x.shape == pictures[0].shape for x in pictures)
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))


def test_visualizer_line_breaks_in_names_are_spaces(image):
    metadata = Metadata(
        name="breaks", thing_classes=["per\nson", "a | b", "t\r\n c"], predicate_classes=["on\ntop"]
    )
    scene = SceneGraph.from_triplets(BOXES, CLASSES, [(0, 3, 0, 0.5), (1, 3, 0, 0.4)])
    for drawn in (
        RelationVisualizer(image, metadata).draw_scene(scene, title="two\nlines"),
        RelationVisualizer(image, metadata).draw_scene(scene, names={0: "x\ny", 1: "z", 3: "w"}),
        RelationVisualizer(image, metadata).draw_graph(scene),
    ):
        written = texts(drawn)
        assert not any("\n" in x or "\r" in x for x in written) and "on top" in written


def test_compare_models_counts_at_the_first_k_of_the_protocol(image, metadata):
    # Both triplets of one pair are right, but motifs with graph constraint takes one per pair.
    truth = dataset_dict(relations=[(0, 1, 0), (0, 1, 1)])
    right = prediction([(0, 1, 0, 0.9), (0, 1, 1, 0.8)])
    titles = []
    draw = RelationVisualizer.draw_scene

    def record(self, scene, **style):
        titles.append(style["title"])
        return draw(self, scene, **style)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RelationVisualizer, "draw_scene", record)
        for protocol in ("motifs", "released", "relations"):
            compare_models(image, truth, {"A": right}, metadata, protocol=protocol)
    assert titles[1::2] == [
        "A: 1 of 2 found (motifs, k = 1)",
        "A: 2 of 2 found (released, k = 2)",
        "A: 2 of 2 found (relations)",
    ]
