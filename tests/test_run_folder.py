"""The run folder: what is in it, that it repeats and resumes, and that it survives every way to stop."""

import csv
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from environments import Random
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_copies import MODULES

import ppo

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of POSIX")
FORK = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")


@pytest.fixture(params=MODULES[:-1])  # a3c_nstep.py: test_a3c.py
def script(request):
    return importlib.import_module(request.param)


def tiny(script, runs_dir, **changes):
    """Arguments of a run of a few iterations; what the script does not have is left out."""
    sizes = {
        "env_id": "environments:test/Random-v0",
        "num_envs": 4,
        "num_steps": 8,
        "total_timesteps": 160,
        "mask": False,
    }
    args = {**sizes, "runs_dir": str(runs_dir), **changes}
    return script.Args(**{name: args[name] for name in script.Args.__dataclass_fields__ if name in args})


def resume(script, run_dir, **changes):
    return script.train(dataclasses.replace(script.load_args(run_dir), **changes))


def progress(run_dir, without=("seconds",)):
    """The rows of progress.csv."""
    with open(Path(run_dir, "progress.csv"), newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [{name: cell for name, cell in row.items() if name not in without} for row in rows]


def checkpoint(run_dir, without=()):
    state = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
    return {name: value for name, value in state.items() if name not in without}


def only_run(runs_dir):
    (run_dir,) = Path(runs_dir).iterdir()
    return run_dir


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_finite(run_dir):
    for name in {"policy", "value", "reward_scale"} & set(state := checkpoint(run_dir)):
        assert all(x.isfinite().all() for x in state[name].values())


def assert_whole(run_dir):
    """progress.csv ends where the checkpoint does, every cell is a number, and no step comes twice."""
    rows, state = progress(run_dir, without=()), checkpoint(run_dir)
    steps = [int(row["step"]) for row in rows]
    assert len(rows) == state["iteration"] and steps[-1] == state["step"] and steps == sorted(set(steps))
    assert np.isfinite([float(cell) for row in rows for cell in row.values()]).all()


def stopped_run(script, args, iterations, saved):
    """The folder of a run that Ctrl-C stopped after so many iterations, with the checkpoint of an earlier."""
    log, now = script.Run.log, [0.0]

    def log_or_stop(run, *rest):
        if run.iteration == iterations:
            raise KeyboardInterrupt
        now[0] += 6 if run.iteration < saved else 0
        log(run, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script.Run, "log", log_or_stop)
        monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: now[0]))
        with pytest.raises(KeyboardInterrupt):
            script.train(args)
    run_dir = Path(args.resume) if args.resume else only_run(args.runs_dir)
    assert len(progress(run_dir)) == iterations and checkpoint(run_dir)["iteration"] == saved
    return run_dir


def save_always(monkeypatch, script):
    """A checkpoint after every iteration, as six seconds go by whenever the script looks."""
    monkeypatch.setattr(script, "time", SimpleNamespace(time=itertools.count(0, 6).__next__))


def test_the_folder_holds_arguments_rows_and_a_checkpoint_which_the_seed_fixes(script, tmp_path, monkeypatch):
    threads, name = [], script.__name__.split(".")[-1]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    changes = dict(seed=5, gamma=0.9, anneal_lr=False, torch_threads=3, total_timesteps=400)
    args = tiny(script, tmp_path, **changes)
    result = script.train(args)
    run_dir = only_run(tmp_path)
    assert result.run_dir == run_dir and threads == [3]
    assert re.fullmatch(rf"{name}__environments-test-Random-v0__5__\d{{8}}-\d{{6}}-\d+", run_dir.name)
    files = sorted(re.sub("tfevents.*", "tfevents", path.name) for path in run_dir.iterdir())
    assert files == ["args.json", "checkpoint.pt", "events.out.tfevents", "progress.csv"]

    rows, state = progress(run_dir, without=()), checkpoint(run_dir)
    assert_whole(run_dir)
    assert {"step", "episodes", "episodic_return", "policy_loss", "entropy", "seconds"} <= set(rows[0])
    assert int(rows[-2]["step"]) < 400 <= int(rows[-1]["step"]) == len(Random.steps)  # resets are no steps
    assert int(rows[-1]["episodes"]) == len(Random.returns) > 120
    assert float(rows[-1]["episodic_return"]) == pytest.approx(np.mean(result.returns))
    assert result.returns == pytest.approx(Random.returns[-100:], rel=1e-4)  # raw, no more than 100 are kept
    saved = json.loads((run_dir / "args.json").read_text())
    assert saved == state["args"] and saved.pop("script") == name and script.Args(**saved) == args
    assert state["returns"] == result.returns and state["policy"]["net.0.count"] == state["step"]
    assert_same(state["policy"], result.policy.state_dict())

    again, other = (script.train(dataclasses.replace(args, seed=seed)) for seed in (5, 6))
    assert progress(run_dir) == progress(again.run_dir) != progress(other.run_dir)
    assert_same(again.policy.state_dict(), result.policy.state_dict())


