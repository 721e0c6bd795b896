"""No script imports another: what they share is copied, and these tests keep the copies identical."""

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EPISODE = ["reinforce.py", "reinforce_baseline.py", "offpolicy_is.py"]
STEP = ["vpg_gae.py", "npg.py", "trpo.py", "ppo.py"]
ALL = [*EPISODE, *STEP, "a3c_nstep.py"]
SCRIPTS = [name for name in ALL if Path(ROOT, name).exists()]

# the source of each, decorators and docstring included, is the same in these files
SHARED = {
    "normalize": ALL,
    "gradient_step": ALL,
    "RunningNorm": ALL,
    "mlp": ALL,
    "Policy": ALL,
    "make_envs": ALL,
    "reset": ALL,
    "SCRIPT": ALL,
    "SAVE_EVERY": ALL,
    "MAY_BE_ZERO": ALL,
    "AT_MOST_ONE": ALL,
    "refuse": ALL,
    "check_args": ALL,
    "load_args": ALL,
    "Run": ALL,
    "TrainResult": ALL,
    "compute_returns": EPISODE,
    "policy_loss": EPISODE,
    "rollout_episodes": EPISODE,
    "update_policy": ["reinforce.py", "reinforce_baseline.py"],
    "compute_gae": STEP,
    "rollout": [*STEP, "a3c_nstep.py"],
    "Value": ["reinforce_baseline.py", *STEP, "a3c_nstep.py"],
    "update_value": STEP,
    "flat_grad": ["npg.py", "trpo.py"],
    "fisher_vector_product": ["npg.py", "trpo.py"],
    "conjugate_gradient": ["npg.py", "trpo.py"],
    "natural_step_size": ["npg.py", "trpo.py"],
    "natural_step": ["npg.py", "trpo.py"],
}
DIFFERENT_ON_PURPOSE = {"Args", "policy_loss", "update_policy", "update_value", "train"}
SECTIONS = ["the algorithm", "networks", "data", "running", "training"]
BUDGETS = [
    ("reinforce.py", "reinforce_baseline.py", 110),
    ("reinforce.py", "offpolicy_is.py", 110),
    ("vpg_gae.py", "npg.py", 90),
    ("npg.py", "trpo.py", 60),
    ("vpg_gae.py", "ppo.py", 90),
    ("vpg_gae.py", "a3c_nstep.py", 200),
]


def read(script):
    return Path(ROOT, script).read_text()


def definitions(source):
    """The source text of every top-level function, class and assigned name."""
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        else:
            names = [node.name] if hasattr(node, "name") else []
        decorators = getattr(node, "decorator_list", [])
        first = decorators[0].lineno if decorators else node.lineno
        texts |= dict.fromkeys(names, "\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    return texts


def imports(source):
    """The dotted names of all modules that a source imports anywhere."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [
        "." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)
    ]


def changed_lines(a, b):
    diff = subprocess.run(["diff", a, b], capture_output=True, text=True)
    assert diff.returncode in (0, 1), diff.stderr
    return sum(line[0] in "<>" for line in diff.stdout.splitlines())


def test_comparison_sees_decorators_docstrings_comments_and_constants(tmp_path):
    a = '@wraps(g)\n@cache\ndef f(x):\n    """Doc."""\n    return x  # that\n\n\nC, D = 1, 2\nE: int = 3\n'
    assert set(definitions(a)) == {"f", "C", "D", "E"}
    assert definitions(a)["f"] == a[: a.index("\n\n\nC")]
    assert definitions(a) == definitions("import os\n\n# other lines move it\n" + a)
    for old, new in [("@wraps(g)\n", ""), ("@cache\n", ""), ("Doc.", "Other."), ("  # that", "")]:
        assert definitions(a)["f"] != definitions(a.replace(old, new))["f"]
    assert definitions(a)["D"] != definitions(a.replace("1, 2", "1, 3"))["D"]
    assert imports("import a.b, c\ndef f():\n    from d.e import g\n    from . import h") == [
        "a.b",
        "c",
        "d.e",
        ".",
    ]
    Path(tmp_path, "a").write_text("1\n2\n3\n")
    Path(tmp_path, "b").write_text("1\n4\n3\n5\n")
    assert changed_lines(tmp_path / "a", tmp_path / "b") == 3


def test_there_is_a_script():
    assert "ppo.py" in SCRIPTS


@pytest.mark.parametrize("name", SHARED)
def test_copies_are_identical(name):
    scripts_of = defaultdict(list)
    for script in set(SHARED[name]) & set(SCRIPTS):
        scripts_of[definitions(read(script)).get(name)].append(script)
    assert len(scripts_of) <= 1, f"{name} differs between {list(scripts_of.values())}"


OTHER_COPIES = [  # of names that stand for something else in other files
    ("policy_loss", ["vpg_gae.py", "npg.py", "a3c_nstep.py"]),
    ("update_policy", ["vpg_gae.py", "a3c_nstep.py"]),
    ("update_value", [*STEP, "a3c_nstep.py"]),
]


@pytest.mark.parametrize("name, scripts", OTHER_COPIES)
def test_copies_of_what_differs_elsewhere(name, scripts):
    assert len({definitions(read(script))[name] for script in scripts}) == 1


def test_every_name_of_two_scripts_is_in_the_table_or_different_on_purpose():
    scripts_of = defaultdict(set)
    for script in SCRIPTS:
        for name in definitions(read(script)):
            scripts_of[name].add(script)
    found = {name: scripts for name, scripts in scripts_of.items() if len(scripts) > 1}
    table = {name: set(scripts) & set(SCRIPTS) for name, scripts in SHARED.items()}
    for name in found.keys() - DIFFERENT_ON_PURPOSE:
        assert found[name] == table.get(name), f"{name} is in {sorted(found[name])}"
    for name, scripts in table.items():
        assert scripts <= scripts_of[name], f"{name} is missing in {sorted(scripts - scripts_of[name])}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_a_file_of_this_repository(script):
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()} | {""}
    assert not local & {module.split(".")[0] for module in imports(read(script))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_order(script):
    assert re.findall(r"^# -{70,} (.+)$", read(script), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_have_at_most_110_columns(script):
    assert [line for line in read(script).splitlines() if len(line) > 110] == []


@pytest.mark.parametrize("a, b, budget", BUDGETS)
def test_diff_is_within_its_budget(a, b, budget):
    if not {a, b} <= set(SCRIPTS):
        pytest.skip("not written yet")
    assert changed_lines(ROOT / a, ROOT / b) <= budget
