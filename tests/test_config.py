"""The config keys, helpful errors, and every YAML of the repository."""

import re
import shlex

import pytest
import torch
from model_utils import CLASSES, PREDICATES, ROOT, small_config

import reldn_d2
from reldn_d2 import config
from reldn_d2.config import UnknownKeyError
from reldn_d2.modeling import RelDN
from reldn_d2.modeling.losses.contrastive import NORMALIZATIONS

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

YAMLS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


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
def test_merge_config_unknown_key_names_its_source_and_similar_keys(tmp_path, key, nearest):
    yaml = tmp_path / "mine.yaml"
    text = ""
    for depth, part in enumerate(key.split(".")):
        text += f"{'  ' * depth}{part}:\n"
    yaml.write_text(text.rstrip("\n") + " 1\n")
    for source, arguments in ((str(yaml), (str(yaml), [])), ("command line", (None, [key, "1"]))):
        with pytest.raises(UnknownKeyError) as error:
            reldn_d2.merge_config(reldn_d2.load_config(), *arguments)
        message = str(error.value)
        # For a file, the message names the first unknown part of the path.
        assert key in message or key.rsplit(".", 1)[0] in message
        assert nearest.rsplit(".", 1)[0] in message and "Did you mean" in message
        assert source in message
        if key.split(".")[1] != "ROI_RELATION_HEADS":
            assert nearest in message


def test_merge_config_key_unlike_any_other_points_to_the_list():
    with pytest.raises(UnknownKeyError, match="XYZZY in the command line.*reldn_d2/config.py"):
        reldn_d2.merge_config(reldn_d2.load_config(), None, ["XYZZY", "1"])


def test_merge_config_key_without_value_raises():
    with pytest.raises(ValueError, match="KEY VALUE pairs, but 'SEED' has no value"):
        reldn_d2.merge_config(reldn_d2.load_config(), None, ["SOLVER.BASE_LR", "0.1", "SEED"])
    message = "'MODEL.DEVICE=cpu' has no value; write MODEL.DEVICE cpu, without =$"
    for opts in (["MODEL.DEVICE=cpu"], ["SEED", "1", "MODEL.DEVICE=cpu", "SOLVER.BASE_LR=0.1"]):
        with pytest.raises(ValueError, match=message):
            reldn_d2.merge_config(reldn_d2.load_config(), None, opts)


def test_merge_config_missing_file_or_base_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="No config file 'nowhere.yaml'"):
        reldn_d2.merge_config(reldn_d2.load_config(), "nowhere.yaml")
    yaml = tmp_path / "mine.yaml"
    yaml.write_text('_BASE_: "Base-nowhere.yaml"\n')
    with pytest.raises(FileNotFoundError, match="Base-nowhere.yaml.*mine.yaml"):
        reldn_d2.merge_config(reldn_d2.load_config(), str(yaml))


def test_merge_config_value_of_another_type_raises():
    with pytest.raises(ValueError, match="SOLVER.BASE_LR"):
        reldn_d2.merge_config(reldn_d2.load_config(), None, ["SOLVER.BASE_LR", "[1]"])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.ROI_RELATION_HEAD.LOSS.NAMES", "MyLoss", "a list, .*: \"\\['MyLoss'\\]\""),
        ("MODEL.ROI_RELATION_HEAD.LOSS.NAMES", "[A, B]", "a list, .*: \"\\['A', 'B'\\]\""),
        ("TEST.RELATIONS.GROUP_THRESHOLDS", "100", r'a list, .*: "\[100\]"'),
        ("DATASETS.TEST", "vrd_test", "a list, .*: \"\\['vrd_test'\\]\""),
        ("SOLVER.BASE_LR", "fast", "a number, such as 0.00"),
        ("SOLVER.MAX_ITER", "1000.5", "an integer, such as 40000"),
        ("TEST.RELATIONS.TASK", "3", "text, in quotes: \"'3'\""),
        ("MODEL.RELDN.LOAD.MATCHING_ONLY", "yes", "True or False"),
    ],
)
def test_merge_config_value_of_another_type_names_key_value_and_form(key, value, expected):
    message = f"^{key} is '{re.escape(value)}' in the command line; expected {expected}"
    with pytest.raises(ValueError, match=message) as error:
        reldn_d2.load_config(None, [key, value])
    assert "\n" not in str(error.value)


