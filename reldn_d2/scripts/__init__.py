"""The repository's scripts that are also commands of the installed package.

Those that also exist in ``tools``, ``demo`` or at the top are links to the files there; a wheel has
copies. pyproject.toml names the commands.
"""
