"""The PEP 723 header of a script names what the script imports, as requirements.txt does."""

import ast
import re
import sys

import pytest
from packaging.requirements import Requirement
from test_copies import ALL, ATARI, ROOT, imports

tomllib = pytest.importorskip("tomllib")  # new in Python 3.11


def parse(lines):
    """{package: specifier}"""
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {requirement.name: str(requirement.specifier) for requirement in requirements}


@pytest.mark.parametrize("script", [*ALL, "tools/enjoy.py"])
def test_a_header_names_what_is_imported_as_the_requirements_do(script):
    source, tool = (ROOT / script).read_text(), script.startswith("tools")
    header = re.search(r"^# /// script$\n((?:^# .*$\n)+)^# ///$", source, re.MULTILINE).group(1)
    header = tomllib.loads(re.sub("^# ", "", header, flags=re.MULTILINE))
    dependencies, required = parse(header["dependencies"]), {}
    for file in ["requirements.txt"] + (tool or script == ATARI) * ["requirements-extras.txt"]:
        required |= parse((ROOT / file).read_text().splitlines())
    assert dependencies.items() <= required.items()

    packages = {
        module.split(".")[0].replace("_", "-") for module in imports(source)
    } - sys.stdlib_module_names
    packages |= {"tensorboard"} | ({"tqdm", "pygame"} if tool else set())  # these are not imported by name
    assert set(dependencies) == packages - {"numpy"}  # which comes with gymnasium

    version = re.fullmatch(r">=(\d)\.(\d+)", header["requires-python"]).groups()
    ast.parse(source, feature_version=tuple(map(int, version)))
