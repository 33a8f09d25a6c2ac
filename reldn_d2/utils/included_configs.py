"""The configs of the repository's ``configs/``, which are part of the package (through a link)."""

from pathlib import Path

__all__ = ["CONFIGS", "find_config_file", "included_configs"]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def find_config_file(path: str) -> str:
    """Return the path of a config file away from a checkout too.

    Args:
        path: an existing file, or else the path of an included config below ``configs/``, with or
            without that folder, such as ``configs/VRD/reldn_boxes.yaml``.

    Returns:
        The file; ``path`` itself if there is none.
    """
    included = CONFIGS / path.removeprefix("configs/")
    return str(included) if not Path(path).exists() and included.is_file() else path


def included_configs() -> list[str]:
    """Return the paths of all included configs below ``configs/``, without those of bases."""
    paths = sorted(x.relative_to(CONFIGS).as_posix() for x in CONFIGS.glob("**/*.yaml"))
    return [x for x in paths if not x.rsplit("/", 1)[-1].startswith("Base-")]
