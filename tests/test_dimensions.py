"""Dimensions are data: who spells one out in code knows more than it should."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPELLED = {"heads", "neurons"}

# Where they may stand, and why.
EXCEPTIONS = {
    "lightning_mdc/policy.py": "the table of dimensions, and the views",
    "lightning_mdc/importance/scores.py": "views",
    "lightning_mdc/app/settings.py": "what conf/ has",
    "lightning_mdc/app/sweep.py": "an example of a setting, in a message",
    "lightning_mdc/figures/style.py": "their words and colours, for people",
}


def spelled(tree: ast.AST) -> Iterator[int]:
    """Lines in which a string, an attribute or a name is one of the dimensions."""
    for node in ast.walk(tree):
        words = (getattr(node, field, None) for field in ("value", "attr", "id", "arg"))
        if any(isinstance(word, str) and word in SPELLED for word in words):
            yield node.lineno


def test_dimensions_are_spelled_out_in_families_only() -> None:
    found = {}
    for path in (*ROOT.glob("lightning_mdc/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("lightning_mdc/models/"):
            found[name] = sorted(set(spelled(ast.parse(path.read_text()))))
    beyond = {name: lines for name, lines in found.items() if lines and name not in EXCEPTIONS}
    assert not beyond
    assert not {name for name in EXCEPTIONS if not found[name]}
