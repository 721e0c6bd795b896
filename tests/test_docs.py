"""What the documents name exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = Path(ROOT, "docs/derivations.md").read_text()
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))
SCRIPTS = [path.name for path in ROOT.glob("*.py")]
FUNCTIONS = sorted(set(re.findall(r"`(\w+\.py): (\w+)`", TEXT)))


@functools.cache
def names(path):
    """The functions and classes at the top level of a file."""
    return {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}


@pytest.mark.parametrize("file, name", TESTS)
def test_every_test_in_derivations_exists(file, name):
    assert name.startswith("test_") and name in names(Path(ROOT, "tests", file))


@pytest.mark.parametrize("file, name", FUNCTIONS)
def test_every_function_in_derivations_exists(file, name):
    assert name in names(Path(ROOT, file))


def test_every_entry_of_derivations_names_a_test():
    before_errata, errata = TEXT.split("## Errata of the notes")
    entries = re.split(r"^### ", before_errata, flags=re.MULTILINE)[1:]
    assert len(entries) > 10 and len(re.findall(r"^\*\*", errata, re.MULTILINE)) > 15
    for entry in entries:
        assert re.search(r"^- Function: `", entry, re.MULTILINE), entry
        assert re.search(r"^- Test: `", entry, re.MULTILINE), entry
    for entry in re.split(r"^\*\*", errata, flags=re.MULTILINE)[1:]:
        assert "Printed" in entry and "Right: " in entry, entry
        assert re.search(r"^Test: `", entry, re.MULTILINE), entry


def test_every_file_in_backticks_exists():
    for name in set(re.findall(r"`([\w/]+\.(?:py|md))`", TEXT)):
        assert Path(ROOT, name).exists() or Path(ROOT, "tests", name).exists(), name


def test_every_function_of_the_algorithms_is_in_derivations():
    for script in SCRIPTS:
        source = Path(ROOT, script).read_text()
        algorithm = re.search(r"-{70} the algorithm\n(.*?)\n# -{70}", source, re.DOTALL).group(1)
        for name in re.findall(r"^(?:def|class) (\w+)", algorithm, re.MULTILINE):
            assert name == "gradient_step" or name in {n for _, n in FUNCTIONS}, (script, name)