def test_merge_config_value_of_another_type_in_a_file_names_the_file(tmp_path):
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("SOLVER:\n  BASE_LR: 1\n")
    message = f"SOLVER.BASE_LR is '1' in {yaml}; expected a number with a decimal point: 1.0"
    with pytest.raises(ValueError, match=message):
        reldn_d2.load_config(str(yaml))


def test_load_config_options_as_a_dict_are_read_and_text_raises():
    cfg = reldn_d2.load_config(None, {"SEED": 3, "SOLVER.BASE_LR": 1})
    assert cfg.SEED == 3 and cfg.SOLVER.BASE_LR == 1.0
    for opts in ("SEED 3", [3, "SEED"], [("SEED", 3)]):
        with pytest.raises(ValueError, match="^opts is .*; expected .key, value, key, value, ..."):
            reldn_d2.load_config(None, opts)


def test_merge_config_options_override_the_file():
    cfg = reldn_d2.load_config()
    file = str(ROOT / "configs/Toy/reldn.yaml")
    reldn_d2.merge_config(cfg, file, ["MODEL.ROI_RELATION_HEAD.LOSS.ALPHA_2", "0.5"])
    assert cfg.MODEL.ROI_RELATION_HEAD.LOSS.ALPHA_2 == 0.5
    assert cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES == len(PREDICATES)


def test_add_reldn_config_defaults_are_the_papers():
    cfg = reldn_d2.load_config()
    head = cfg.MODEL.ROI_RELATION_HEAD
    assert (head.LOSS.LAMBDA_1, head.LOSS.LAMBDA_2, head.LOSS.LAMBDA_3) == (1.0, 0.5, 0.1)
    assert (head.LOSS.ALPHA_1, head.LOSS.ALPHA_2, head.LOSS.ALPHA_3) == (0.2, 0.2, 0.2)
    assert (head.SAMPLING.PAIRS, head.SAMPLING.POSITIVE_PAIRS) == (512, 128)
    assert cfg.TEST.RELATIONS.TOPK == 100 and cfg.TEST.DETECTIONS_PER_IMAGE == 100


def test_config_dump_roundtrip():
    cfg = small_config()
    again = reldn_d2.load_config()
    again.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
    for ours in ("RELDN", "ROI_RELATION_HEAD"):
        assert again.MODEL[ours] == cfg.MODEL[ours]
    assert again.TEST == cfg.TEST


LIMITS = "TEST.RELATIONS.PREDICATES_PER_PAIR"


def test_merge_config_predicates_per_pair_zero_means_no_limit_and_warns_once(tmp_path, caplog):
    config._warn_about_zero.cache_clear()
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("TEST: {RELATIONS: {PREDICATES_PER_PAIR: [1, 0]}}\n")
    for arguments in ((str(yaml),), (None, [LIMITS, "[1, 0]"]), (None, [LIMITS, [1, 0]])):
        cfg = reldn_d2.load_config(*arguments)
        assert cfg.TEST.RELATIONS.PREDICATES_PER_PAIR == [1, None]
    (record,) = (x for x in caplog.records if x.name == "reldn_d2.config")
    assert "has the value 0, which is read as None" in record.getMessage()


@pytest.mark.parametrize("text", ["[2, None]", "[2, null]"])
def test_merge_config_predicates_per_pair_none_in_yaml(tmp_path, caplog, text):
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(f"TEST: {{RELATIONS: {{PREDICATES_PER_PAIR: {text}}}}}\n")
    cfg = reldn_d2.load_config(str(yaml))
    assert cfg.TEST.RELATIONS.PREDICATES_PER_PAIR == [2, None]
    assert not [x for x in caplog.records if x.name == "reldn_d2.config"]
    again = reldn_d2.load_config()
    again.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
    assert again.TEST == cfg.TEST


