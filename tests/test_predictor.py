"""RelationPredictor: loading, all types of input, and results."""

import json

import networkx
import numpy as np
import pytest
import torch
from model_utils import CLASSES, PREDICATES
from PIL import Image
from usage_utils import picture, write_checkpoint, write_precomputed_checkpoint

from reldn_d2.data.dataset_mapper import RelationDatasetMapper
from reldn_d2.data.detection_files import attach_detections
from reldn_d2.predictor import RelationPredictor
from reldn_d2.structures.graph_formats import graph_to_dot, graph_to_graphml
from reldn_d2.utils.image_io import ImageError
from reldn_d2.vis.saliency import draw_triplet_saliency, feature_saliency, triplet_saliency

from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T


def same(first, second):
    """Assert that two predictions of one image, made in different batches, are equal."""
    assert torch.equal(first["relations"].pairs, second["relations"].pairs)
    for field in ("scores", "predicate_scores"):
        torch.testing.assert_close(
            first["relations"].get(field), second["relations"].get(field), rtol=0, atol=1e-5
        )
    boxes = [x["instances"].pred_boxes.tensor for x in (first, second)]
    torch.testing.assert_close(*boxes, rtol=0, atol=1e-3)


def test_predictor_paths_arrays_and_batches_agree(predictor, tmp_path):
    rgb = [picture(60, 90, seed) for seed in range(3)] + [picture(90, 60, 3)]
    paths = []
    for index, image in enumerate(rgb):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image).save(paths[-1])
    alone = [predictor(str(path)) for path in paths]
    assert all(len(x["relations"]) > 10 for x in alone)
    for other in (
        predictor(paths, batch_size=4),
        predictor([x[:, :, ::-1] for x in rgb], channels="BGR", batch_size=3),
        [x for _, x in predictor.stream(paths, batch_size=3)],
    ):
        for one, two in zip(alone, other):
            same(one, two)
            assert one.image_size == two.image_size
    assert alone[0].file_name == str(paths[0]) and predictor(rgb[0]).file_name is None


def test_predictor_prepared_inputs_give_the_result_of_a_call(predictor):
    boxes = [[5, 5, 40, 50], [30, 20, 80, 55]]
    given = {"boxes": boxes, "classes": ["person", "no class"]}
    inputs = [predictor.read_input(picture(seed=1))]
    inputs.append(predictor.read_input(picture(), unknown_classes="leave_out", **given))
    first, second = predictor.predict_inputs(inputs)
    same(first, predictor(picture(seed=1)))
    assert second.left_out == {1: "no class"} and second.boxes.tolist() == boxes[:1]
    with pytest.raises(ImageError, match="^x: the model has no class 'no class'"):
        predictor.read_input(picture(), "x", **given)


def test_predictor_equals_the_model_in_the_image_frame(predictor):
    rgb = picture(50, 120)
    result = predictor(rgb)
    resize = T.ResizeShortestEdge([96, 96], 128).get_transform(rgb)
    image = torch.as_tensor(resize.apply_image(rgb[:, :, ::-1]).transpose(2, 0, 1).copy())
    with torch.no_grad():
        expected = predictor.model([{"image": image, "height": 50, "width": 120}])[0]
    same(result, expected)
    assert result.image_size == (50, 120)


