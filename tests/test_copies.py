"""No script imports another: what they share is copied, and these tests keep the copies identical."""

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
A3C, BASELINE, KL_PENALTY = "a3c_nstep.py", "reinforce_baseline.py", "variants/ppo_kl_penalty.py"
LSTM, MASKED = "variants/ppo_lstm.py", "variants/ppo_masked.py"
ATARI, TORCHRUN = "variants/ppo_atari.py", "variants/ppo_torchrun.py"
EPISODE = ["reinforce.py", BASELINE, "offpolicy_is.py"]
NATURAL, PPO = ["npg.py", "trpo.py"], ["ppo.py", KL_PENALTY, LSTM, MASKED, ATARI, TORCHRUN]
STEP = ["vpg_gae.py", *NATURAL, *PPO]
ALL = [*EPISODE, *STEP, A3C]


def but(scripts, *others):
    return [name for name in scripts if name not in others]


MODULES = but(ALL, ATARI, TORCHRUN)  # which need games, torchrun
MODULES = [name.removesuffix(".py").replace("/", ".") for name in MODULES]

# files in which the source of these is the same, decorators, comments and docstrings included
SHARED = [
    (ALL, "UnitInterval TwoOrMore TrainResult"),
    (but(ALL, TORCHRUN), "RunningNorm"),
    (but(ALL, ATARI), "mlp update_statistics reset"),
    (but(ALL, LSTM, MASKED, ATARI), "Policy"),
    (but(ALL, MASKED, ATARI), "make_envs"),
    (ALL, "SCRIPT COUNTERS load_args"),
    (but(ALL, TORCHRUN), "Run"),
    (EPISODE, "compute_returns policy_loss rollout_episodes"),
    (["reinforce.py", BASELINE], "update_policy"),
    (STEP, "compute_gae"),
    ([*STEP, A3C], "RewardScale"),
    (but([*STEP, A3C], LSTM, ATARI), "rollout"),
    (but([BASELINE, *STEP, A3C], LSTM, ATARI), "Value"),
    # update_value: vpg_gae.py has a proximal term, reinforce_baseline.py V(s, t), ppo_lstm.py sequences
    (but([*NATURAL, *PPO, A3C], LSTM, ATARI, TORCHRUN), "update_value"),
    (["vpg_gae.py", "npg.py", A3C], "policy_loss"),
    (["ppo.py", LSTM, MASKED, ATARI, TORCHRUN], "policy_loss"),
    (["ppo.py", MASKED], "update_policy train"),
    (but(ALL, "offpolicy_is.py", TORCHRUN), "normalize"),
    (but([*EPISODE, *STEP], TORCHRUN), "gradient_step"),  # a3c_nstep.py: no step that is not finite
    (NATURAL, "flat_grad fisher_vector_product conjugate_gradient natural_step_size natural_step"),
]
DIFFERENT_ON_PURPOSE = {"Args", "train", "update_policy", "update_value", "policy_loss", "gradient_step"}
DIFFERENT_ON_PURPOSE |= {"Policy", "Value", "rollout", "make_envs"}  # in variants
DIFFERENT_ON_PURPOSE |= {"RunningNorm", "normalize", "reset", "Run"}
SECTIONS = ["the algorithm", "training", "networks", "data", "running"]
PACKAGES = '"torch>=2.6,<2.14", "gymnasium>=1.1,<2", "pydantic", "tyro>=1.0.16", "tensorboard", "tqdm"'
IMPORTS = {  # lines that not all files have
    "from functools import partial": NATURAL,
    "from torch.distributions.kl import kl_divergence": STEP,
    "import copy": [A3C, KL_PENALTY],
    "from contextlib import closing": [A3C],
    "from queue import Empty": [A3C],
    "import torch.multiprocessing as mp": [A3C],
    "import os": [TORCHRUN],
    "from datetime import datetime": but(ALL, TORCHRUN),
    "from torch.distributions import Categorical": [ATARI],
    "from torch.distributions import Categorical, Independent, Normal": but(ALL, ATARI),
    "try:": [ATARI],
    "    import ale_py": [ATARI],
    "except ImportError as error:": [ATARI],
    '    raise ImportError("Atari games need ale-py: pip install ale-py") from error': [ATARI],
    f"# dependencies = [{PACKAGES}]": but(ALL, ATARI),
    "# dependencies = [": [ATARI],
    f'#     {PACKAGES}, "ale-py",': [ATARI],
    "# ]": [ATARI],
}
BUDGETS = [
    ("reinforce.py", BASELINE, 105),
    ("reinforce.py", "offpolicy_is.py", 105),
    ("vpg_gae.py", "npg.py", 85),
    ("npg.py", "trpo.py", 55),
    ("vpg_gae.py", "ppo.py", 55),
    ("ppo.py", KL_PENALTY, 70),
    ("ppo.py", LSTM, 110),
    ("ppo.py", MASKED, 60),
    ("ppo.py", ATARI, 203),
    ("ppo.py", TORCHRUN, 70),
    ("vpg_gae.py", A3C, 180),
]


