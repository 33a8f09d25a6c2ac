"""The config keys, errors that help, and every YAML of the repository."""

import pytest
from model_utils import CLASSES, PREDICATES, ROOT, small_config

import reldn_d2
from reldn_d2.modeling import RelDN

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

YAMLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


def new_config():
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    return cfg


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.ROI_RELATION_HEAD.LOSS.LAMBDA_4", "MODEL.ROI_RELATION_HEAD.LOSS.LAMBDA_1"),
        ("MODEL.ROI_RELATION_HEAD.NUM_PREDICATE", "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES"),
        ("MODEL.RELDN.TASK", "TEST.RELATIONS.TASK"),  # the right leaf under another node
        ("SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        ("MODEL.ROI_RELATION_HEADS.NUM_PREDICATES", "MODEL.ROI_RELATION_HEAD.NUM_PREDICATES"),
    ],
)
def test_unknown_key_names_its_source_and_the_nearest_key(tmp_path, key, nearest):
    yaml = tmp_path / "mine.yaml"
    text = ""
    for depth, part in enumerate(key.split(".")):
        text += f"{'  ' * depth}{part}:\n"
    yaml.write_text(text.rstrip("\n") + " 1\n")
    for source, arguments in ((str(yaml), (str(yaml), [])), ("command line", (None, [key, "1"]))):
        with pytest.raises(KeyError) as error:
            reldn_d2.merge_config(new_config(), *arguments)
        message = str(error.value)
        # In a file the first unknown part of the path is what is named.
        assert key in message or key.rsplit(".", 1)[0] in message
        assert nearest.rsplit(".", 1)[0] in message and "Did you mean" in message
        assert source in message
        if key.split(".")[1] != "ROI_RELATION_HEADS":
            assert nearest in message


def test_unknown_key_like_no_other_points_to_the_list():
    with pytest.raises(KeyError, match="XYZZY in the command line.*reldn_d2/config.py"):
        reldn_d2.merge_config(new_config(), None, ["XYZZY", "1"])


def test_key_without_a_value():
    with pytest.raises(ValueError, match="KEY VALUE pairs, but 'SEED' has no value"):
        reldn_d2.merge_config(new_config(), None, ["SOLVER.BASE_LR", "0.1", "SEED"])


def test_missing_file_is_named_the_base_of_a_file_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="No config file 'nowhere.yaml'"):
        reldn_d2.merge_config(new_config(), "nowhere.yaml")
    yaml = tmp_path / "mine.yaml"
    yaml.write_text('_BASE_: "Base-nowhere.yaml"\n')
    with pytest.raises(FileNotFoundError, match="Base-nowhere.yaml.*mine.yaml"):
        reldn_d2.merge_config(new_config(), str(yaml))


def test_value_of_another_type_is_refused():
    with pytest.raises(ValueError, match="SOLVER.BASE_LR"):
        reldn_d2.merge_config(new_config(), None, ["SOLVER.BASE_LR", "[1]"])


def test_options_override_the_file():
    cfg = new_config()
    file = str(ROOT / "configs/Toy/reldn.yaml")
    reldn_d2.merge_config(cfg, file, ["MODEL.ROI_RELATION_HEAD.LOSS.ALPHA_2", "0.5"])
    assert cfg.MODEL.ROI_RELATION_HEAD.LOSS.ALPHA_2 == 0.5
    assert cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES == len(PREDICATES)


def test_defaults_are_the_papers():
    cfg = new_config()
    head = cfg.MODEL.ROI_RELATION_HEAD
    assert (head.LOSS.LAMBDA_1, head.LOSS.LAMBDA_2, head.LOSS.LAMBDA_3) == (1.0, 0.5, 0.1)
    assert (head.LOSS.ALPHA_1, head.LOSS.ALPHA_2, head.LOSS.ALPHA_3) == (0.2, 0.2, 0.2)
    assert (head.SAMPLING.PAIRS, head.SAMPLING.POSITIVE_PAIRS) == (512, 128)
    assert cfg.TEST.RELATIONS.TOPK == 100 and cfg.TEST.DETECTIONS_PER_IMAGE == 100


def test_config_survives_being_dumped_and_loaded():
    cfg = small_config()
    again = new_config()
    again.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
    for ours in ("RELDN", "ROI_RELATION_HEAD"):
        assert again.MODEL[ours] == cfg.MODEL[ours]
    assert again.TEST == cfg.TEST


def test_every_config_is_found():
    assert {"configs/Toy/reldn.yaml", "configs/VRD/reldn_R_50_FPN.yaml"} <= set(YAMLS)


@pytest.mark.parametrize("yaml", YAMLS)
def test_config_merges_builds_and_fits_its_data_set(yaml):
    cfg = new_config()
    reldn_d2.merge_config(cfg, str(ROOT / yaml), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if isinstance(model, RelDN):
        assert any(p.requires_grad for p in model.relation_head.parameters())
        if not yaml.rsplit("/", 1)[-1].startswith("Base-"):
            assert cfg.MODEL.WEIGHTS, "RelDN starts from a detector"
    for name in names:
        metadata = MetadataCatalog.get(name)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(metadata.thing_classes)
        if isinstance(model, RelDN):
            assert cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES == len(metadata.predicate_classes)


def test_class_names_of_the_tests_are_the_toy_sets():
    metadata = MetadataCatalog.get("toy_vrd_train")
    assert list(metadata.thing_classes) == CLASSES
    assert list(metadata.predicate_classes) == PREDICATES