@pytest.mark.parametrize("value", ["[-1]", "[1.5]", "['all']", "[True]"])
def test_merge_config_predicates_per_pair_other_values_raises(value):
    with pytest.raises(ValueError, match="PREDICATES_PER_PAIR has the value .* positive integers"):
        reldn_d2.load_config(None, [LIMITS, value])


def test_configs_folder_has_yamls():
    assert {"configs/Toy/reldn.yaml", "configs/VRD/reldn_R_50_FPN.yaml"} <= set(YAMLS)


def merged(yaml, *options):
    return reldn_d2.load_config(str(ROOT / yaml), options)


@pytest.mark.parametrize("yaml", YAMLS)
def test_yaml_builds_a_model_that_fits_its_data_set(yaml):
    cfg = merged(yaml, "MODEL.DEVICE", "meta")  # the structure alone: no memory, no time
    with torch.device("meta"):
        model = build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    if isinstance(model, RelDN):
        parts = ("relation_head.spatial", "relation_head.joint", "relation_head.visual")
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        has_modules = any(n.startswith(parts) for n in trained)
        assert has_modules != cfg.MODEL.ROI_RELATION_HEAD.SEMANTIC.FREEZE
        if not yaml.rsplit("/", 1)[-1].startswith("Base-") and "precomputed" not in yaml:
            starts_from_detector = model.detector.reads_images
            assert bool(cfg.MODEL.WEIGHTS) == starts_from_detector == ("boxes" not in yaml)
        for box_head in model.relation_head.box_heads:  # of the detector's kind
            assert model.detector.box_head is None or type(box_head) is type(
                model.detector.box_head
            )
    num_classes = cfg.MODEL["RETINANET" if "retinanet" in yaml else "ROI_HEADS"].NUM_CLASSES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if metadata.get("thing_classes") is not None:
            assert num_classes == len(metadata.thing_classes)
            if isinstance(model, RelDN):
                predicates = metadata.predicate_classes
                assert cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES == len(predicates)


OWN = ("Toy", "small", "boxes")  # experiments of this project, not the released ones


@pytest.mark.parametrize("yaml", [x for x in YAMLS if not any(word in x for word in OWN)])
def test_yaml_released_schedule_rescales_to_any_gpu_count(yaml):
    solver = merged(yaml).SOLVER
    assert solver.REFERENCE_WORLD_SIZE == solver.IMS_PER_BATCH == 8
    assert (solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.01, 0.9, 1e-4)
    assert (solver.BACKBONE_MULTIPLIER, solver.BIAS_LR_FACTOR) == (0.1, 2.0)
    assert solver.WEIGHT_DECAY_BIAS == 0.0 and solver.WARMUP_ITERS == 500
    one = DefaultTrainer.auto_scale_workers(merged(yaml), 1).SOLVER
    assert (one.IMS_PER_BATCH, one.MAX_ITER) == (1, 8 * solver.MAX_ITER)


