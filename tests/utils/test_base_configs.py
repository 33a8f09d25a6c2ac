"""Meta-architectures of a YAML file and the files that it is based on."""

from reldn_d2.utils.base_configs import meta_architectures


def write(path, architecture=None, base=None, more=""):
    lines = [] if base is None else [f"_BASE_: {base}"]
    if architecture:
        lines += ["MODEL:", f"  META_ARCHITECTURE: {architecture}"]
    path.write_text("\n".join([*lines, more, ""]))
    return str(path)


def test_meta_architectures_chain_of_bases_leaf_first(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "base.yaml", "GeneralizedRCNN")
    write(tmp_path / "below/middle.yaml", "ProposalNetwork", '"../base.yaml"')
    silent = write(tmp_path / "silent.yaml", None, '"below/middle.yaml"')
    leaf = write(tmp_path / "leaf.yaml", "RelDN", f'"{silent}"')
    assert list(meta_architectures(leaf)) == ["RelDN", "ProposalNetwork", "GeneralizedRCNN"]


def test_meta_architectures_several_bases_last_one_first(tmp_path):
    write(tmp_path / "a.yaml", "A")
    write(tmp_path / "b.yaml", "B")
    leaf = write(tmp_path / "leaf.yaml", None, '["a.yaml", "b.yaml"]')
    assert list(meta_architectures(leaf)) == ["B", "A"]


def test_meta_architectures_tagged_values_run_no_code(tmp_path):
    """Detectron2's Base-RetinaNet.yaml computes its anchors with a tag for ``eval``."""
    mark = tmp_path / "mark"
    code = f"X: !!python/object/apply:eval [\"open({str(mark)!r}, 'w')\"]"
    file = write(tmp_path / "x.yaml", "RetinaNet", more=code)
    assert list(meta_architectures(file)) == ["RetinaNet"] and not mark.exists()
    (tmp_path / "empty.yaml").write_text("")
    assert list(meta_architectures(str(tmp_path / "empty.yaml"))) == []