def test_scene_graph_triplets_json_and_graph_agree(predictor):
    result = predictor(picture())
    triplets, relations = result.triplets(), result["relations"]
    assert len(triplets) == len(relations) > 0
    first = triplets[0]
    assert first.subject in CLASSES and first.predicate in PREDICATES
    assert [x.score for x in triplets] == sorted((x.score for x in triplets), reverse=True)
    record = json.loads(result.to_json())
    assert record["relations"]["pairs"][0] == [first.subject_index, first.object_index]
    assert record["relations"]["predicate_names"][0] == first.predicate
    assert record["instances"]["class_names"][first.subject_index] == first.subject
    assert (record["height"], record["width"]) == (60, 90)

    graph = result.graph()
    assert isinstance(graph, networkx.MultiDiGraph)
    assert graph.number_of_nodes() == len(result["instances"])
    assert graph.number_of_edges() == len(relations)
    predicate_id = PREDICATES.index(first.predicate)
    edge = graph.edges[first.subject_index, first.object_index, predicate_id]
    assert edge["name"] == first.predicate and edge["score"] == pytest.approx(first.score)
    node = graph.nodes[first.subject_index]
    assert node["name"] == first.subject
    box = result.boxes[first.subject_index].tolist()
    assert [node[key] for key in ("x0", "y0", "x1", "y1")] == box
    labels = [data["label"] for _, data in graph.nodes(data=True)]
    assert len(set(labels)) == len(labels) and node["label"].startswith(first.subject)
    read = networkx.parse_graphml(graph_to_graphml(graph))
    assert read.number_of_edges() == len(relations)
    assert len({key for *_, key in read.edges(keys=True)}) == len(relations)
    assert read.nodes[str(first.subject_index)]["x0"] == pytest.approx(box[0])
    dot = graph_to_dot(result.best(3).graph(related_only=True))
    assert dot.count("->") == 3 and dot.startswith("digraph")
    assert len(result.best(min_score=2.0)["relations"]) == 0


def test_graph_to_dot_quotes_in_names_are_escaped(predictor):
    graph = networkx.MultiDiGraph()
    graph.add_node(0, name='a "b" \\ c')
    assert '[label="a \\"b\\" \\\\ c"]' in graph_to_dot(graph)


def test_predictor_given_boxes_are_kept(predictor):
    rgb, boxes = picture(80, 120), [[5, 5, 60, 70], [50, 10, 110, 75], [20, 30, 40, 50]]
    result = predictor(rgb, boxes=boxes, classes=["person", 1, "table"])
    instances = result["instances"]
    torch.testing.assert_close(
        instances.pred_boxes.tensor, torch.tensor(boxes).float(), rtol=0, atol=1e-3
    )
    assert instances.pred_classes.tolist() == [0, 1, CLASSES.index("table")]
    assert instances.scores.tolist() == [1.0, 1.0, 1.0]
    assert predictor.model.task == "sgdet"  # as it was
    unnamed = predictor(rgb, boxes=np.array(boxes))["instances"]
    assert len(unnamed) == 3 and (unnamed.scores < 1).all()
    # A list mixes given and detected; afterwards the model is as it was.
    mixed = predictor([rgb, rgb, rgb], boxes=[boxes, None, []], batch_size=3)
    assert len(mixed[0]["instances"]) == 3 and len(mixed[2]["instances"]) == 0
    same(mixed[1], predictor(rgb))
    assert predictor.model.task == "sgdet"


