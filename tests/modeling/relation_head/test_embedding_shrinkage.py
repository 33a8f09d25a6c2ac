"""Shrinkage of the joint module's embeddings at test time, and the counts that it needs."""

import pytest
import torch
from model_utils import (
    CLASSES,
    PREDICATES,
    busy_item,
    model_of,
    one_iteration_config,
    register_dataset,
    register_permuted_dataset,
    small_model,
    unregister_dataset,
)

from reldn_d2 import RelDNCheckpointer
from reldn_d2.engine import RelDNTrainer
from reldn_d2.export import RelDNExport
from reldn_d2.modeling.relation_head.joint import JointModule
from reldn_d2.predictor import RelationPredictor

from detectron2.data import DatasetCatalog

HEAD = "MODEL.ROI_RELATION_HEAD"
KEY = f"{HEAD}.JOINT.EMBEDDING_SHRINKAGE"
ON = (f"{HEAD}.JOINT.ENABLED", True)
SHRUNK = (*ON, KEY, 20.0)
ALONE = (
    *(*SHRUNK, f"{HEAD}.SEMANTIC.ENABLED", False, f"{HEAD}.SPATIAL.ENABLED", False),
    *(f"{HEAD}.VISUAL.SPO", False, f"{HEAD}.VISUAL.SUBJECT_SKIP", False),
    *(f"{HEAD}.VISUAL.OBJECT_SKIP", False),
)
SUBJECTS, OBJECTS = torch.tensor([0, 20, 1000, 5, 1]), torch.tensor([60, 3, 0, 2, 100])
NAMES = {"thing_classes": CLASSES, "predicate_classes": PREDICATES}
COUNTS = ("relation_head.joint.subject_relations", "relation_head.joint.object_relations")


def module(shrinkage):
    torch.manual_seed(0)
    joint = JointModule(5, 4, embedding_dim=3, hidden_dim=6, dropout=0.0, shrinkage=shrinkage)
    joint.set_counts(SUBJECTS, OBJECTS)
    return joint.eval()


def all_pairs():
    """Every subject class with every object class, and features of each pair."""
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    return (*pairs, torch.randn((25, 28), generator=torch.Generator().manual_seed(0)))


def test_joint_module_shrinkage_equals_shrunk_embeddings_in_loops():
    shrunk, plain, pairs = module(20.0), module(0.0), all_pairs()
    with torch.no_grad():
        for embedding, counts in (
            (plain.subject_embedding, SUBJECTS),
            (plain.object_embedding, OBJECTS),
        ):
            counts = counts.tolist()
            mean = sum(n * x for n, x in zip(counts, embedding.weight.clone())) / sum(counts)
            for index, n in enumerate(counts):
                embedding.weight[index] = (n * embedding.weight[index] + 20 * mean) / (n + 20)
        torch.testing.assert_close(shrunk(*pairs), plain(*pairs))
        assert not torch.equal(shrunk(*pairs), module(0.0)(*pairs))


def test_joint_module_shrinkage_class_without_relations_is_like_any_other_such_class():
    joint = module(20.0)
    joint.set_counts(torch.tensor([0, 20, 0, 5, 1]), OBJECTS)
    subjects, objects, features = torch.tensor([0, 2, 1]), torch.ones(3).long(), torch.ones(3, 28)
    logits = joint(subjects, objects, features)
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_joint_module_shrinkage_leaves_training_and_frequent_classes_alone():
    pairs = all_pairs()
    assert torch.equal(module(20.0).train()(*pairs), module(0.0).train()(*pairs))
    frequent = module(20.0)
    frequent.set_counts(*[torch.full((5,), 10**9)] * 2)
    torch.testing.assert_close(frequent(*pairs), module(0.0)(*pairs))


def test_joint_module_shrinkage_half_precision_many_relations_is_finite():
    """100,000 relations are beyond the range of half precision."""
    joint = module(20.0)
    joint.set_counts(*[torch.full((5,), 100_000)] * 2)
    embedded = joint.half().embed(joint.subject_embedding, joint.subject_relations, SUBJECTS[:1])
    assert embedded.dtype == torch.float16 and bool(embedded.isfinite().all())


def test_joint_module_wrong_number_of_counts_raises():
    with pytest.raises(ValueError, match="relations of 4 classes, but the model has 5"):
        module(0.0).set_counts(SUBJECTS[:4], OBJECTS)


@pytest.mark.filterwarnings("ignore")  # tracing warns of each size that it fixes
def test_export_shrunk_equals_the_model_and_needs_counts():
    model = small_model(*SHRUNK, f"{HEAD}.OVERLAP_FILTER", True).eval()
    with pytest.raises(ValueError, match=f"{KEY} is 20, but this model does not say how many"):
        RelDNExport(model)
    count = len(CLASSES)
    model.relation_head.joint.set_counts(torch.arange(count), torch.arange(count).flip(0))
    image = busy_item()["image"]
    with torch.no_grad():
        outputs = torch.jit.trace(RelDNExport(model), (image,), check_trace=False)(image)
        expected = model.inference([{"image": image}], do_postprocess=False)[0]["relations"]
        model.relation_head.joint.shrinkage = 0.0
        plain = model.inference([{"image": image}], do_postprocess=False)[0]["relations"]
    assert torch.equal(outputs[3], expected.pairs)
    torch.testing.assert_close(outputs[5], expected.scores, rtol=0, atol=1e-6)
    assert not torch.equal(plain.scores, expected.scores)


