"""What the documents name exists."""

import ast
import functools
import re

from test_copies import ALL, ROOT

TEXT = (ROOT / "docs/derivations.md").read_text()


@functools.cache
def names(path):
    """The functions and classes at the top level of a file."""
    source = (ROOT / path).read_text() if (ROOT / path).exists() else ""
    return {node.name for node in ast.parse(source).body if hasattr(node, "name")}


def test_what_derivations_names_exists():
    tests, functions = (re.findall(rf"`([\w/]+\.py){sep}(\w+)`", TEXT) for sep in ("::", ": "))
    assert [name for file, name in tests if name not in names(f"tests/{file}")] == []
    assert [name for file, name in functions if name not in names(file)] == []
    files = set(re.findall(r"`([\w/]+\.(?:py|md))`", TEXT))
    assert [name for name in files if not ((ROOT / name).exists() or (ROOT / "tests" / name).exists())] == []
    for script in ALL:
        algorithm = (ROOT / script).read_text().split("--- the algorithm\n")[1].split("\n# ---")[0]
        own = set(re.findall(r"^(?:def|class) (\w+)", algorithm, re.MULTILINE)) - {"gradient_step"}
        assert own <= {name for _, name in functions}, script


def test_every_entry_of_derivations_names_a_test():
    before_errata, errata = TEXT.split("## Errata of the notes")
    entries, slips = before_errata.split("\n### ")[1:], re.split(r"^\*\*", errata, flags=re.MULTILINE)[1:]
    assert len(entries) > 10 and len(slips) > 15
    assert [text for text in entries if "\n- Function: `" not in text or "\n- Test: `test_" not in text] == []
    assert [
        text for text in slips if not re.search("Printed.*Right: .*\nTest: `test_", text, re.DOTALL)
    ] == []
