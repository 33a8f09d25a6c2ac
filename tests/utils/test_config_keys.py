"""Config keys of the user's modules: in every config, and in those of checkpoints."""

import draw_saliency
import export_model
import pack_checkpoint
import pytest
from PIL import Image
from usage_utils import picture, write_checkpoint

import demo
import reldn_d2
from reldn_d2.config import ConfigKeyError, UnknownKeyError, merge_config
from reldn_d2.predictor import RelationPredictor, read_description
from reldn_d2.utils.config_keys import CONFIG_HOOKS, key_owners
from reldn_d2.utils.user_modules import import_modules

from detectron2.config import CfgNode

pytestmark = pytest.mark.usefixtures("own_registrations")

MODULE = """
from detectron2.config import CfgNode as CN
from reldn_d2 import register_config_keys


@register_config_keys
def add_my_keys(cfg):
    cfg.MODEL.MY_HEAD = CN()
    cfg.MODEL.MY_HEAD.LAYERS = cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES - 7
    cfg.MODEL.ROI_RELATION_HEAD.MY_RATE = 0.5
"""
KEYS = ["MODEL.MY_HEAD", "MODEL.MY_HEAD.LAYERS", "MODEL.ROI_RELATION_HEAD.MY_RATE"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_keys_file.py").write_text(MODULE)
    return tmp_path / "my_keys_file.py"


@pytest.fixture
def checkpoint_with_keys(module, tmp_path):
    """A checkpoint whose config has the module's keys, written as if in another process."""
    from registrations import restored_registries

    with restored_registries():
        import_modules(["my_keys_file.py"])
        return write_checkpoint(tmp_path, "MODEL.MY_HEAD.LAYERS", 5)


def test_registered_keys_are_in_every_config_and_can_be_set(module, tmp_path):
    before = reldn_d2.load_config()
    assert "MY_HEAD" not in before.MODEL
    import_modules(["my_keys_file.py"])
    cfg = reldn_d2.load_config()
    assert cfg.MODEL.MY_HEAD.LAYERS == 2 and cfg.MODEL.ROI_RELATION_HEAD.MY_RATE == 0.5
    assert key_owners(cfg) == dict.fromkeys(KEYS, "my_keys_file.add_my_keys")
    (tmp_path / "mine.yaml").write_text("MODEL:\n  MY_HEAD:\n    LAYERS: 4\n")
    cfg = reldn_d2.load_config("mine.yaml", ["MODEL.ROI_RELATION_HEAD.MY_RATE", "0"])
    assert cfg.MODEL.MY_HEAD.LAYERS == 4 and cfg.MODEL.ROI_RELATION_HEAD.MY_RATE == 0.0
    assert type(cfg.MODEL.MY_HEAD) is type(cfg.MODEL.RELDN) is CfgNode


@pytest.mark.parametrize(
    ("statement", "key"),
    [
        ("cfg.MODEL.ROI_RELATION_HEAD.POOLER_TYPE = 'ROIAlignV2'", "POOLER_TYPE"),  # as it was
        ("cfg.MODEL.RELDN = type(cfg)()", "MODEL.RELDN"),
        ("cfg['SEED'] = 3", "SEED"),
        ("cfg.DATASETS.TEST += ('mine',)", "DATASETS.TEST"),
        ("cfg.MODEL.ROI_HEADS.IN_FEATURES.append('p7')", "MODEL.ROI_HEADS.IN_FEATURES"),
    ],
)
def test_register_config_keys_existing_key_raises(module, statement, key):
    module.write_text(
        MODULE.replace("cfg.MODEL.MY_HEAD = CN()", f"cfg.MODEL.MY_HEAD = CN(); {statement}")
    )
    import_modules(["my_keys_file.py"])
    with pytest.raises(ConfigKeyError, match=f"{key}, which exists already .from Detectron2") as e:
        reldn_d2.load_config()
    assert str(e.value).startswith(f"{module}, line 6: my_keys_file.add_my_keys sets ")


def test_register_config_keys_two_modules_one_key_raises(module, tmp_path):
    (tmp_path / "my_other_keys.py").write_text(MODULE)
    import_modules(["my_keys_file.py", "my_other_keys.py"])
    with pytest.raises(ConfigKeyError, match="my_other_keys.add_my_keys sets MODEL.MY_HEAD, which"):
        reldn_d2.load_config()
    with pytest.raises(ConfigKeyError, match="already .from my_keys_file.add_my_keys.. Choose"):
        reldn_d2.load_config()


@pytest.mark.parametrize("statement", ["cfg.MODEL.MY_HEAD = {1, 2}", "cfg.MY.LAYERS = 2"])
def test_register_config_keys_function_raises_names_its_line(module, statement):
    module.write_text(MODULE.replace("cfg.MODEL.MY_HEAD = CN()", statement))
    import_modules(["my_keys_file.py"])
    with pytest.raises(ConfigKeyError, match=f"^{module}, line 8: my_keys_file.add_my_keys, which"):
        reldn_d2.load_config()


def test_register_config_keys_again_replaces():
    for layers in (1, 2):
        namespace = {"__name__": "my_notebook"}
        exec(MODULE.replace(" - 7", f" - 9 + {layers}"), namespace)
    assert list(CONFIG_HOOKS) == ["my_notebook.add_my_keys"]
    assert reldn_d2.load_config().MODEL.MY_HEAD.LAYERS == 2


def test_merge_config_unknown_key_tells_of_module():
    with pytest.raises(UnknownKeyError, match="MY_RATE in the command line.*Pass --module to imp"):
        merge_config(reldn_d2.load_config(), None, ["MODEL.ROI_RELATION_HEAD.MY_RATE", "1"])
    with pytest.raises(ValueError, match="--module comes after a KEY VALUE pair; write it before"):
        merge_config(reldn_d2.load_config(), None, ["SEED", "1", "--module", "m.py", "--resume"])


def test_from_checkpoint_unregistered_keys_raise(checkpoint_with_keys):
    with pytest.raises(UnknownKeyError) as caught:
        RelationPredictor.from_checkpoint(checkpoint_with_keys, "cpu")
    assert str(caught.value) == (
        f"{checkpoint_with_keys}: its config has keys that are not registered: MODEL.MY_HEAD, "
        "MODEL.ROI_RELATION_HEAD.MY_RATE. Import the module that registers them (by "
        "my_keys_file.add_my_keys when it was written): --module on the command line, import in "
        "Python."
    )


def test_from_checkpoint_registered_keys_have_its_values(checkpoint_with_keys):
    import_modules(["my_keys_file.py"])
    predictor = RelationPredictor.from_checkpoint(checkpoint_with_keys, "cpu")
    assert predictor.cfg.MODEL.MY_HEAD.LAYERS == 5
    assert len(predictor(picture()).triplets()) > 0


def test_from_checkpoint_without_own_keys_stores_none(tmp_path):
    path = write_checkpoint(tmp_path)
    assert "config_keys" not in read_description(str(path))


def test_from_checkpoint_value_of_another_type_names_the_file(checkpoint_with_keys, module):
    module.write_text(MODULE.replace("0.5", "'high'"))
    import_modules(["my_keys_file.py"])
    with pytest.raises(
        ValueError,
        match=f"^{checkpoint_with_keys}: MODEL.*MY_RATE is '0.5' in its config; expected text",
    ):
        RelationPredictor.from_checkpoint(checkpoint_with_keys, "cpu")


# ----------------------------------------------------------------------------------- the programs


@pytest.fixture
def programs(checkpoint_with_keys, tmp_path):
    """Name of each program that reads a checkpoint: its main function and arguments."""
    Image.fromarray(picture()).save(tmp_path / "street.png")
    model = ["--checkpoint", str(checkpoint_with_keys)]
    return {
        "demo.py": (demo.main, [*model, "--input", "street.png", "--output", "out"]),
        "draw_saliency.py": (
            draw_saliency.main,
            [*model, "--input", "street.png", "--output", "drawn"],
        ),
        "export_model.py": (
            export_model.main,
            [*model, "--image", "street.png", "--output", "reldn.ts"],
        ),
        "pack_checkpoint.py": (pack_checkpoint.main, [*model, "--output", "packed.pth.xz"]),
    }


@pytest.mark.parametrize(
    "name", ["demo.py", "draw_saliency.py", "export_model.py", "pack_checkpoint.py"]
)
def test_programs_read_the_checkpoint_with_module_alone(programs, name, capsys):
    main, arguments = programs[name]
    assert main(arguments) == 1
    assert "keys that are not registered: MODEL.MY_HEAD, " in capsys.readouterr().err
    assert main([*arguments, "--module", "my_keys_file.py"]) == 0
    if name == "pack_checkpoint.py":
        packed = read_description("packed.pth.xz")
        assert packed["config_keys"] == dict.fromkeys(KEYS, "my_keys_file.add_my_keys")
