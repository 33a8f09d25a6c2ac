"""The files that a YAML config is based on (``_BASE_``)."""

import os
from collections.abc import Iterator
from typing import Any

import yaml

from detectron2.utils.file_io import PathManager

__all__ = ["meta_architectures"]


class _PlainLoader(yaml.SafeLoader):
    """Reads any YAML without running code; values with a tag, such as ``eval``, become None."""


_PlainLoader.add_multi_constructor("", lambda loader, suffix, node: None)


def meta_architectures(file: str) -> Iterator[str]:
    """Yield each ``MODEL.META_ARCHITECTURE`` that a YAML file and its bases set.

    The merged config has only the first of them. The others say which detector a config of RelDN
    is based on.

    Args:
        file: an existing YAML file.

    Yields:
        Names: that of the file itself, then those of its bases, which it overrides.
    """
    with PathManager.open(file) as content:
        node: dict[str, Any] = yaml.load(content, _PlainLoader) or {}
    name = (node.get("MODEL") or {}).get("META_ARCHITECTURE")
    if name:
        yield name
    bases = node.get("_BASE_") or []
    # Of several bases, a later one overrides the earlier ones.
    for base in reversed([bases] if isinstance(bases, str) else bases):
        base = os.path.expanduser(base)
        if not base.startswith(("/", "https://", "http://")):
            base = os.path.join(os.path.dirname(file), base)
        yield from meta_architectures(base)