def test_a_checkpoint_at_the_start_every_5_seconds_and_at_the_end(tmp_path, monkeypatch):
    log, now, saved = ppo.Run.log, [0.0], []

    def log_later(run, *rest):
        saved.append(checkpoint(run.dir)["iteration"])
        assert (run.dir / "progress.csv").read_text().count("\n") == run.iteration + bool(run.iteration)
        now[0] += 2.5
        log(run, *rest)

    monkeypatch.setattr(ppo.Run, "log", log_later)
    monkeypatch.setattr(ppo, "time", SimpleNamespace(time=lambda: now[0]))
    run_dir = ppo.train(tiny(ppo, tmp_path, total_timesteps=150)).run_dir
    assert saved == [0, 0, 0, 3, 3, 3, 6] and checkpoint(run_dir)["iteration"] == 7
    assert [float(row["seconds"]) for row in progress(run_dir, without=())][:2] == [2.5, 5.0]


def test_a_resumed_run_has_all_that_was_saved(script, tmp_path):
    """In the episode family it is to the last bit the run that was never stopped."""
    args = tiny(script, tmp_path / "a")
    run_dir = stopped_run(script, args, iterations=4, saved=2)
    saved, first = checkpoint(run_dir, ["args"]), set(Random.seeds)
    with open(run_dir / "progress.csv", "a") as file:
        file.write("123,4")  # a row that was cut off
    stopped_run(script, script.load_args(run_dir), iterations=2, saved=2)  # before anything is done
    assert_same(checkpoint(run_dir, ["args"]), saved)
    optimizers = [name for name in saved if name.endswith("optimizer")]
    assert optimizers and all(saved[name]["state"][0]["exp_avg"].any() for name in optimizers)
    shutil.copytree(run_dir, tmp_path / "copy")
    Random.seeds.clear()
    one, other = resume(script, run_dir), resume(script, tmp_path / "copy")
    assert progress(run_dir) == progress(tmp_path / "copy") and checkpoint(run_dir)["step"] >= 160
    assert checkpoint(run_dir)["seconds"] > saved["seconds"] == 12
    assert_same(one.policy.state_dict(), other.policy.state_dict())
    assert_whole(run_dir)
    if hasattr(args, "num_steps"):
        assert {"value", "reward_scale", "value_optimizer"} <= saved.keys()
        assert ("policy_optimizer" in saved) == hasattr(args, "learning_rate")
        assert len(first) == 4 == len(set(Random.seeds) - first)
    else:
        whole = script.train(dataclasses.replace(args, runs_dir=str(tmp_path / "b"))).run_dir
        different = "args", "seconds", "progress_size"
        assert_same(checkpoint(run_dir, different), checkpoint(whole, different))
        assert progress(run_dir) == progress(whole)


