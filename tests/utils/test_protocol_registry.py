"""Protocols of the user: their rules are checked, and every option that names one finds it."""

import json
from dataclasses import replace

import draw_relations
import evaluate_relations
import make_gallery
import numpy as np
import pytest
from evaluation_data import NAME, registered, run
from PIL import Image

import reldn_d2
from reldn_d2.evaluation import RelationDatasetEvaluator, build_relation_evaluator
from reldn_d2.utils.protocols import (
    PROTOCOL_REGISTRY,
    Protocol,
    all_predicates_per_pair,
    find_protocol,
    kept_predicates_per_pair,
    predicates_per_pair,
)

pytestmark = pytest.mark.usefixtures("own_registrations")

MODULE = """
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY, Protocol


def first_hits(matches, settings):
    found = matches.ranks["relationship"] == 0
    return {"top-1 hits": found.sum(), "relations": len(found)}


PROTOCOL_REGISTRY.register(
    Protocol(name="mine", evaluator_type="my_type", predicates_per_pair=[3], metrics=first_hits)
)
"""


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "my/protocol", "'my/protocol': the name may have letters, digits and underscores"),
        ("name", "", "letters, digits and underscores"),
        ("evaluator_type", 3, "evaluator_type is 3; expected a string or None"),
        ("matching", "one_to_many", "matching is 'one_to_many'; expected one of one_to_one, many_"),
        ("recall_overlaps", ("phrase",), r"recall_overlaps is \('phrase',\); expected \(\"relati"),
        ("precision_overlaps", ("relationship", "mask"), "precision_overlaps is .*'mask'"),
        ("recall_overlaps", "relationship", "recall_overlaps is 'relationship'; expected"),
        ("predicates_per_pair", (), "predicates_per_pair is .*positive integers, or None"),
        ("predicates_per_pair", (0,), "predicates_per_pair is .0,.; expected positive integers"),
        ("predicates_per_pair", ([1],), "predicates_per_pair is "),
        ("predicates_per_pair", 1, "predicates_per_pair is 1"),
        ("recall_at", (50, 50), "recall_at is .50, 50.; expected positive integers"),
        ("recall_at", (True,), "recall_at is .True,."),
        ("verified_labels", "codes", 'verified_labels is \'codes\'; expected "code", "text" or'),
        ("zero_shot", "yes", "zero_shot is 'yes'; expected True or False"),
        ("metrics", "motif", "metrics is 'motif'; expected a function, or one of lu2016, motifs"),
        ("metrics", "released", "precision_overlaps is .*for the metrics of released"),
        ("metrics", "lu2016", "recall_overlaps is .*for the metrics of lu2016"),
    ],
)
def test_protocol_wrong_rule_raises(field, value, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"name": "mine", field: value})


def test_register_taken_name_or_type_raises():
    PROTOCOL_REGISTRY.register(Protocol(name="mine", evaluator_type="my_type"))
    with pytest.raises(ValueError, match="'mine' is registered already; rename yours"):
        PROTOCOL_REGISTRY.register(Protocol(name="mine"))
    with pytest.raises(ValueError, match="evaluator_type 'my_type' belongs to protocol 'mine'"):
        PROTOCOL_REGISTRY.register(Protocol(name="other", evaluator_type="my_type"))
    with pytest.raises(ValueError, match="Expected a Protocol, got {'name': 'x'}"):
        PROTOCOL_REGISTRY.register({"name": "x"})
    assert "other" not in PROTOCOL_REGISTRY and "mine" in PROTOCOL_REGISTRY


def test_register_variant_of_a_builtin_has_its_metrics():
    motifs = PROTOCOL_REGISTRY["motifs"]
    PROTOCOL_REGISTRY.register(
        replace(motifs, name="motifs_at_5", evaluator_type=None, recall_at=[5])
    )
    with registered():
        results = run(RelationDatasetEvaluator(NAME, protocol="motifs_at_5"))
    assert list(results["motifs_at_5_sgdet_k1"])[:2] == ["R@5", "mR@5"]