def test_predict_shrunk_unknown_counts_raise():
    model = small_model(*SHRUNK).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=f"{KEY} is 20, but this model does not"):
        model([busy_item()])


# ---------------------------------------------------------------------------- counts in checkpoints


@pytest.fixture
def dataset(tmp_path):
    register_dataset("shrinkage_set", tmp_path / "images")
    yield "shrinkage_set"
    unregister_dataset("shrinkage_set")


def config(name, folder, *more):
    return one_iteration_config(name, folder, *SHRUNK, *more)


def trained(name, folder, *more):
    """Return a trainer whose model has its counts, before the first iteration."""
    trainer = RelDNTrainer(config(name, folder, *more))
    trainer.resume_or_load(resume=False)
    return trainer


def counts_of(model):
    return [model.state_dict()[name].tolist() for name in COUNTS]


def counts_in_loops(name):
    """Relations of each class as a subject and as an object, from the annotations."""
    subjects, objects = [0] * len(CLASSES), [0] * len(CLASSES)
    for record in DatasetCatalog.get(name):
        classes = [x["category_id"] for x in record["annotations"]]
        for subject, object_, _ in record["relations"]:
            subjects[classes[subject]] += 1
            objects[classes[object_]] += 1
    return [subjects, objects]


def test_training_counts_the_relations_of_classes_and_resumes_with_them(dataset, tmp_path):
    trainer, counted = trained(dataset, tmp_path), counts_in_loops(dataset)
    assert counts_of(trainer.model) == counted and sum(counted[0]) == sum(counted[1]) > 0
    assert counted[0] != counted[1]
    trainer.train()
    path = str(tmp_path / "model_final.pth")
    content = torch.load(path, weights_only=True)
    for name in COUNTS:
        content["model"][name][:] = torch.arange(len(CLASSES))
    torch.save(content, path)
    resumed = RelDNTrainer(config(dataset, tmp_path))
    resumed.resume_or_load(resume=True)
    assert counts_of(resumed.model) == [list(range(len(CLASSES)))] * 2
    tuned = trained(dataset, tmp_path / "new", "MODEL.WEIGHTS", path)
    assert counts_of(tuned.model) == counted


def test_training_class_counts_have_the_order_of_the_checkpoint(dataset, tmp_path):
    trained(dataset, tmp_path).checkpointer.save("mine")
    register_permuted_dataset("shrinkage_permuted", dataset)
    try:
        weights = ("MODEL.WEIGHTS", str(tmp_path / "mine.pth"))
        tuned = trained("shrinkage_permuted", tmp_path / "new", *weights)
        assert counts_of(tuned.model) == counts_in_loops(dataset)
    finally:
        unregister_dataset("shrinkage_permuted")


def test_old_checkpoint_takes_the_class_counts_of_its_statistics(dataset, tmp_path):
    trained(dataset, tmp_path).checkpointer.save("old")
    path = str(tmp_path / "old.pth")
    content = torch.load(path, weights_only=True)
    for name in COUNTS:
        del content["model"][name]
    torch.save(content, path)
    predictor = RelationPredictor.from_checkpoint(path, "cpu")
    assert counts_of(predictor.model) == counts_in_loops(dataset)
    del content["reldn"]["statistics"]
    torch.save(content, path)
    off = RelationPredictor.from_checkpoint(path, "cpu", opts=[KEY, 0.0])
    assert counts_of(off.model) == [[0] * len(CLASSES)] * 2
    with pytest.raises(ValueError, match=rf"{KEY} is 20, but {path} does not say how many"):
        RelationPredictor.from_checkpoint(path, "cpu")
    with pytest.raises(ValueError, match=rf"{KEY} is 20, but the checkpoint {path} does not"):
        options = ("MODEL.WEIGHTS", path, "DATASETS.TEST", (dataset,))
        RelDNTrainer.evaluate_checkpoint(config(dataset, tmp_path, *options))
    # A run that continues from it counts them.
    (tmp_path / "last_checkpoint").write_text("old.pth")
    resumed = RelDNTrainer(config(dataset, tmp_path))
    resumed.resume_or_load(resume=True)
    assert counts_of(resumed.model) == counts_in_loops(dataset)


def test_load_other_classes_forgets_the_class_counts(tmp_path):
    source = model_of("precomputed", *ALONE)
    source.relation_head.joint.set_counts(*[torch.ones(len(CLASSES))] * 2)
    RelDNCheckpointer(source, str(tmp_path), **NAMES).save("mine")
    for classes, known in ((CLASSES, True), ([*CLASSES[1:], "other"], False)):
        model = model_of("precomputed", *ALONE)
        names = {**NAMES, "thing_classes": classes}
        RelDNCheckpointer(model, matching_only=True, **names).load(str(tmp_path / "mine.pth"))
        assert model.relation_head.joint.counts_known == known


def test_vrd_boxes_has_its_class_counts():
    joint = RelationPredictor.from_pretrained("vrd_boxes", device="cpu").model.relation_head.joint
    assert joint.shrinkage == 20 and joint.counts_known
    assert int(joint.subject_relations.sum()) == int(joint.object_relations.sum()) > 25_000