@pytest.mark.parametrize(
    "boxes, classes, message",
    [
        ([[0, 0, 10]], None, "shape"),
        ([[0, 0, 10, "x"]], None, "expected boxes as lists of numbers"),
        ([[0, 0, 9, 9], [10, 10, 5, 20]], None, r"box 1, \[10.0, 10.0, 5.0, 20.0\], has no area"),
        ([[200, 0, 300, 20]], None, "90 x 60"),
        ([[0, 0, 9, 9], [50, 5, 50.00001, 50]], None, "box 1"),  # its width is 0 in float32
        ([[0, 0, float("nan"), 5]], None, "box 0, .* is not finite"),
        ([[0, 0, 9, 9]], [99], "no class 99; its ids are 0 to 8"),
        ([[0, 0, 9, 9]], ["unicorn"], "no class 'unicorn'; its 9 classes are "),
        ([[0, 0, 9, 9]], [f" {CLASSES[2]}x"], f"did you mean '{CLASSES[2]}'"),
        (
            [[50, 30, 190, 150]],
            [0],
            "1 of 1 boxes lie mostly outside .*in one of 90 x 60 pixels. Exp",
        ),
        ([[200, 0, 300, 20]], [0], "pixels of the original image: scale boxes of a resized"),
        ([[0, 0, 9, 9]], [None], "no class None"),
        ([[0, 0, 9, 9]], [0.5], "no class 0.5"),
        ([[0, 0, 9, 9]], 3, "classes is 3; expected a list"),
        ([[0, 0, 9, 9]], [0, 1], "got 2 classes for 1 boxes"),
        (None, [0], "classes were given without boxes"),
    ],
)
def test_predictor_bad_boxes_or_classes_raise(predictor, boxes, classes, message):
    with pytest.raises(ImageError, match=message):
        predictor(picture(), boxes=boxes, classes=classes)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([0.5], "got 1 scores for 2 boxes"),
        ([0.5, 1.5], "the score 1.5 is not a number between 0 and 1"),
        ([0.5, float("nan")], "the score nan is not"),
        ([0.5, "x"], "the score 'x' is not"),
        (0.5, "scores is 0.5; expected a list"),
    ],
)
def test_predictor_bad_scores_raise(predictor, scores, message):
    boxes = [[0, 0, 9, 9], [5, 5, 20, 20]]
    with pytest.raises(ImageError, match=message):
        predictor(picture(), boxes=boxes, classes=[0, 1], scores=scores)


def test_predictor_scores_without_classes_or_boxes_raise(predictor):
    with pytest.raises(ImageError, match="scores were given without classes"):
        predictor(picture(), boxes=[[0, 0, 9, 9]], scores=[0.5])
    with pytest.raises(ImageError, match="scores were given without boxes"):
        predictor(picture(), scores=[0.5])


def test_predictor_given_scores_are_those_of_the_entities(predictor):
    rgb, boxes = picture(80, 120), [[5, 5, 60, 70], [50, 10, 110, 75]]
    plain = predictor(rgb, boxes=boxes, classes=[0, 1])
    scored = predictor(rgb, boxes=boxes, classes=[0, 1], scores=np.array([0.5, 0.25]))
    assert scored.box_scores.tolist() == [0.5, 0.25]
    assert np.array_equal(scored.pairs, plain.pairs) and len(plain.pairs) > 0
    np.testing.assert_allclose(scored.scores, 0.125 * plain.scores, rtol=1e-5)
    np.testing.assert_allclose(scored.predicate_scores, plain.predicate_scores, rtol=1e-5)
    # Lists of images, with and without scores in one batch.
    mixed = predictor(
        [rgb] * 3,
        boxes=[boxes, None, boxes],
        classes=[[0, 1], None, [0, 1]],
        scores=[[0.5, 0.25], None, None],
        batch_size=3,
    )
    np.testing.assert_allclose(mixed[0].scores, scored.scores, rtol=1e-4)
    np.testing.assert_allclose(mixed[2].scores, plain.scores, rtol=1e-4)
    same(mixed[1], predictor(rgb))


def test_predictor_given_boxes_beyond_the_image_are_returned_as_given(predictor, caplog):
    rgb = picture(61, 97)  # a size that scaling does not restore exactly
    boxes = [[-20.3, 5.1, 60, 70.7], [50, 10, 97.4, 61.2]]
    found = predictor(rgb, boxes=boxes, classes=[0, 1])
    assert found.boxes.tolist() == boxes
    assert found["instances"].pred_boxes.tensor.tolist() == torch.tensor(boxes).tolist()
    assert found.to_dict()["instances"]["boxes"] == boxes
    assert "1 of 2 given boxes extend beyond the image of 97 x 61 pixels" in caplog.text
    # The model sees the part within the image.
    inside = predictor(rgb, boxes=[[0, 5.1, 60, 61], [50, 10, 97, 61]], classes=[0, 1])
    np.testing.assert_allclose(found.scores, inside.scores, rtol=1e-6)
    assert len(predictor(rgb, boxes=boxes).boxes) == 2