def read(script):
    return Path(ROOT, script).read_text()


def definitions(source):
    """The source text of every top-level function, class and assigned name."""
    texts = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        names += [node.name] if hasattr(node, "name") else []
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        texts |= dict.fromkeys(names, "\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    return texts


def imports(source):
    """The dotted names of all modules that a source imports anywhere."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return plain + ["." * node.level + (node.module or "") for node in froms]


def arguments(script):
    return set(re.findall(r"^    (\w+): ", definitions(read(script))["Args"], re.MULTILINE))


def common(source):
    """What all have, between the docstring and Args and at the end."""
    top, end = (
        source.split('\n"""\n', 1)[1].split("\n\n\n@dataclass\n")[0],
        source.split("\n\n\nif __name__")[1],
    )
    return [line for line in top.splitlines() if line and line not in IMPORTS] + [end]


def test_the_comparison_sees_decorators_docstrings_comments_and_constants():
    a = '@wraps(g)\n@cache\ndef f(x):\n    """Doc."""\n    return x  # that\n\n\nC, D = 1, 2\n'
    assert definitions("import os\n\n# moved\n" + a) == dict(
        f=a[: a.index("\n\n\nC")], C="C, D = 1, 2", D="C, D = 1, 2"
    )
    assert (
        imports("import a.b, c\ndef f():\n    from d.e import g\n    from . import h")
        == "a.b c d.e .".split()
    )


@pytest.mark.parametrize("scripts, names", SHARED)
def test_copies_are_identical(scripts, names):
    for name in names.split():
        scripts_of = defaultdict(list)
        for script in scripts:
            scripts_of[definitions(read(script)).get(name)].append(script)
        assert len(scripts_of) == 1 and None not in scripts_of, f"{name} differs: {list(scripts_of.values())}"


def test_every_name_of_two_scripts_is_in_the_table_or_different_on_purpose():
    assert set(ALL) == {
        str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("variants/*.py")]
    }
    scripts_of, table = (
        defaultdict(set),
        {name: set(scripts) for scripts, names in SHARED for name in names.split()},
    )
    for script in ALL:
        for name in definitions(read(script)):
            scripts_of[name].add(script)
    for name, scripts in scripts_of.items():
        if len(scripts) > 1 and name not in DIFFERENT_ON_PURPOSE:
            assert scripts == table.get(name), f"{name} is in {sorted(scripts)}"


@pytest.mark.parametrize("script", ALL)
def test_anatomy_of_a_script(script):
    source = read(script)
    assert re.findall(r"^# -{70,} (.+)$", source, re.MULTILINE) == SECTIONS
    assert [line for line in source.splitlines() if len(line) > 110] == []
    env_id = {MASKED: "Taxi-v4", ATARI: "ALE/Pong-v5"}.get(script, "CartPole-v1")
    usage = rf"^    (python|torchrun .+) {script} --env-id {env_id}$"
    assert re.search(usage, source.split('"""')[1], re.MULTILINE)
    assert not re.search(r"sys\.exit|SystemExit|\bsignal\b|threading|getattr\(args", source)
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()} | {""}
    assert not local & {module.split(".")[0] for module in imports(source)}
    assert {line for line in IMPORTS if f"\n{line}\n" in source} == {
        x for x in IMPORTS if script in IMPORTS[x]
    }
    assert common(source) == common(read("reinforce.py"))

    own, others = (set().union(*map(arguments, scripts)) for scripts in ([script], ALL))
    assert set(re.findall(r"\bargs\.([a-z]\w*)", source)) - {"json"} <= own
    assert not {name for name in others - own if "_" in name} & set(
        re.findall(r"\w+", source.replace("-", "_"))
    )


@pytest.mark.parametrize("a, b, budget", BUDGETS)
def test_a_diff_is_within_its_budget(a, b, budget):
    diff = subprocess.run(["diff", a, b], cwd=ROOT, capture_output=True, text=True).stdout
    assert 0 < sum(line[0] in "<>" for line in diff.splitlines()) <= budget
