"""The blocks of docs/export.md that need onnxruntime."""

import re
import shlex

import export_model
import pytest
from model_utils import ROOT
from PIL import Image
from usage_utils import picture, write_checkpoint

REASON = 'needs onnx and onnxruntime: pip install "reldn_d2[export]"'
pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxruntime", reason=REASON)

BLOCK = re.compile(
    r"^```(bash|python) no-run: needs [^\n]*test_export_page.py[^\n]*\n(.*?)^```", re.M | re.S
)


def test_export_page_blocks_run(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path)
    Image.fromarray(picture(240, 320)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    languages: list[str] = []
    for language, text in BLOCK.findall((ROOT / "docs/export.md").read_text()):
        languages.append(language)
        if language == "python":  # each runs when it is pasted alone
            names = {}
            exec(compile(text, "docs/export.md", "exec"), names)
            continue
        for command in text.splitlines():
            python, program, *words = shlex.split(command)
            assert (python, program) == ("python", "tools/export_model.py")
            assert export_model.main(words) == 0
    assert languages == ["bash", "python", "python"]
    assert "person on horse" in capsys.readouterr().out
    assert len(names["boxes"]) > 0 and len(names["found"]["pairs"]) > 0