def test_the_command_line_goes_on_with_the_arguments_of_the_run(script, tmp_path, monkeypatch):
    args = tiny(script, tmp_path, gamma=0.9, anneal_lr=False, learning_rate=2e-3, max_kl=0.1)
    run_dir = script.train(args).run_dir
    (run_dir / "args.json").write_text("")  # the arguments stand in the checkpoint
    argv = [script.__file__, "--resume", f"{run_dir}/", "--total-timesteps", "300", "--ent-coef", "0.1"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(script.__file__, run_name="__main__")
    changes = dict(resume=f"{run_dir}/", total_timesteps=300, ent_coef=0.1)
    assert script.load_args(f"{run_dir}/") == dataclasses.replace(args, **changes)
    assert checkpoint(run_dir)["step"] >= 300


def test_tensorboard_holds_the_numbers_of_progress_csv(tmp_path):
    run_dir = stopped_run(ppo, tiny(ppo, tmp_path), iterations=4, saved=2)
    time.sleep(1.1)  # event files are ordered by their names, which have the second
    resume(ppo, run_dir)
    events, rows = EventAccumulator(str(run_dir)).Reload(), progress(run_dir, without=())
    assert set(events.Tags()["scalars"]) == set(rows[0])
    for name in rows[0]:
        scalars = {event.step: event.value for event in events.Scalars(name)}
        assert scalars == pytest.approx({int(row["step"]): float(row[name]) for row in rows}, rel=1e-5)


def test_what_cannot_be_resumed_is_refused_and_left_alone(script, tmp_path):
    def contents():
        return {path.name: path.read_bytes() for path in run_dir.iterdir()}

    run_dir = stopped_run(script, tiny(script, tmp_path / "runs"), iterations=2, saved=2)
    before, other = contents(), importlib.import_module("npg" if script is ppo else "ppo")
    for folder, module in ((tmp_path / "none", script), (tmp_path, script), (run_dir, other)):
        with pytest.raises(ValueError, match=f"--resume {folder} is not a run folder of {module.SCRIPT}.py"):
            module.load_args(str(folder))
    with pytest.raises(RuntimeError, match="size mismatch"):
        resume(script, run_dir, env_id="Pendulum-v1")
    assert contents() == before and list(tmp_path.iterdir()) == [tmp_path / "runs"]
    (run_dir / "progress.csv").write_bytes(before.pop("progress.csv")[:-1])
    with pytest.raises(ValueError, match="progress.csv is shorter than its checkpoint says"):
        resume(script, run_dir)
    (run_dir / "progress.csv").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="progress.csv"):
        resume(script, run_dir)
    assert contents() == before


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_ends_the_run_and_the_checkpoint_before_stays(
    script, tmp_path, monkeypatch, value
):
    save_always(monkeypatch, script)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+: .*\b(nan|inf)\b") as error:
        script.train(tiny(script, tmp_path, env_id=f"environments:{value}-v0", total_timesteps=1000))
    step = int(re.search(r"step (\d+)", str(error.value)).group(1))
    assert step > checkpoint(only_run(tmp_path))["step"] > 0
    assert_whole(only_run(tmp_path))
    assert_finite(only_run(tmp_path))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_error_of_an_environment_comes_through_and_its_processes_end(tmp_path, vectorization):
    args = tiny(ppo, tmp_path, env_id="environments:raises-v0", vectorization=vectorization)
    with pytest.raises(LookupError, match="no such ladder") as error:
        ppo.train(args)
    own_traceback = Path(error.traceback[-1].path).name == "environments.py"
    assert own_traceback == (vectorization == "sync") and not multiprocessing.active_children()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, capfd):
    def fill(*args):
        raise OSError("no space left on device")

    def save_or_fill(state, path, save=torch.save):
        if state["iteration"] == 3:
            Path(path).write_bytes(b"half a checkpoint")
            fill()
        save(state, path)

    with monkeypatch.context() as context, pytest.raises(OSError, match="no space"):
        context.setattr(torch, "save", save_or_fill)
        context.setattr(
            Random, "close", fill
        )  # environments may fail, too, as their processes do at a Ctrl-C
        save_always(context, ppo)
        ppo.train(tiny(ppo, tmp_path))
    run_dir = only_run(tmp_path)
    assert f"to go on: --resume {run_dir}" in capfd.readouterr().out
    assert checkpoint(run_dir)["iteration"] == 2 and len(progress(run_dir)) == 3
    resume(ppo, run_dir)
    assert_whole(run_dir)


