"""Train a matrix of scripts x environments x seeds; every run leaves one small text file.

    python benchmarks/run.py --scripts ppo trpo --env-ids CartPole-v1 --seeds 1 2 3 --jobs 2
    python benchmarks/run.py --scripts ppo --seeds 101 102 --variant lr-1e-3 --flags "--learning-rate 1e-3"

Budgets and flags stand in benchmarks/commands.ini. Runs that are stored with the same arguments are skipped:
the same call continues after a Ctrl-C. A failed run is stored with its error, and tried again next time.
"""

import csv
import importlib
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "reinforce reinforce_baseline offpolicy_is vpg_gae a3c_nstep npg trpo ppo".split()
CURVE = ("step", "episodes", "episodic_return", "seconds")  # columns kept of progress.csv
CURVE_POINTS = 200


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)
    """names of scripts, without .py"""
    env_ids: tuple[str, ...] = ()
    """environments of the table; none are all"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """1 to 10 are for reporting, those from 101 on for tuning"""
    jobs: int = 1
    """processes at a time, of one thread each; a3c_nstep.py has workers of its own"""
    variant: str = ""
    """name of an ablation; its runs are stored apart, in ablations/NAME"""
    flags: str = ""
    """what the variant adds to the flags of the table"""
    dry_run: bool = False
    """only list what would run, and why"""
    commands: Path = ROOT / "benchmarks" / "commands.ini"
    """table of budgets and flags"""
    results: Path = ROOT / "benchmarks" / "results"
    """where the runs are stored"""


def refuse(message):
    """End for bad input: one line on standard error, exit code 2."""
    print(f"run.py: {message}", file=sys.stderr)
    sys.exit(2)


def read_commands(path):
    """{environment: {"total_timesteps": ..., "threshold": ..., script: flags}}, groups filled in."""
    table = ConfigParser(interpolation=None)
    table.read_string(Path(path).read_text())
    groups = {section["like"] for section in table.values() if "like" in section}
    environments = {}
    for env_id in table.sections():
        if unknown := set(table[env_id]) - {"like", "total_timesteps", "threshold", *SCRIPTS}:
            refuse(f"{path}: {env_id} has {', '.join(unknown)}, which is no script")
        if env_id not in groups:
            environments[env_id] = {**table[table[env_id].get("like", env_id)], **table[env_id]}
    return environments


class Job:
    """One training run: its command, its process, and the file of its result."""

    def __init__(self, script, env_id, seed, table, extra_flags, folder):
        self.name = f"{script} {env_id} seed {seed}"
        self.script, self.env_id, self.seed = script, env_id, seed
        self.flags = f"{table.get(script, '')} {extra_flags}".split()
        self.command = f"--env-id {env_id} --seed {seed} --total-timesteps {table['total_timesteps']}".split()
        self.command = [f"{script}.py", *self.command, *self.flags]
        self.path = folder / env_id.replace("/", "-") / f"{script}__{seed}.json"
        cls = importlib.import_module(script).Args
        self.arguments = asdict(tyro.cli(cls, args=self.command[1:], prog=f"{script}.py"))
        self.budget = self.arguments["total_timesteps"]
        for name in ("runs_dir", "resume"):
            del self.arguments[name]
        self.reason = self.reason_to_run(asdict(cls()))

    def reason_to_run(self, defaults):
        """What is wrong with the stored result, "" if nothing is."""
        if not self.path.exists():
            return "new"
        stored = json.loads(self.path.read_text())
        if stored["error"]:
            return stored["error"]
        # a stored run from before an argument existed counts as one with its default
        was = {name: stored["arguments"].get(name, defaults[name]) for name in self.arguments}
        changed = [name for name, value in self.arguments.items() if was[name] != value]
        return ", ".join(f"{name} was {was[name]}, is {self.arguments[name]}" for name in changed)

    def start(self):
        self.folder = TemporaryDirectory()
        self.stderr = Path(self.folder.name, "stderr")
        dirty = "-dirty" if git("status", "--porcelain", "--", self.command[0]) else ""
        self.commit = git("rev-parse", "--short=10", "HEAD") + dirty
        self.process = subprocess.Popen(
            [sys.executable, ROOT / self.command[0], *self.command[1:], "--runs-dir", self.folder.name],
            cwd=self.folder.name,  # MuJoCo leaves a log where it is started
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=self.stderr.open("w"),
            start_new_session=True,  # Ctrl-C comes to us alone, and the group is all that it has started
        )

    def step(self):
        """The step that it has come to."""
        for path in Path(self.folder.name).glob("*/progress.csv"):
            full_lines = path.read_text().rpartition("\n")[0]
            step = full_lines.rpartition("\n")[2].split(",")[0]
            return int(step) if step.isdigit() else 0
        return 0

    def end(self):
        """End an unfinished run and its workers; nothing is kept of it."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.folder.cleanup()

    def store(self):
        """Write the result of the finished process as a whole; returns its record."""
        files = list(Path(self.folder.name).glob("*/progress.csv"))
        rows = [row for row in csv.DictReader(files[0].open()) if row["episodic_return"]] if files else []
        if self.process.returncode:
            last_line = self.stderr.read_text().strip().rpartition("\n")[2]
            error = f"exit code {self.process.returncode}: {last_line}"
        else:
            error = "" if self.step() >= self.budget else f"ended at step {self.step()}"
        last = rows[-1] if rows else dict.fromkeys(CURVE, 0)
        record = {
            "script": self.script,
            "env_id": self.env_id,
            "seed": self.seed,
            "total_timesteps": self.budget,
            "flags": shlex.join(self.flags),
            "error": error,
            "final_return": float(last["episodic_return"]) if rows and not error else None,
            "episodes": int(last["episodes"]),
            "seconds": round(float(last["seconds"]), 1),
            "commit": self.commit,
            "machine": f"{cpu_model()}, {os.cpu_count()} cores",
            "versions": versions(),
            "arguments": self.arguments,
            "curve_columns": CURVE,
            "curve": [],
        }
        count = min(len(rows), CURVE_POINTS)
        thinned = [rows[round((i + 1) * len(rows) / count) - 1] for i in range(count)]
        points = [", ".join(f"{float(row[name]):.7g}" for name in CURVE) for row in thinned]
        text = json.dumps(record, indent=1)
        if points:  # a line each
            text = text.replace('"curve": []', '"curve": [\n  [' + "],\n  [".join(points) + "]\n ]")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".tmp").write_text(text + "\n")
        self.path.with_suffix(".tmp").replace(self.path)
        self.folder.cleanup()
        return record


