"""Print the environment for bug reports: ``python -m reldn_d2.env``."""

from . import __version__
from .utils.collect_env import environment_table


def main() -> None:
    """Print the report."""
    print(environment_table(__version__))


if __name__ == "__main__":
    main()
