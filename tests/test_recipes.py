"""docs/recipes.md: every patch applies to ppo.py, every block runs, and each does what it says."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_copies import ROOT
from test_run_folder import checkpoint, only_run, progress
from torch.distributions.kl import kl_divergence

import ppo
from tools import enjoy

INTRODUCTION, *PARTS = re.split(r"^## ", (ROOT / "docs/recipes.md").read_text(), flags=re.MULTILINE)
RECIPES = dict(part.split("\n", 1) for part in PARTS)
PATCHED = [
    "Images",
    "MultiDiscrete actions",
    "Evaluation during training",
    "Weights & Biases",
    "Early stopping",
]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Image(gym.Env):
    """One image per episode; it is bright on the left or on the right, and reward 1 is for saying where."""

    observation_space, action_space = Box(0, 255, (12, 10, 3), np.uint8), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right = int(self.np_random.integers(2))
        image = self.np_random.integers(100, size=(12, 10, 3), dtype=np.uint8)
        image[:, 5 * self.right : 5 * self.right + 5] += 100
        return image, {}

    def step(self, action):
        return self.observation_space.sample(), float(action == self.right), True, False, {}


class Choices(gym.Env):
    """Observes two numbers and is to choose both."""

    observation_space, action_space = Box(0, 5, (2,)), MultiDiscrete([2, 3], start=[0, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right = np.array([0, 3]) + self.np_random.integers([2, 3])
        return self.right.astype(np.float32), {}

    def step(self, action):
        assert action in self.action_space
        return self.observation_space.sample(), float((action == self.right).mean()), True, False, {}


gym.register("MyImages-v0", Image)
gym.register("MyChoices-v0", Choices)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with ppo.py and my_module.py, as a reader has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    (tmp_path / "ppo.py").write_text((ROOT / "ppo.py").read_text(), newline="\n")
    (tmp_path / "my_module.py").write_text(*blocks(RECIPES["An environment of your own"], "python"))
    return tmp_path


@pytest.fixture
def cook(folder, monkeypatch):
    """Apply the patch of a recipe to ppo.py, if it has one, and run its command with further arguments."""

    def cook(title, *argv):
        (command,) = blocks(RECIPES[title], "bash")
        for patch in blocks(RECIPES[title], "diff"):
            subprocess.run(["git", "apply"], input=patch.encode(), cwd=folder, check=True)
        monkeypatch.setattr(sys, "argv", [*command.split()[1:], *map(str, argv)])
        return SimpleNamespace(**runpy.run_path("ppo.py", run_name="__main__"))

    return cook


def test_recipes_are_those_that_are_tested_here():
    kinds = {
        title: [len(blocks(text, kind)) for kind in ("diff", "python", "bash")]
        for title, text in RECIPES.items()
    }
    assert {title: kinds.pop(title) for title in PATCHED} == dict.fromkeys(PATCHED, [1, 0, 1])
    assert kinds == {
        "An environment of your own": [0, 1, 1],
        "A notebook": [0, 1, 0],
        "A sweep over seeds": [0, 1, 0],
        "Export": [0, 3, 0],
    }


@pytest.mark.parametrize("title", PATCHED)
def test_a_patch_is_applied_and_taken_back_as_the_page_says(title, folder):
    apply, copy = (line.split("  #")[0].split() for line in blocks(INTRODUCTION, "bash")[0].splitlines())
    original = (folder / "ppo.py").read_bytes()
    (folder / "recipe.diff").write_text(*blocks(RECIPES[title], "diff"), newline="\n")
    if shutil.which("patch"):
        subprocess.run(copy, check=True, capture_output=True)
    subprocess.run(apply, check=True)
    changed = (folder / "ppo.py").read_bytes()
    assert changed != original and max(map(len, changed.decode().splitlines())) <= 110
    assert not shutil.which("patch") or (folder / "my_ppo.py").read_bytes() == changed
    subprocess.run([*apply[:2], "-R", apply[2]], check=True)
    assert (folder / "ppo.py").read_bytes() == original


def test_own_environment_is_solved_and_played(cook):
    cook("An environment of your own")
    del sys.modules["my_module"], sys.path[0]  # enjoy.py looks for it in the working directory
    run_dir = str(only_run("runs"))
    enjoy.main(enjoy.Args(run_dir, episodes=20, deterministic=True, output="result.json"))
    assert set(json.loads(open("result.json").read())["returns"]) == {-1.0, -2.0, -3.0, -4.0, -5.0}
    assert [gym.make(f"My{name}-v0").unwrapped.length for name in ("Env", "LongEnv")] == [5, 20]


def test_images_are_seen_by_convolutions_that_learn(cook):
    script = cook("Images", "--total-timesteps", 4000, "--num-steps", 64)
    assert np.mean(checkpoint(only_run("runs"))["returns"]) > 0.8
    policy, env = enjoy.load(only_run("runs"))
    assert env.reset()[0].shape == (12, 10, 3)
    torch.manual_seed(1)
    start = script.Policy(Image.observation_space, Image.action_space)
    layers = [layer for layer in policy.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(layers) == 3 and policy(torch.zeros(4, 2, 12, 10, 3)).batch_shape == (4, 2)
    assert all((a != b).any() for a, b in zip(policy.parameters(), start.parameters()))


def test_multidiscrete_parts_are_independent_and_learned(cook):
    script = cook("MultiDiscrete actions", "--total-timesteps", 8000)
    assert np.mean(checkpoint(only_run("runs"))["returns"]) > 0.7
    policy, env = enjoy.load(only_run("runs"))
    obs = 5 * torch.rand(1000, 2)
    dist, other = policy(obs), policy(obs + 1)
    actions = dist.sample()
    assert actions.amax(0).tolist() == [1, 2] and actions.amin(0).tolist() == [0, 0]
    parts, others = (
        [script.Categorical(logits=logits) for logits in policy.net(x).split([2, 3], dim=-1)]
        for x in (obs, obs + 1)
    )
    for whole, sums in [
        (dist.log_prob(actions), [part.log_prob(actions[:, i]) for i, part in enumerate(parts)]),
        (dist.entropy(), [part.entropy() for part in parts]),
        (kl_divergence(dist, other), list(map(kl_divergence, parts, others))),
    ]:
        torch.testing.assert_close(whole, sum(sums))


def test_evaluation_is_of_the_most_likely_actions_and_changes_no_training(cook, folder):
    changes = dict(env_id="my_module:MyEnv-v0", total_timesteps=1500, num_envs=4, num_steps=8)
    ppo.train(ppo.Args(**changes, runs_dir="plain"))
    argv = [str(x) for name, value in changes.items() for x in (f"--{name}", value)]
    script = cook("Evaluation during training", *argv)
    run_dir = only_run("runs")
    assert progress(run_dir) == progress(only_run("plain"))
    iterations = range(20, len(progress(run_dir)) + 1, 20)
    events = EventAccumulator(str(run_dir)).Reload().Scalars("evaluation_return")
    assert [event.step for event in events] == [int(progress(run_dir)[i - 1]["step"]) for i in iterations]

    policy, env = enjoy.load(run_dir)
    policy.net[-1].bias += torch.tensor([0.0, 1e6])  # always right
    starts = [env.reset(seed=7 + i)[0].item() for i in range(10)]
    score = script.evaluate(policy, script.Args(**changes, seed=7))
    assert score == np.mean([start - 5 for start in starts]) and len(set(starts)) > 1


def test_wandb_is_started_before_the_run_with_its_arguments(cook, monkeypatch):
    calls = []
    stub = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs | {"too_late": os.path.exists("runs")}))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    cook("Weights & Biases", "--total-timesteps", 2000, "--seed", 5)
    (call,) = calls
    assert call["sync_tensorboard"] is True and call["config"]["seed"] == 5 and not call["too_late"]


def test_early_stopping_leaves_a_checkpoint_of_the_first_iteration_that_is_good_enough(cook):
    cook("Early stopping", "--stop-return", 30)
    rows, state = progress(only_run("runs")), checkpoint(only_run("runs"))
    good = [float(row["episodic_return"]) >= 30 and int(row["episodes"]) >= 100 for row in rows]
    assert good.index(True) == len(rows) - 1 and state["step"] == int(rows[-1]["step"]) < 100_000


def test_notebook(folder):
    (code,) = blocks(RECIPES["A notebook"], "python")
    cells = {}
    exec(code.replace("100_000", "5_000"), cells)
    result = cells["result"]
    assert (
        cells["progress"]["episodic_return"][-1] == np.mean(result.returns)
        and not result.run_dir.is_absolute()
    )
    (again,) = re.findall(r"`(train\(load_args\(.*)`\.", RECIPES["A notebook"])
    resumed = eval(again.replace("runs/...", str(result.run_dir)), cells)
    assert resumed.run_dir == result.run_dir and resumed.returns == result.returns  # it was complete


def test_sweep(folder):
    (code,) = blocks(RECIPES["A sweep over seeds"], "python")
    for long, short in {
        "100_000": "2_000",
        "max_workers=4": "max_workers=2",
        "range(1, 6)": "range(1, 3)",
    }.items():
        assert long in code
        code = code.replace(long, short)
    (folder / "sweep.py").write_text(code)
    done = subprocess.run([sys.executable, "sweep.py"], capture_output=True, text=True, check=True)
    returns = {run.name.split("__")[2]: checkpoint(run)["returns"] for run in (folder / "runs").iterdir()}
    scores = [np.mean(returns[seed]) for seed in ("1", "2")]
    assert (
        done.stdout.splitlines()[-1] == f"{np.mean(scores):.1f} +- {np.std(scores, ddof=1):.1f} over 2 seeds"
    )


def test_exported_networks_give_the_same_outputs(folder, monkeypatch):
    run_dir = ppo.train(ppo.Args(total_timesteps=2000, runs_dir="runs")).run_dir
    monkeypatch.setattr(sys, "argv", ["export.py", str(run_dir)])
    export, onnx, torchscript = blocks(RECIPES["Export"], "python")
    names, obs = {}, 3 * torch.randn(7, 4)
    exec(export, names)
    expected = names["net"](obs)
    torch.testing.assert_close(torch.export.load("policy.pt2").module()(obs), expected)
    exec(torchscript, names)
    torch.testing.assert_close(torch.jit.load("policy.ts")(obs), expected)
    if all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        exec(onnx, names)
        from onnx.reference import ReferenceEvaluator

        model = ReferenceEvaluator("policy.onnx")
        (output,) = model.run(None, {model.input_names[0]: obs.numpy()})
        torch.testing.assert_close(torch.tensor(output), expected)


def test_readme_trains_and_acts_in_your_own_code(folder):
    part = (ROOT / "README.md").read_text().split("## Use it in your own code")[1].split("\n## ")[0]
    train, act = blocks(part, "python")
    assert len(act.splitlines()) <= 9
    names = {}
    exec(train.replace("seed=3", "seed=3, total_timesteps=2_000"), names)
    names["RUN_DIR"] = names["result"].run_dir
    exec(act, names)
    assert names["done"] is True and names["reward"] == 1.0


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *ROOT.glob("docs/*.md")])
def test_every_relative_link_leads_to_a_file(page):
    page = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [x for x in links if not x.startswith("https://") and not (page.parent / x).exists()] == []
