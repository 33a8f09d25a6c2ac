"""The parts of the relation head by hand and in plain loops, and the head as a whole."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import contrastive_in_loops
from model_utils import busy_item, small_config, small_model

from reldn_d2.data.frequency import count_predicates, log_frequencies
from reldn_d2.modeling.relation_head import (
    ContrastiveLosses,
    PredicateLoss,
    RelDNHead,
    RelDNPairSampler,
    RelDNPredictor,
    build_relation_head,
)
from reldn_d2.modeling.relation_head import pair_sampling as sampling_module
from reldn_d2.modeling.relation_head import relation_head as head_module
from reldn_d2.modeling.relation_head.predictors import (
    SemanticModule,
    SpatialModule,
    VisualModule,
    spatial_features,
    without_last_relu,
)
from reldn_d2.modeling.relation_head.topk import TopTriplets
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage

CLASSES, PREDICATES = 3, 4


def test_spatial_features_two_boxes_equal_hand_computed_values():
    subject, object_ = torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([[40.0, 35, 80, 55]])
    # Sizes 20x40 and 40x20, centres (20, 40) and (60, 45); union 70x40 around (45, 40).
    expected = [
        *(40 / 20, 5 / 40, math.log(40 / 20), math.log(20 / 40), -40 / 40, -5 / 20),
        *(25 / 20, 0, math.log(70 / 20), math.log(40 / 40), -25 / 70, 0),
        *(15 / 70, 5 / 40, math.log(40 / 70), math.log(20 / 40), -15 / 40, -5 / 20),
        *(10 / 200, 20 / 100, 30 / 200, 60 / 100, 20 * 40 / 20000),
        *(40 / 200, 35 / 100, 80 / 200, 55 / 100, 40 * 20 / 20000),
    ]
    feature = spatial_features(subject, object_, torch.tensor([[100.0, 200.0]]))
    assert feature.shape == (1, 28)
    assert feature[0].tolist() == pytest.approx(expected, abs=1e-6)


def random_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = 50 * torch.rand((count, 2), generator=generator)
    return torch.cat([low, low + 5 + 40 * torch.rand((count, 2), generator=generator)], dim=1)


def test_spatial_features_shifted_and_scaled_boxes_change_as_expected():
    subject, object_ = random_boxes(20), random_boxes(20, seed=1)
    size, shift = torch.tensor([[100.0, 200.0]]).expand(20, 2), torch.tensor([7.0, 3, 7, 3])
    feature = spatial_features(subject, object_, size)
    moved = spatial_features(subject + shift, object_ + shift, size)
    torch.testing.assert_close(moved[:, :18], feature[:, :18], rtol=1e-4, atol=1e-4)
    wanted = feature[:, 18:] + torch.tensor([7 / 200, 3 / 100, 7 / 200, 3 / 100, 0] * 2)
    torch.testing.assert_close(moved[:, 18:], wanted, rtol=1e-4, atol=1e-5)
    larger = spatial_features(2.5 * subject, 2.5 * object_, 2.5 * size)
    torch.testing.assert_close(larger, feature, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subject", [[5, 5, 5, 5], [5, 5, 5, 30], [0, 0, 0, 0], [5, 5, 5.001, 9]])
def test_spatial_features_degenerate_boxes_are_finite_and_bounded(subject):
    boxes = torch.tensor([subject, [0, 0, 1000, 1000]]).float()
    feature = spatial_features(boxes, boxes.flip(0), torch.tensor([[1000.0, 1000.0]] * 2))
    assert torch.isfinite(feature).all() and feature.abs().max() <= 1000
    assert spatial_features(boxes[:0], boxes[:0], torch.zeros((0, 2))).shape == (0, 28)


def test_spatial_module_layers_match_the_paper():
    shapes = [tuple(p.shape) for p in SpatialModule(9).parameters() if p.dim() == 2]
    assert shapes == [(64, 28), (64, 64), (10, 64)]
    slopes = [x.negative_slope for x in SpatialModule(9) if isinstance(x, torch.nn.LeakyReLU)]
    assert slopes == [0.1, 0.1]


def features_of_version_1(subject, object_, size):
    """The 28 values that checkpoints without a feature version were trained on."""

    def center(box):
        return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]

    def delta(first, second):
        (x1, y1), (x2, y2) = center(first), center(second)
        w1, h1, w2, h2 = (b[i + 2] - b[i] for b in (first, second) for i in (0, 1))
        logarithms = [math.log(w1 / w2), math.log(h1 / h2)]
        return [(x1 - x2) / w2, (y1 - y2) / h2, *logarithms, (x2 - x1) / w1, (y2 - y1) / h1]

    def position(box):
        height, width = size
        area = (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
        return [box[0] / width, box[1] / height, box[2] / width, box[3] / height, area]

    union = [*map(min, subject[:2], object_[:2]), *map(max, subject[2:], object_[2:])]
    deltas = [*delta(subject, object_), *delta(subject, union), *delta(union, object_)]
    return [*deltas, *position(subject), *position(object_)]


def test_spatial_module_state_without_version_is_converted_to_the_same_logits(caplog):
    old = torch.nn.Sequential(*(x for x in SpatialModule(PREDICATES)))
    subject, object_, size = random_boxes(30), random_boxes(30, seed=1), (100, 120)
    table = [features_of_version_1(*x, size) for x in zip(subject.tolist(), object_.tolist())]
    wanted = old(torch.tensor(table))
    before = {name: x.clone() for name, x in old.state_dict().items()}
    for prefix in ("", "relation_head.spatial."):
        holder = SpatialModule(PREDICATES)
        model = holder
        for name in reversed(prefix.split(".")[:-1]):
            model = torch.nn.ModuleDict({name: model})
        caplog.clear()
        with caplog.at_level("INFO", logger=head_module.__name__.rpartition(".")[0]):
            model.load_state_dict({prefix + name: x for name, x in old.state_dict().items()})
        assert caplog.text.count("Converted") == 1 and f"{prefix}0.weight" in caplog.text
        found = holder(spatial_features(subject, object_, torch.tensor([size]).expand(30, 2)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        # Written again, it is not converted a second time.
        caplog.clear()
        again = SpatialModule(PREDICATES)
        again.load_state_dict({name: x.clone() for name, x in holder.state_dict().items()})
        assert torch.equal(again[0].weight, holder[0].weight) and "Converted" not in caplog.text
    assert all(torch.equal(x, before[name]) for name, x in old.state_dict().items())
    assert int(SpatialModule(PREDICATES).state_dict()["feature_version"]) == 2


def test_spatial_module_partial_state_reports_missing_weights():
    result = SpatialModule(PREDICATES).load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == [
        f"{i}.{x}" for i in (0, 2, 4) for x in ("bias", "weight")
    ]


def test_semantic_module_forward_returns_counted_log_frequencies():
    def annotation(category, *box):
        return dict(bbox=box, bbox_mode=BoxMode.XYXY_ABS, category_id=category, iscrowd=0)

    record = {
        "file_name": "a.jpg",
        "annotations": [
            annotation(0, 0, 0, 10, 10),
            annotation(2, 5, 5, 15, 15),
            annotation(2, 5, 5, 9, 9),
        ],
        "relations": [(0, 1, 3), (0, 2, 3), (0, 2, 1)],
    }
    module = SemanticModule(CLASSES, PREDICATES)
    module.set_log_frequencies(
        log_frequencies(count_predicates([record], CLASSES, PREDICATES, overlap_filter=True))
    )
    rows = module(torch.tensor([0, 2, 1]), torch.tensor([2, 0, 1]))
    counts = ([0, 1, 0, 2, 3], [0, 0, 0, 0, 3], [0, 0, 0, 0, 1])  # pairs of these classes, plus 1
    for row, count in zip(rows.tolist(), counts):
        assert row == pytest.approx([math.log(x / sum(count) + 1e-3) for x in count], abs=1e-5)
    assert bool(module.counted)


def test_semantic_module_freeze_and_wrong_shape_raises():
    assert not SemanticModule(2, 3, freeze=True).table.weight.requires_grad
    assert SemanticModule(2, 3).table.weight.requires_grad
    with pytest.raises(ValueError, match=r"\(2, 2, 3\).*2 classes and 3 predicates.*\(2, 2, 4\)"):
        SemanticModule(2, 3).set_log_frequencies(torch.zeros(2, 2, 3))


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3)))
def test_visual_module_equals_concatenation(switches):
    spo, subject_skip, object_skip = switches
    torch.manual_seed(0)
    d, module = 6, VisualModule(
        6, PREDICATES, spo=spo, subject_skip=subject_skip, object_skip=object_skip
    )
    as_subject, as_object = torch.randn(5, d), torch.randn(5, d)
    subjects, objects = torch.tensor([0, 0, 3, 4]), torch.tensor([1, 2, 4, 3])
    of_union, union = torch.randn(3, d), torch.tensor([0, 1, 2, 2])
    logits = module(as_subject, as_object, of_union, subjects, objects, union)
    if not any(switches):
        assert isinstance(logits, int) and logits == 0
        return
    expected = torch.zeros(4, PREDICATES + 1)
    if spo:
        joined = torch.cat([as_subject[subjects], of_union[union], as_object[objects]], dim=1)
        expected = expected + module.rest(module.first(joined))
        shapes = [tuple(p.shape) for p in module.rest.parameters() if p.dim() == 2]
        assert tuple(module.first.weight.shape) == (9, 18) and shapes == [(6, 9), (5, 6)]
    if subject_skip:
        expected = expected + module.subject_skip(as_subject[subjects])
    if object_skip:
        expected = expected + module.object_skip(as_object[objects])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def rank_in_loops(probabilities, pair_scores, k, topk):
    """Scores of the best triplets with at most k predicates per pair."""
    scores = []
    for row, pair_score in zip(probabilities.tolist(), pair_scores.tolist()):
        scores += [p * pair_score for p in sorted(row, reverse=True)[: k or len(row)]]
    return sorted(scores, reverse=True)[:topk]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 8),
    st.integers(1, 5),
    st.lists(st.sampled_from([None, 1, 2, 7]), min_size=1, max_size=3, unique=True),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_top_triplets_random_cases_equal_exhaustive_search(pairs, predicates, ks, topk, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand((pairs, predicates), generator=generator, dtype=torch.float64)
    pair_scores = torch.rand(pairs, generator=generator, dtype=torch.float64)
    if ties:  # zero scores among them
        probabilities, pair_scores = (2 * probabilities).round() / 2, (2 * pair_scores).round() / 2
    best = TopTriplets(ks, topk, predicates)
    best.update(probabilities, pair_scores, torch.arange(pairs))
    ranked = best.relations(1, (10, 10))
    pair, predicate, score = ranked.pairs[:, 0], ranked.predicates, ranked.scores
    triplets = list(zip(pair.tolist(), predicate.tolist()))
    assert len(set(triplets)) == len(triplets)
    assert score.tolist() == sorted(score.tolist(), reverse=True)
    for (i, e), value in zip(triplets, score.tolist()):
        assert value == pytest.approx(float(probabilities[i, e] * pair_scores[i]))
    kept = []
    for k in ks:
        expected = rank_in_loops(probabilities, pair_scores, k, topk)
        # What an evaluation with k takes from the output: the k best of each pair, then the best.
        found, taken = [], {}
        for (i, _), value in zip(triplets, score.tolist()):
            if k is None or taken.setdefault(i, 0) < k:
                found.append(value)
                taken[i] = taken.get(i, 0) + 1
        assert found[:topk] == pytest.approx(expected)
        kept.append(len(expected))
    assert max(kept, default=0) <= len(triplets) <= sum(kept)


def instances(boxes, classes, training=True, scores=None):
    result = Instances((100, 120))
    result.set("proposal_boxes" if training else "pred_boxes", Boxes(boxes))
    result.set("gt_classes" if training else "pred_classes", classes)
    if training:  # the entities are the ground truth
        result.gt_index = torch.arange(len(classes))
    if scores is not None:
        result.scores = scores
    return result


def ground_truth(boxes, classes, relations):
    result = Instances((100, 120))
    result.gt_boxes, result.gt_classes = Boxes(boxes), classes
    return result, ground_truth_relations(relations, (100, 120))


def table_head(**kwargs):
    """A head with the semantic module alone, filled at random."""
    semantic = SemanticModule(CLASSES, PREDICATES)
    semantic.set_log_frequencies(
        torch.randn(CLASSES, CLASSES, PREDICATES + 1, generator=torch.Generator().manual_seed(0))
    )
    options = dict(overlap_filter=False, statistics_period=1)
    options.update(kwargs)
    mean = options.pop("l0_mean", "images")
    names = ("lambdas", "alphas", "normalization")
    contrastive = {name: options.pop(name) for name in names if name in options}
    return RelDNHead(
        num_classes=CLASSES,
        num_predicates=PREDICATES,
        in_features=[],
        predictor=RelDNPredictor(semantic=semantic),
        sampler=RelDNPairSampler(),
        losses={
            "PredicateLoss": PredicateLoss(mean=mean),
            "ContrastiveLosses": ContrastiveLosses(num_classes=CLASSES, **contrastive),
        },
        **options,
    )


# Per image: classes of the entities, which are the ground truth too, and their relations.
SCENES = [
    ([0, 1, 1, 2, 2], [(0, 1, 3), (0, 3, 1), (2, 3, 0), (4, 0, 2)]),
    ([2, 0, 0], [(1, 0, 1)]),
    ([], []),
    ([1, 1], []),
]


@pytest.mark.parametrize("l0_mean", ["images", "pairs"])
def test_relation_head_losses_equal_plain_loops(l0_mean):
    """L0 and both sides of L1-L3 on boxes that are ground truth and all of which are sampled."""
    num_pairs = sum(len(classes) * (len(classes) - 1) for classes, _ in SCENES)
    lambdas, alphas = (1.5, 0.5, 0.25), (0.2, 0.4, 0.6)
    head = table_head(lambdas=lambdas, alphas=alphas, l0_mean=l0_mean)
    entities, targets, rows, pairs_of, labels_of, sampled_of = [], [], [], [], [], []
    classes_of, image_of, l0, start = [], [], 0.0, 0
    for image, (classes, relations) in enumerate(SCENES):
        boxes = random_boxes(len(classes), seed=image)
        entities.append(instances(boxes, torch.tensor(classes, dtype=torch.int64)))
        targets.append(ground_truth(boxes, torch.tensor(classes, dtype=torch.int64), relations))
        labels = {(s, o): p for s, o, p in relations}
        pairs = [(i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j]
        for i, j in pairs:
            row = head.semantic.table.weight[classes[i] * CLASSES + classes[j]].double()
            log_probability = row.log_softmax(0)[labels.get((i, j), PREDICATES)]
            share = 1 / num_pairs if l0_mean == "pairs" else 1 / len(pairs) / len(SCENES)
            l0 = l0 - log_probability * share
            rows.append(row)
            labels_of.append([labels.get((i, j)) == e for e in range(PREDICATES)])
            pairs_of.append((start + i, start + j))
            is_subject, is_object = i in {r[0] for r in relations}, j in {r[1] for r in relations}
            sampled_of.append(((i, j) in labels or is_subject, (i, j) in labels or is_object))
        classes_of += classes
        image_of += [image] * len(classes)
        start += len(classes)
    pairs_of = torch.tensor(pairs_of)
    case = {
        "subjects": pairs_of[:, 0],
        "objects": pairs_of[:, 1],
        "labels": torch.tensor(labels_of),
        "classes": torch.tensor(classes_of),
        "sampled": torch.tensor(sampled_of).T,
        "anchor_image": torch.tensor(image_of),
        "num_images": len(SCENES),
    }
    expected = [x.item() for x in contrastive_in_loops(case, torch.stack(rows).detach(), alphas)]

    with EventStorage() as storage:
        losses = head({}, None, entities, targets)
    assert losses["loss_predicate"].item() == pytest.approx(l0.item(), abs=1e-6)
    for i, name in enumerate(("class_agnostic", "entity_class", "predicate_class")):
        assert expected[i] > 0
        wanted = lambdas[i] * expected[i]
        assert losses[f"loss_{name}"].item() == pytest.approx(wanted, abs=1e-6)
    numbers = {name: value for name, (value, _) in storage.latest().items()}
    assert numbers["reldn/num_positive_pairs"] == 5
    assert numbers["reldn/num_negative_pairs"] == 20 + 6 + 2 - 5
    assert 0 < numbers["reldn/affinity_negative"] < 1


@pytest.mark.parametrize("exponent", [0.25, 1.0, 2.0])
def test_relation_head_predictions_equal_plain_loops(exponent):
    options = {} if exponent == 1 else {"entity_score_exponent": exponent}
    head = table_head(topk=7, predicates_per_pair=(2,), pair_chunk=3, **options).eval()
    classes, scores = torch.tensor([0, 1, 1, 2]), torch.tensor([0.9, 0.8, 0.6, 0.5])
    boxes = random_boxes(4)
    triplets = []
    for i, j in itertools.permutations(range(4), 2):
        logits = head.semantic.table.weight[classes[i] * CLASSES + classes[j]]
        best = logits.softmax(0)[:-1].sort(descending=True)
        for p, e in zip(best.values[:2].tolist(), best.indices[:2].tolist()):
            pair_score = float(scores[i]) ** exponent * float(scores[j]) ** exponent
            triplets.append((pair_score * p, (i, j), e, p))
    triplets = sorted(triplets, reverse=True)[:7]
    entities = [
        instances(boxes, classes, False, scores),
        instances(boxes[:0], classes[:0], False, scores[:0]),
        instances(boxes[:1], classes[:1], False, scores[:1]),
    ]
    with torch.no_grad():
        found, *none = (x.relations for x in head({}, None, entities))
    assert found.scores.tolist() == pytest.approx([t[0] for t in triplets], rel=1e-5)
    # Cups 1 and 2 are of one class: where scores are equal the order is free.
    for (i, j), e, score, p in zip(
        found.pairs.tolist(),
        found.predicates.tolist(),
        found.scores.tolist(),
        found.predicate_scores.tolist(),
    ):
        assert any(
            t[1] == (i, j) and t[2] == e and abs(t[0] - score) + abs(t[3] - p) < 1e-5
            for t in triplets
        )
    assert found.image_size == (100, 120)
    assert [len(x) for x in none] == [0, 0] and none[0].pairs.shape == (0, 2)


def test_relation_head_overlap_filter_spares_given_boxes():
    head = table_head(overlap_filter=True, topk=100, predicates_per_pair=(None,)).eval()
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20], [50, 50, 60, 60]])
    entities = [instances(boxes, torch.tensor([0, 1, 2]), False, torch.ones(3))]
    with torch.no_grad():
        (detected,), (given,) = (head({}, None, entities, boxes_given=x) for x in (False, True))
    detected, given = detected.relations, given.relations
    assert {tuple(x) for x in detected.pairs.tolist()} == {(0, 1), (1, 0)}
    assert {tuple(x) for x in given.pairs.tolist()} == set(itertools.permutations(range(3), 2))


def test_relation_head_overlap_filter_keeps_ground_truth_pairs_in_training():
    """With and without the filter the losses of boxes that are the ground truth are equal."""
    boxes = torch.tensor([[20.0 * i, 0, 20 * i + 10, 10] for i in range(4)])  # none overlaps
    classes = torch.tensor([0, 1, 1, 2])
    losses = []
    for overlap_filter in (False, True):
        with EventStorage() as storage:
            head = table_head(overlap_filter=overlap_filter)
            target = ground_truth(boxes, classes, [(0, 1, 3), (2, 3, 0)])
            losses.append(head({}, None, [instances(boxes, classes)], [target]))
            numbers = {name: value for name, (value, _) in storage.latest().items()}
        assert numbers["reldn/num_positive_pairs"] == 2
        assert numbers["reldn/num_negative_pairs"] == 10
    assert losses[0] == losses[1] and losses[0]["loss_predicate"] > 0


def test_pair_logits_two_images_equal_sum_of_modules_per_pair():
    """Two images: subject and object come from the detector's maps, the union from the others."""
    head = small_model("MODEL.ROI_RELATION_HEAD.POOLER_RESOLUTION", 5).relation_head.eval()
    generator = torch.Generator().manual_seed(0)

    def maps():
        return {
            name: torch.randn((2, 8, 64 // stride, 96 // stride), generator=generator)
            for name, stride in (("p2", 4), ("p3", 8), ("p4", 16))
        }

    features, predicate_features = maps(), maps()
    head.semantic.set_log_frequencies(torch.randn(9, 9, 7, generator=generator))
    boxes = [random_boxes(3), random_boxes(2, seed=1)]
    classes = [torch.tensor([0, 4, 8]), torch.tensor([2, 2])]
    pairs = [(0, 1), (1, 0), (2, 1), (3, 4)]
    subjects, objects = torch.tensor(pairs).T
    with torch.no_grad():
        entities = head.encode_entities(
            features, [Boxes(x) for x in boxes], classes, [(64, 96), (50, 80)]
        )
        logits = head.pair_logits(entities, predicate_features, subjects, objects)
        for row, (i, j) in zip(logits, pairs):
            image, first = (0, 0) if i < 3 else (1, 3)
            s, o = boxes[image][i - first], boxes[image][j - first]
            union = torch.stack([*torch.minimum(s, o)[:2], *torch.maximum(s, o)[2:]])

            def vector(pooler, box_head, source, box, image=image):
                levels = [source[name][image : image + 1] for name in head.in_features]
                return box_head(pooler(levels, [Boxes(box[None])]))

            vectors = (
                vector(head.entity_pooler, head.subject_box_head, features, s),
                vector(head.predicate_pooler, head.predicate_box_head, predicate_features, union),
                vector(head.entity_pooler, head.object_box_head, features, o),
            )
            size = torch.tensor([[64.0, 96.0], [50.0, 80.0]])[image : image + 1]
            visual = head.visual
            expected = (
                head.semantic(classes[image][i - first, None], classes[image][j - first, None])
                + head.spatial(spatial_features(s[None], o[None], size))
                + visual.rest(visual.first(torch.cat(vectors, dim=1)))
                + visual.subject_skip(vectors[0])
                + visual.object_skip(vectors[2])
            )[0]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", [True, False])
def test_no_fc7_relu_switch_controls_the_last_relu(on):
    head = small_model("MODEL.ROI_RELATION_HEAD.NO_FC7_RELU", on).relation_head
    assert len(head.box_heads) == 3
    for box_head in head.box_heads:
        vectors = box_head(torch.randn(20, 8, 7, 7))
        assert bool((vectors < 0).any()) == on


def test_without_last_relu_other_last_layer_raises():
    with pytest.raises(ValueError, match="NO_FC7_RELU is on, but Sequential ends in Linear"):
        without_last_relu(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2)))