def train_in_a_group(args):
    """Train ppo in a process group of its own, with a checkpoint after every iteration."""
    os.setsid()
    save_always(pytest.MonkeyPatch(), ppo)
    ppo.train(args)


def wait_for_rows(runs_dir, rows):
    """Wait until progress.csv has so many rows; returns the run folder."""
    for _ in range(3000):
        if list(Path(runs_dir).glob("*/progress.csv")) and len(progress(only_run(runs_dir))) >= rows:
            return only_run(runs_dir)
        time.sleep(0.02)
    raise TimeoutError


def assert_no_process_is_left(group):
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("a process is left")


@POSIX
def test_killed_at_any_time_a_run_takes_its_processes_along_and_goes_on(tmp_path):
    args, rows = tiny(ppo, tmp_path, total_timesteps=10**9, vectorization="async"), []
    for number in 2 * [signal.SIGTERM, signal.SIGKILL]:
        process = FORK.Process(target=train_in_a_group, args=[args])
        process.start()
        run_dir = wait_for_rows(tmp_path, 3)
        time.sleep(np.random.uniform())
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == -number and progress(run_dir)[: len(rows)] == rows
        assert_no_process_is_left(process.pid)
        saved = checkpoint(run_dir)["iteration"]
        assert len(rows) <= saved <= len(progress(run_dir))
        args, rows = ppo.load_args(run_dir), progress(run_dir)[:saved]
    resume(ppo, run_dir, total_timesteps=checkpoint(run_dir)["step"] + 100)
    assert progress(run_dir)[: len(rows)] == rows
    assert_whole(run_dir)


def command(script, runs_dir, *argv, ctrl_c=True):
    """Start a script as a user does; Ctrl-C is off in the background of a shell."""
    argv = ["--total-timesteps", str(10**9), "--runs-dir", str(runs_dir), *argv]
    handler = signal.default_int_handler if ctrl_c else signal.SIG_IGN
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    own_group = dict(start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, handler))
    return subprocess.Popen([sys.executable, script.__file__, *argv], **pipes, **own_group)


def interrupt(script, runs_dir, *argv):
    """Press Ctrl-C, which every process gets, after some rows; returns standard error."""
    process = command(script, runs_dir, *argv)
    run_dir = wait_for_rows(runs_dir, 3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT  # so that a loop of the shell stops
    assert f"to go on: --resume {run_dir}" in out and err.rstrip().endswith("KeyboardInterrupt")
    assert_no_process_is_left(process.pid)
    return err


@POSIX
def test_ctrl_c_says_how_to_go_on(tmp_path):
    assert "steps/s, episodic_return=" in interrupt(ppo, tmp_path, "--vectorization", "async")


def ctrl_c_in_the_writer(args):
    def log(run, *_):
        run.writer.file_writer.event_writer._async_writer._lock.acquire()
        raise KeyboardInterrupt

    ppo.Run.log = log
    ppo.train(args)


def test_ctrl_c_in_the_writer_of_events_ends_a_run(tmp_path):
    process = FORK.Process(target=ctrl_c_in_the_writer, args=[tiny(ppo, tmp_path)], daemon=True)
    process.start()
    process.join(20)
    assert process.exitcode == 1


def test_a_pool_over_seeds(tmp_path):
    with FORK.Pool(2) as pool:
        results = pool.map_async(ppo.train, [tiny(ppo, tmp_path, seed=seed) for seed in (1, 2, 3)]).get(60)
        with pytest.raises(FloatingPointError):
            pool.apply_async(ppo.train, [tiny(ppo, tmp_path, env_id="environments:nan-v0")]).get(60)
        for result in results:
            assert_whole(result.run_dir)
    assert len({tuple(result.returns) for result in results}) == 3


def test_a_run_of_the_same_microsecond_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 1)))
    run_dir = ppo.train(tiny(ppo, tmp_path)).run_dir
    before = progress(run_dir)
    with pytest.raises(FileExistsError):
        ppo.train(tiny(ppo, tmp_path))
    assert progress(run_dir) == before and only_run(tmp_path) == run_dir
