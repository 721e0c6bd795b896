"""The PEP 723 header of a script names what the script imports, as requirements.txt does."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_copies import ROOT, SCRIPTS, imports

tomllib = pytest.importorskip("tomllib")  # new in Python 3.11


def parse(lines):
    """{package: specifier}"""
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: str(requirement.specifier) for requirement in requirements}


def header(script):
    """The inline metadata, by the regular expression of PEP 723."""
    pattern = r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    [match] = re.finditer(pattern, Path(ROOT, script).read_text())
    return tomllib.loads("".join(line[2:] for line in match["content"].splitlines(keepends=True)))


@pytest.fixture(scope="module")
def requirements():
    return parse(Path(ROOT, "requirements.txt").read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_agrees_with_requirements_txt(script, requirements):
    dependencies = parse(header(script)["dependencies"])
    assert dependencies == {name: requirements.get(name) for name in dependencies}


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_names_every_package_that_is_imported_and_no_other(script):
    modules = [module.split(".") for module in imports(Path(ROOT, script).read_text())]
    packages = {module[0] for module in modules} - sys.stdlib_module_names
    if ["torch", "utils", "tensorboard"] in modules:
        packages.add("tensorboard")
    assert set(parse(header(script)["dependencies"])) == packages


@pytest.mark.parametrize("script", SCRIPTS)
def test_oldest_python_of_the_header_can_parse_the_script(script):
    major, minor = re.fullmatch(r">=(\d)\.(\d+)", header(script)["requires-python"]).groups()
    ast.parse(Path(ROOT, script).read_text(), feature_version=(int(major), int(minor)))
