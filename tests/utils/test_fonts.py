"""Fonts for names in any script."""

import logging

import pytest

from reldn_d2.utils import fonts
from reldn_d2.utils.fonts import BASE_FAMILY, choose_families, font_families

CHINESE, HINDI = "\u4eba\u9a6c", "\u092a"


@pytest.fixture
def installed(monkeypatch):
    """Replace the installed fonts by a list of (family, characters); returns a function."""

    def install(*families):
        table = [(name, characters.__contains__) for name, characters in families]
        monkeypatch.setattr(fonts, "_installed", lambda: table)

    monkeypatch.setattr(fonts, "_add_new_fonts", lambda: False)
    monkeypatch.setattr(fonts, "_logged", set())
    fonts._fallbacks.cache_clear()
    yield install
    fonts._fallbacks.cache_clear()


def test_choose_families_takes_the_first_that_help():
    looked_at = []

    def font(name, characters):
        return name, lambda x: looked_at.append(name) or x in characters

    families = [font("none", ""), font("a", "xy"), font("b", "yz"), font("c", "xyz")]
    assert choose_families("xyz", families) == (["a", "b"], set())
    assert "c" not in looked_at
    assert choose_families("xq", families) == (["a"], {"q"})
    assert choose_families("", families) == ([], set())


def test_font_families_ordinary_text_needs_no_other_font(installed):
    installed(("CJK", CHINESE))
    for text in ("", "cup 2", "caf\u00e9 \u0441\u0442\u043e\u043b \u2026 \u2007 a\nb"):
        assert font_families(text) == (BASE_FAMILY,)
    assert font_families(f"cup {CHINESE}") == (BASE_FAMILY, "CJK")


def test_font_families_missing_font_is_logged_once_with_its_package(installed, caplog):
    installed(("CJK", CHINESE[0]))
    with caplog.at_level(logging.WARNING, "reldn_d2"):
        for text in (CHINESE, CHINESE[1], f"x{CHINESE}"):
            font_families(text)
        assert [x.getMessage() for x in caplog.records] == [
            f"No installed font has '{CHINESE[1]}', so pictures show squares. Install one, for "
            "instance: apt-get install fonts-noto-cjk"
        ]
        font_families(HINDI)
        assert "apt-get install fonts-noto-core" in caplog.records[1].getMessage()


def test_font_families_fonts_installed_meanwhile_are_found(installed, monkeypatch, caplog):
    installed()

    def add():
        installed(("CJK", CHINESE))
        return True

    monkeypatch.setattr(fonts, "_add_new_fonts", add)
    assert font_families(CHINESE) == (BASE_FAMILY, "CJK") and not caplog.records


def test_installed_fonts_can_be_asked_for_characters():
    for _, has_character in fonts._installed():
        assert has_character("a") in (True, False)
    fonts._add_new_fonts()
    assert not fonts._add_new_fonts()