def test_predictor_errors_name_the_index_in_the_list(predictor, tmp_path):
    good, bad = picture(), np.full((60, 90, 3), np.nan)
    (tmp_path / "x.jpg").write_bytes(b"text")
    with Image.open(saved_part(tmp_path)) as cut:
        for images, message in (
            ([good, good, bad], "^image 2: "),
            ([good, good, cut], "^image 2: cannot be read as an image: .*truncated"),
            ([good, good, tmp_path / "x.jpg"], f"^{tmp_path}/x.jpg: cannot be read"),
        ):
            for batch_size in (1, 2, 3):
                with pytest.raises(ImageError, match=message):
                    predictor(images, batch_size=batch_size)
                *_, (_, error) = predictor.stream(images, batch_size=batch_size)
                with pytest.raises(ImageError, match=message):
                    raise error
    with pytest.raises(ImageError, match="^image: the image has values that are not finite"):
        predictor(bad)  # no list, no index
    boxes = [None, [[0, 0, 9, 9]], [[0, 0, 9]]]
    with pytest.raises(ImageError, match="^image 2: boxes of shape"):
        predictor([good] * 3, boxes=boxes, batch_size=2)
    classes = [None, [0], [99]]
    with pytest.raises(ImageError, match="^image 2: the model has no class 99"):
        predictor([good] * 3, boxes=[None] + [[[0, 0, 9, 9]]] * 2, classes=classes, batch_size=3)