def git(*command):
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def cpu_model():
    info = open("/proc/cpuinfo") if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions():
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "mujoco"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def outcome(record):
    if record["error"]:
        return f"FAILED: {record['error']}"
    return f"{record['final_return']:.1f} in {tqdm.format_interval(record['seconds'])}"


def run_all(todo, num_processes, signals):
    """Run the jobs, a few at a time, until there is a signal; returns the records of those that ended."""
    waiting, running, records = list(todo), [], []
    start, steps, total = time.time(), 0, sum(job.budget for job in todo)
    bar = tqdm(total=total, unit=" steps", unit_scale=True, smoothing=0, disable=None)
    try:
        while (waiting or running) and not signals:
            while waiting and len(running) < num_processes:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                records.append(job.store())
                steps += job.budget
                left = tqdm.format_interval((time.time() - start) * (total / steps - 1))
                line = f"{len(records)}/{len(todo)}, {left} left: {job.name}: {outcome(records[-1])}"
                tqdm.write(line, file=sys.stderr)
            bar.n = steps + sum(min(job.step(), job.budget) for job in running)
            bar.refresh()
    finally:
        for job in running:
            job.end()
        bar.close()
    return records


def main(args):
    if args.flags and not args.variant:
        refuse("--flags: need a --variant, the table's own runs are kept apart")
    signals = []
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if kind == signal.SIGINT or signal.getsignal(kind) != signal.SIG_IGN:  # nohup stays in force
            signal.signal(kind, lambda kind, _: signals.append(kind))  # an exception could strike anywhere
    table = read_commands(args.commands)
    if unknown := set(args.env_ids) - set(table):
        refuse(f"--env-ids {' '.join(unknown)}: {args.commands} has {' '.join(table)}")
    if missing := [script for script in args.scripts if not Path(ROOT, f"{script}.py").exists()]:
        refuse(f"--scripts {' '.join(missing)}: no such script in {ROOT}")
    sys.path.insert(0, str(ROOT))
    folder = args.results / (f"ablations/{args.variant}" if args.variant else "matrix")
    # seeds outside: whatever is cut off, what is there has as many seeds for every script
    matrix = itertools.product(args.seeds, args.env_ids or table, args.scripts)
    jobs = [Job(script, env_id, seed, table[env_id], args.flags, folder) for seed, env_id, script in matrix]
    todo = [job for job in jobs if job.reason]
    if args.dry_run:
        for job in todo:
            print(f"python {shlex.join(job.command)}  # {job.reason}")
    print(f"{len(todo)} of {len(jobs)} runs to do", file=sys.stderr)
    if args.dry_run or not todo:
        return
    records = run_all(todo, args.jobs, signals)
    failed = sum(bool(record["error"]) for record in records)
    print(f"{len(records)} runs stored, {failed} of them failed", file=sys.stderr)
    if signals:
        print("interrupted; the same call continues", file=sys.stderr)
    sys.exit(128 + signals[0] if signals else bool(failed))


if __name__ == "__main__":
    argv = sys.argv[1:]
    if "--flags" in argv[:-1]:  # tyro takes a value that starts with dashes only behind an equals sign
        at = argv.index("--flags")
        argv[at : at + 2] = [f"--flags={argv[at + 1]}"]
    main(tyro.cli(Args, args=argv))
