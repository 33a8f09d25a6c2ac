"""The repository's scripts that are also commands of the installed package.

``train_net.py``, ``demo.py``, ``evaluate_relations.py`` and ``draw_relations.py`` are links to the
files of the repository; a wheel has copies. pyproject.toml names the commands.
"""