def test_relation_head_invalid_options_raise():
    with pytest.raises(ValueError, match="no module left.*SEMANTIC.ENABLED.*VISUAL.SPO"):
        RelDNPredictor()
    with pytest.raises(ValueError, match="HEAD.NAME is 'NoSuchHead'; known: .*RelDNHead.*--module"):
        build_relation_head(small_config("MODEL.ROI_RELATION_HEAD.NAME", "NoSuchHead"), {}, {})
    with pytest.raises(ValueError, match="LOSS.NORMALIZATION is 'mean'; known: paper, released"):
        table_head(normalization="mean")
    with pytest.raises(ValueError, match="LOSS.L0_MEAN is 'boxes'; known: images, pairs"):
        table_head(l0_mean="boxes")
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(
            ValueError, match=f"ENTITY_SCORE_EXPONENT is {wrong}; expected a finite"
        ):
            table_head(entity_score_exponent=wrong)
    for wrong in ((), (1, -1)):
        with pytest.raises(ValueError, match="PREDICATES_PER_PAIR"):
            table_head(predicates_per_pair=wrong)


def test_relation_head_zero_pair_chunk_raises():
    with pytest.raises(ValueError, match="PAIR_CHUNK is 0"):
        table_head(pair_chunk=0)
    with pytest.raises(ValueError, match="MAX_VISUAL_PAIRS is 0"):
        table_head(max_visual_pairs=0)