def saved_part(folder):
    Image.effect_noise((90, 60), 60).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "part.jpg").write_bytes(content[: len(content) // 2])
    return folder / "part.jpg"


def test_stream_given_entities(predictor):
    images = [picture(), picture(seed=1), picture(seed=2)]
    boxes = [[5, 5, 60, 50], [50, 10, 80, 55]]
    given = [dict(boxes=boxes, classes=[0, 1]), {}, dict(boxes=boxes, classes=[0, 10])]
    entities = iter(given)
    results = [x for _, x in predictor.stream(images, 2, given=lambda image: next(entities))]
    assert results[0].boxes.tolist() == boxes
    same(results[1], predictor(images[1]))
    assert str(results[2]).startswith("image 2: the model has no class 10")


@pytest.fixture(scope="module")
def precomputed(tmp_path_factory):
    """A predictor trained on detections from files."""
    path = write_precomputed_checkpoint(tmp_path_factory.mktemp("precomputed"))
    return RelationPredictor.from_checkpoint(path, device="cpu")


def test_predictor_detections_equal_the_evaluation(precomputed, tmp_path):
    rgb = picture(61, 97)
    record = {"file_name": str(tmp_path / "7.png"), "image_id": 7, "height": 61, "width": 97}
    Image.fromarray(rgb).save(record["file_name"])
    rows = [(1, [5, 5, 30, 40], 0.9), (0, [30, 10, 90, 45], 0.8), (7, [0, 0, 9, 9], 0.01)]
    keys = ("category_id", "bbox", "score")
    file = tmp_path / "detections.json"
    file.write_text(json.dumps([{"image_id": 7, **dict(zip(keys, row))} for row in rows]))
    (mapped,) = attach_detections([record], "not_registered", str(file), len(CLASSES))
    mapper = RelationDatasetMapper(precomputed.cfg, is_train=False)
    with torch.no_grad():
        expected = precomputed.model([mapper(mapped)])[0]
    found = precomputed(rgb, detections=precomputed.read_detections(file)["7"])
    same(found, expected)
    assert found.box_scores.tolist() == pytest.approx([0.9, 0.8]) and len(found.scores) > 0
    assert found.boxes[1].tolist() == pytest.approx([30, 10, 97, 55], abs=1e-3)
    written = {"boxes": [[5, 5, 35, 45], [30, 10, 120, 55]], "classes": ["cup", 0]}
    same(precomputed([rgb], detections=[{**written, "scores": [0.9, 0.8]}])[0], expected)
    # Boxes can be given as well; those without classes are classified by the detections.
    boxes = [[5, 5, 34, 45], [50, 10, 90, 55]]
    given = precomputed(rgb, boxes=boxes, classes=[3, 4], scores=[0.5, 0.5])
    assert given.boxes.tolist() == boxes and given.classes.tolist() == [3, 4]
    detections = {**written, "scores": [0.9, 0.8]}
    assert precomputed(rgb, boxes=boxes, detections=detections).classes.tolist() == [1, 0]
    assert feature_saliency(precomputed, rgb).detector
    with pytest.raises(ImageError, match="trained on detections from files"):
        triplet_saliency(precomputed, rgb)
    assert triplet_saliency(precomputed, rgb, detections=detections)[1].boxes.shape == (2, 4)
    assert draw_triplet_saliency(precomputed, rgb, detections=detections)[0].ndim == 3


@pytest.mark.parametrize(
    "detections, message",
    [
        (None, "give detections, or boxes with classes"),
        ([1], "detections: expected an object with boxes, classes, scores, found a list"),
        ({"boxes": [], "classes": []}, "detections: scores missing"),
        (
            {"boxes": [], "classes": [], "scores": [], "masks": []},
            "detections: unknown key 'masks'; known: boxes, classes, scores",
        ),
        ({"boxes": [[9, 0, 0, 9]], "classes": [0], "scores": [1]}, "corners of box 0, .* swapped"),
        ({"boxes": [[0, 0, 9, 9]], "classes": [0], "scores": [90]}, "the score 90 is not"),
        ({"boxes": [[0, 0, 9, 9]], "classes": [9], "scores": [1]}, "no class 9"),
        (
            {"boxes": [[200, 9, 400, 90]], "classes": [0], "scores": [1]},
            "detections: 1 of 1 boxes lie mostly outside",
        ),
    ],
)
def test_predictor_bad_detections_raise(precomputed, detections, message):
    with pytest.raises(ImageError, match=f"^image 1: .*{message}"):
        good = {"boxes": [], "classes": [], "scores": []}
        precomputed([picture()] * 2, detections=[good, detections])


def test_predictor_detections_for_a_model_with_a_detector_raise(predictor):
    with pytest.raises(ImageError, match="has its own detector and takes no detections"):
        predictor(picture(), detections={"boxes": [], "classes": [], "scores": []})


def test_read_detections_ids_that_may_start_at_1_are_reported(precomputed, tmp_path, caplog):
    record = {"image_id": "a", "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    assert precomputed.read_detections(tmp_path / "x.json")["a"]["classes"].tolist() == [1]
    assert "x.json: no detection has category_id 0" in caplog.text and "'person'" in caplog.text


@pytest.mark.parametrize("count", [0, 1])
def test_predictor_zero_or_one_detection_has_no_relations(checkpoint, count, tmp_path):
    options = ["TEST.DETECTIONS_PER_IMAGE", max(count, 1)]
    if count == 0:
        options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0]
    few = RelationPredictor.from_checkpoint(checkpoint, device="cpu", opts=options)
    result = few(picture())
    assert len(result["instances"]) == count and result.triplets() == []
    assert result.graph().number_of_nodes() == count
    assert json.loads(result.to_json())["relations"]["pairs"] == []
    with pytest.raises(ImageError, match="no triplet 0; there are 0"):
        triplet_saliency(few, picture())


@pytest.mark.parametrize("height, width", [(1, 1), (400, 10000), (10000, 2), (1, 700)])
def test_predictor_extreme_image_sizes(predictor, height, width):
    result = predictor(np.full((height, width, 3), 120, np.uint8))
    assert result.image_size == (height, width)
    boxes = result["instances"].pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


def test_stream_bad_image_does_not_stop_the_others(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    images = [picture(), str(tmp_path / "text.jpg"), picture(seed=1), np.zeros((2, 3, 4, 5))]
    results = [x for _, x in predictor.stream(images, batch_size=3)]
    assert [isinstance(x, ImageError) for x in results] == [False, True, False, True]
    assert "text.jpg" in str(results[1])
    same(results[2], predictor(picture(seed=1)))


def test_stream_single_image_raises(predictor):
    for one in ("x.png", picture()):
        with pytest.raises(TypeError, match="several images"):
            next(predictor.stream(one))


def test_from_checkpoint_missing_or_other_file_raises(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint '.*none.pth'"):
        RelationPredictor.from_checkpoint(tmp_path / "none.pth")
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has no relation head"):
        RelationPredictor.from_checkpoint(tmp_path / "other.pth")
    content = torch.load(checkpoint, weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "unnamed.pth")
    with pytest.raises(ValueError, match="unnamed.pth has no config"):
        RelationPredictor.from_checkpoint(tmp_path / "unnamed.pth")
    # A detector's weights, with a config that would build a RelDN.
    weights = {k: v for k, v in content["model"].items() if k.startswith("detector.")}
    torch.save({**content, "model": weights}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match="detector.pth has no relation head: .* Train RelDN on it"):
        RelationPredictor.from_checkpoint(tmp_path / "detector.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="text.pth cannot be read as a RelDN checkpoint"):
        RelationPredictor.from_checkpoint(tmp_path / "text.pth")


@pytest.mark.parametrize(
    "opts, ks",
    [
        ((), (None,)),
        (("TEST.RELATIONS.PROTOCOL", "motifs"), (1, None)),
        ({"TEST.RELATIONS.PROTOCOL": "motifs"}, (1, None)),
    ],
)
def test_from_checkpoint_unregistered_data_set_keeps_predicates_per_pair(opts, ks, tmp_path):
    # Its protocol decides how many predicates per pair are kept if the config does not.
    name = "data_set_of_another_process"
    MetadataCatalog.get(name).evaluator_type = "relation"
    options = ["TEST.RELATIONS.PREDICATES_PER_PAIR", [], "DATASETS.TEST", (name,)]
    path = write_checkpoint(tmp_path, *options)
    MetadataCatalog.remove(name)
    loaded = RelationPredictor.from_checkpoint(path, device="cpu", opts=opts)
    assert tuple(k or None for k in loaded.model.relation_head.predicates_per_pair) == ks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_from_checkpoint_missing_gpu_raises(checkpoint):
    with pytest.raises(ValueError, match="device 'cuda:1': torch .* sees no GPU here; use cpu"):
        RelationPredictor.from_checkpoint(checkpoint, device="cuda:1")
    assert RelationPredictor.from_checkpoint(checkpoint).model.device.type == "cpu"


def test_predictor_pil_images_and_other_types(predictor):
    rgb = picture()
    same(predictor(Image.fromarray(rgb)), predictor(rgb))
    same(predictor([Image.fromarray(rgb), rgb])[0], predictor(rgb))
    for wrong, message in (
        (torch.from_numpy(rgb.copy()), "a Tensor is neither an image nor a list of images"),
        (None, "^image: this model reads pixels; give an image$"),
        ([None], "^image 0: this model reads pixels; give an image$"),
        ([torch.from_numpy(rgb.copy())], "image 0: a Tensor is not an image"),
    ):
        with pytest.raises(ImageError, match=message):
            predictor(wrong)
    with pytest.raises(ImageError, match="^2 images came with 1 sets of boxes; give one per image"):
        predictor([rgb, rgb], boxes=[[[0, 0, 5, 5]]])


def test_predictor_boxes_divided_by_the_size_raise(predictor):
    boxes = [[0.1, 0.1, 0.5, 0.9], [0.4, 0.2, 1.0, 0.8]]
    with pytest.raises(
        ImageError, match=r"image: all 2 boxes lie within \[0, 1\]: they look divid"
    ):
        predictor(picture(), boxes=boxes, classes=[0, 1])