def test_yaml_released_hyperparameters():
    full, mini = (
        merged(f"configs/OpenImages/{prefix}reldn_X_101_64x4d_FPN.yaml") for prefix in ("", "mini_")
    )
    assert (full.SOLVER.MAX_ITER, full.SOLVER.STEPS) == (80930, (53954, 71937))
    assert (mini.SOLVER.MAX_ITER, mini.SOLVER.STEPS) == (6750, (4500, 6000))
    assert full.MODEL.RESNETS.STRIDE_IN_1X1 is False and full.MODEL.RESNETS.NUM_GROUPS == 64
    vg = merged("configs/VG/reldn_VGG16.yaml")
    assert (vg.SOLVER.MAX_ITER, vg.SOLVER.STEPS) == (62723, (41815, 55754))
    assert not vg.MODEL.ROI_RELATION_HEAD.SPATIAL.ENABLED
    assert vg.MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64, 128, 256, 512]]
    vrd = merged("configs/VRD/reldn_VGG16_COCO.yaml")
    assert (vrd.SOLVER.MAX_ITER, vrd.SOLVER.STEPS) == (7560, (5040, 6720))
    for cfg in (full, mini, vg, vrd):
        assert cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER
        assert cfg.INPUT.MIN_SIZE_TRAIN == (800,) and cfg.INPUT.MAX_SIZE_TRAIN == 1333
        model, is_vgg = cfg.MODEL, cfg.MODEL.BACKBONE.NAME == "build_vgg16_backbone"
        assert model.RPN.POST_NMS_TOPK_TRAIN == 2000
        assert model.RPN.PRE_NMS_TOPK_TRAIN == (12000 if is_vgg else 2000)
        for head in (model.ROI_BOX_HEAD, model.ROI_RELATION_HEAD):
            assert (head.POOLER_RESOLUTION or 7) == 7
            assert head.POOLER_SAMPLING_RATIO == (0 if is_vgg else 2)
            assert head.POOLER_TYPE == "ROIAlignV2"
        assert model.ROI_RELATION_HEAD.FC6_DROPOUT == 0.5


def test_docs_options_for_the_released_behavior_are_accepted():
    """The last column of the table in docs/training.md, as typed in a shell."""
    text = (ROOT / "docs/training.md").read_text().partition("## Differences from the released")[2]
    rows = [line.split("|")[4] for line in text.splitlines() if line.startswith("| ")]
    commands = [x for row in rows for x in re.findall(r"`([A-Z][\w.]+ [^`]+)`", row)]
    assert len(commands) == 13
    cfg = merged("configs/OpenImages/mini_reldn_X_101_64x4d_FPN.yaml")
    before = cfg.clone()
    for command in commands:
        key, value = shlex.split(command)
        reldn_d2.merge_config(cfg, None, [key, value])
    assert cfg.MODEL.ROI_RELATION_HEAD.SEMANTIC.COUNT_DATASETS == ("openimages_vrd_train",)
    assert set(cfg.DATASETS.TRAIN) <= set(DatasetCatalog.list())
    assert cfg.MODEL.ROI_RELATION_HEAD.LOSS.NORMALIZATION in NORMALIZATIONS
    assert cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0.5 != before.MODEL.ANCHOR_GENERATOR.OFFSET
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        build_model(cfg)


def test_yaml_overlap_filter_is_on_in_released_experiments_only():
    """Own datasets start from the default or from configs/Base-*.yaml."""
    assert not reldn_d2.load_config().MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER
    for yaml in YAMLS:
        cfg = merged(yaml)
        released = yaml.startswith(("configs/OpenImages", "configs/VG", "configs/VRD"))
        # Not in the baseline of all pairs, and not where scoring all pairs costs nothing.
        expected = released and "freq_VGG16" not in yaml and "boxes" not in yaml
        assert cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER == expected, yaml


def test_yaml_ablations_differ_in_one_setting_only():
    base = merged("configs/OpenImages/mini_reldn_X_101_64x4d_FPN.yaml")
    for yaml in (x for x in YAMLS if "Ablations" in x):
        cfg = merged(yaml)
        assert cfg.MODEL.ROI_RELATION_HEAD != base.MODEL.ROI_RELATION_HEAD
        cfg.MODEL.ROI_RELATION_HEAD = base.MODEL.ROI_RELATION_HEAD
        cfg.OUTPUT_DIR = base.OUTPUT_DIR
        assert cfg == base


def test_model_utils_names_are_the_toy_sets():
    metadata = MetadataCatalog.get("toy_vrd_train")
    assert list(metadata.thing_classes) == CLASSES
    assert list(metadata.predicate_classes) == PREDICATES