def test_registered_protocol_every_option_finds_it(tmp_path):
    exec(MODULE, {})
    assert find_protocol("mine") is find_protocol("", "my_type") is PROTOCOL_REGISTRY["mine"]
    assert 3 in all_predicates_per_pair()
    with registered(evaluator_type="my_type"):
        for protocol in ("mine", ""):
            cfg = reldn_d2.load_config(
                None, ["MODEL.META_ARCHITECTURE", "RelDN", "DATASETS.TEST", str((NAME,))]
            )
            cfg.TEST.RELATIONS.PROTOCOL = protocol
            assert predicates_per_pair(cfg) == (3,) and 3 in kept_predicates_per_pair(cfg)
            evaluator = build_relation_evaluator(cfg, NAME, str(tmp_path))
            assert evaluator.protocol.name == "mine"
            results = run(evaluator)
            assert results["mine_sgdet_k3"] == {"top-1 hits": 1, "relations": 3}
            assert evaluator.result_names()["mine_sgdet_k3"] == ["top-1 hits", "relations"]
    assert (tmp_path / "per_predicate_mine_sgdet_k3.json").exists()


@pytest.mark.parametrize("values", [[1.0], {"R@1": "high"}, {1: 1.0}, None])
def test_metrics_other_than_numbers_by_name_raise(values):
    PROTOCOL_REGISTRY.register(Protocol(name="mine", metrics=lambda matches, settings: values))
    with registered(), pytest.raises(ValueError, match="'mine': its metrics return .*dict of "):
        run(RelationDatasetEvaluator(NAME, protocol="mine"))


# ---------------------------------------------------------------------------- on command lines


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Options of a tool: a dataset, its predictions, and the module, which lies in this folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_protocol_file.py").write_text(MODULE)
    with registered() as metadata:
        evaluator = RelationDatasetEvaluator(NAME, str(tmp_path))
        run(evaluator)
        metadata.image_root = str(tmp_path)
        predictions = str(tmp_path / "relation_predictions.json")
        yield ["--dataset", NAME, "--predictions", predictions]


@pytest.mark.parametrize("order", [1, -1])
def test_evaluate_relations_protocol_of_a_module_in_any_order(given, tmp_path, order):
    options = [["--protocol", "mine"], ["--module", "my_protocol_file.py"]][::order]
    output = ["--predicates-per-pair", "all", "--output", str(tmp_path / "scored")]
    arguments = [*given, *options[0], *options[1], *output]
    assert evaluate_relations.main(arguments) == 0
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert results["mine_sgdet"] == {"top-1 hits": 1, "relations": 3}


@pytest.mark.parametrize("tool", [evaluate_relations, draw_relations, make_gallery])
def test_tools_unknown_protocol_exit_2(given, tool, capsys):
    output = [] if tool is evaluate_relations else ["--output", "out"]
    with pytest.raises(SystemExit) as end:
        tool.main([*given, *output, "--protocol", "mine"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Unknown protocol 'mine'" in error and "Pass --module to import the module" in error
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "or one that --module registers" in " ".join(capsys.readouterr().out.split())


def test_draw_relations_hits_by_a_protocol_of_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_protocol_file.py").write_text(MODULE)
    from evaluation_data import dataset_dicts

    records = dataset_dicts()
    for record in records:
        record["file_name"] = str(tmp_path / f"{record['image_id']}.png")
        Image.fromarray(np.full((60, 80, 3), 99, np.uint8)).save(record["file_name"])
    with registered(lambda: records):
        run(RelationDatasetEvaluator(NAME, str(tmp_path)))
        arguments = ["--dataset", NAME, "--predictions", "relation_predictions.json"]
        arguments += ["--module", "my_protocol_file.py", "--protocol", "mine", "--output", "out"]
        assert draw_relations.main(arguments) == 0
        assert make_gallery.main([*arguments[:-1], "page.html"]) == 0
    assert (tmp_path / "page.html").exists() and list((tmp_path / "out").glob("*.png"))
