"""Fonts for names in any script: matplotlib's own has Latin, Greek, Cyrillic and some others.

Pictures name ``font_families(text)`` as the family of a text; matplotlib then takes each character
from the first of these fonts that has it.
"""

import logging
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

__all__ = ["BASE_FAMILY", "choose_families", "font_families"]

logger = logging.getLogger(__name__)

_unreadable: set[str] = set()  # paths of fonts
_logged: set[str] = set()  # packages that were recommended in this process

BASE_FAMILY = "DejaVu Sans"  # comes with matplotlib
# Families that cover much, sans serif and the most common ones first; all others come after them.
_PREFERRED = (
    "Noto Sans CJK",
    "Source Han Sans",
    "WenQuanYi",
    "Droid Sans Fallback",
    "PingFang",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans",
    "FreeSans",
    "Unifont",
)
# Words in Unicode's names of characters -> Debian's package of a font that has them.
_PACKAGES = {
    ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC"): (
        "fonts-noto-cjk"
    ),
    ("EMOJI", "FACE", "SYMBOL"): "fonts-symbola",
}
_OTHER_SCRIPTS = "fonts-noto-core"

HasCharacter = Callable[[str], bool]


def choose_families(
    characters: Iterable[str], fonts: Iterable[tuple[str, HasCharacter]]
) -> tuple[list[str], set[str]]:
    """Choose fonts that together have all characters.

    Args:
        characters: characters that are needed.
        fonts: name of the family, and a function that tells whether it has a character, in the
            order of preference. Fonts after the last one needed are not looked at.

    Returns:
        the chosen families, and the characters that no font has.
    """
    missing, chosen = set(characters), []
    for family, has_character in fonts:
        if not missing:
            break
        found = {x for x in missing if has_character(x)}
        if found and family not in chosen:
            chosen.append(family)
        missing -= found
    return chosen, missing


def font_families(text: str) -> tuple[str, ...]:
    """Return the installed families that have the characters of a text, the usual one first.

    Characters that no installed font has are logged once, with the package that helps.
    """
    needed = frozenset(x for x in text if not _is_invisible(x) and not _has(BASE_FAMILY, x))
    return (BASE_FAMILY, *_fallbacks(needed)) if needed else (BASE_FAMILY,)


def _is_invisible(character: str) -> bool:
    return character.isascii() or unicodedata.category(character) in ("Cc", "Cf", "Mn", "Zs")


@lru_cache(maxsize=4096)
def _fallbacks(needed: frozenset[str]) -> tuple[str, ...]:
    chosen, missing = choose_families(needed, _installed())
    if missing and _add_new_fonts():
        chosen, missing = choose_families(needed, _installed())
    for package in sorted({_package(x) for x in missing} - _logged):
        _logged.add(package)
        characters = "".join(sorted(x for x in missing if _package(x) == package))
        logger.warning(
            f"No installed font has '{characters[:10]}', so pictures show squares. Install one, "
            f"for instance: apt-get install {package}"
        )
    return tuple(chosen)


def _installed() -> list[tuple[str, HasCharacter]]:
    """Return all families but the usual one, in the order of preference."""

    def rank(family: str) -> tuple[int, str]:
        matches = (i for i, start in enumerate(_PREFERRED) if family.startswith(start))
        return next(matches, len(_PREFERRED)), family

    families = {x.name for x in font_manager.fontManager.ttflist} - {BASE_FAMILY}
    # "Last Resort" has a picture of its script for each character.
    families = [x for x in families if "last resort" not in x.lower()]
    return [(x, lambda character, x=x: _has(x, character)) for x in sorted(families, key=rank)]


def _add_new_fonts() -> bool:
    """Add fonts that were installed after matplotlib listed them; return whether there are any."""
    known = {x.fname for x in font_manager.fontManager.ttflist}
    added = False
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        if path not in _unreadable:
            try:
                font_manager.fontManager.addfont(path)
                added = True
            except Exception:  # FreeType and matplotlib raise many types for damaged or odd fonts
                _unreadable.add(path)
    return added


@lru_cache(maxsize=None)
def _has(family: str, character: str) -> bool:
    font = _load(family)
    return font is not None and font.get_char_index(ord(character)) != 0


@lru_cache(maxsize=64)
def _load(family: str) -> FT2Font | None:
    """Return the regular font of a family; None if it cannot be read."""
    entries = [x for x in font_manager.fontManager.ttflist if x.name == family]
    weights = font_manager.weight_dict
    regular = min(
        entries,
        key=lambda x: (x.style != "normal", abs(weights.get(x.weight, x.weight) - 400), x.fname),
    )
    try:
        return FT2Font(regular.fname)
    except Exception:  # as above
        return None


def _package(character: str) -> str:
    words = unicodedata.name(character, "").replace("-", " ").split()
    for known, package in _PACKAGES.items():
        if any(word in known for word in words):
            return package
    return "fonts-symbola" if unicodedata.category(character).startswith("S") else _OTHER_SCRIPTS
