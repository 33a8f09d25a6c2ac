"""The names of programs in their error lines."""

import sys

import pytest

from reldn_d2.utils.programs import program_name


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/venv/bin/reldn-train", "reldn-train"),
        ("train_net.py", "train_net.py"),
        ("/venv/bin/pytest", "train_net.py"),
        ("", "train_net.py"),
    ],
)
def test_program_name_is_that_of_the_command_or_the_file(monkeypatch, called, name):
    monkeypatch.setattr(sys, "argv", [called])
    assert program_name("/clone/train_net.py") == name