def test_relation_head_config_reaches_matching_and_sampling(monkeypatch):
    seen = {}

    def remember(name, function):
        def call(*args, **kwargs):
            seen[name] = kwargs
            return function(*args, **kwargs)

        monkeypatch.setattr(sampling_module, name, call)

    remember("match_pairs", sampling_module.match_pairs)
    remember("sample_pairs", sampling_module.sample_pairs)
    key = "MODEL.ROI_RELATION_HEAD"
    options = (
        *(f"{key}.OVERLAP_FILTER", False, "MODEL.RELDN.ENTITY_IOU_THRESHOLD", 0.625),
        *(f"{key}.SAMPLING.PAIRS", 11, f"{key}.SAMPLING.POSITIVE_PAIRS", 7),
        *(f"{key}.SAMPLING.ANCHOR_POSITIVE_PAIRS", 5, f"{key}.SAMPLING.ANCHOR_NEGATIVE_PAIRS", 3),
    )
    with EventStorage(0):
        small_model(*options).train()([busy_item()])
    assert seen["match_pairs"]["overlap_filter"] is False
    assert seen["match_pairs"]["iou_threshold"] == 0.625
    anchors = {"num_anchor_positive": 5, "num_anchor_negative": 3}
    limits = {"num_pairs": 11, "num_positive": 7, "generator": None}
    assert seen["sample_pairs"] == {**limits, **anchors}
    # Without L1 to L3 no pair is drawn for them.
    off = (x for i in (1, 2, 3) for x in (f"{key}.LOSS.LAMBDA_{i}", 0.0))
    with EventStorage(0):
        small_model(*options, *off).train()([busy_item()])
    none = {"num_anchor_positive": 0, "num_anchor_negative": 0}
    assert seen["sample_pairs"] == {**limits, **none}


def test_pair_logits_traced_equal_eager():
    """Under tracing both orders of a pair, which must be there, share a union box."""
    head = (
        small_model("MODEL.ROI_RELATION_HEAD.POOLER_RESOLUTION", 5)
        .relation_head.eval()
        .requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(0)
    maps = {
        name: torch.randn((1, 8, 64 // stride, 96 // stride), generator=generator)
        for name, stride in (("p2", 4), ("p3", 8), ("p4", 16))
    }
    subjects, objects = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 0, 1, 2])
    with torch.no_grad():
        classes = torch.tensor([0, 4, 8])
        entities = head.encode_entities(maps, [Boxes(random_boxes(3))], [classes], [(64, 96)])
        shared = head.pair_logits(entities, maps, subjects, objects)
        traced = torch.jit.trace(
            lambda *pair: head.pair_logits(entities, maps, *pair),
            (subjects, objects),
            check_trace=False,
        )
        own = traced(subjects, objects)
    torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-5)
