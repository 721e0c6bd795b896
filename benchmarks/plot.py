"""Every figure and table of the benchmark, from the runs stored by benchmarks/run.py alone.

    python benchmarks/plot.py

Writes figures/*.svg and *.png and results/tables.md, and replaces what stands in README.md between the
comments <!-- results --> and <!-- /results -->.

The interquartile mean, its stratified bootstrap intervals and the performance profile are those of Agarwal et
al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv:2108.13264 (rliable).
"""

import csv
import json
import os
import re
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
COLORS = {  # Okabe and Ito's, which the colour-blind can tell apart, with a grey for their yellow
    "reinforce": "#999999",
    "reinforce_baseline": "#000000",
    "offpolicy_is": "#56B4E9",
    "vpg_gae": "#009E73",
    "a3c_nstep": "#CC79A7",
    "npg": "#E69F00",
    "trpo": "#D55E00",
    "ppo": "#0072B2",
}
DASHED = ("reinforce", "reinforce_baseline", "offpolicy_is")  # the episode family


@dataclass
class Args:
    results: Path = HERE / "results"
    """where run.py stored the runs; tables.md is written there"""
    figures: Path = HERE / "figures"
    """where the figures are written"""
    readme: Path = HERE.parent / "README.md"
    """its section of results is replaced, if it has one"""
    commands: Path = HERE / "commands.ini"
    """order, groups and thresholds of the environments"""
    published: Path = HERE / "published.csv"
    """published scores, and those of random actions"""


# ---------------------------------------------------------------------------- data


def load(folder, env_ids):
    """{environment: {script: its runs by seed}}, in the order of env_ids, and remarks on odd runs."""
    runs, remarks = {env_id: {script: [] for script in COLORS} for env_id in env_ids}, []
    records = [json.loads(path.read_text()) for path in folder.glob("*/*__*.json")]
    for run in sorted(records, key=lambda run: run["seed"]):
        name = f"{run['script']}.py {run['env_id']} seed {run['seed']}"
        if run["error"] or run["env_id"] not in runs:
            remarks.append(f"{name} is left out: {run['error'] or 'its environment is not in the commands'}")
            continue
        group = runs[run["env_id"]][run["script"]]
        group.append(run)
        if {**run["arguments"], "seed": 0} != {**group[0]["arguments"], "seed": 0}:
            remarks.append(f"{name} has other arguments than seed {group[0]['seed']}")
    runs = {env_id: {script: group for script, group in x.items() if group} for env_id, x in runs.items()}
    return {env_id: scripts for env_id, scripts in runs.items() if scripts}, remarks


def column(run, name):
    """step, episodes, episodic_return (mean of the last 100 training episodes) or seconds: (points,)"""
    return np.array(run["curve"])[:, run["curve_columns"].index(name)]


def final_returns(group):
    return np.array([run["final_return"] for run in group])


def curves(group, points=100):
    """A grid of steps, and the returns and seconds of all runs there: (points,), (runs, points) twice"""
    steps = [column(run, "step") for run in group]
    grid = np.linspace(max(x[0] for x in steps), min(x[-1] for x in steps), points)
    returns = [np.interp(grid, x, column(run, "episodic_return")) for x, run in zip(steps, group)]
    seconds = [np.interp(grid, x, column(run, "seconds")) for x, run in zip(steps, group)]
    return grid, np.array(returns), np.array(seconds)


def steps_to(threshold, group):
    """For every run the first step with a mean of 100 episodes that high, infinite if there is none."""
    steps = []
    for run in group:
        reached = (column(run, "episodic_return") >= threshold) & (column(run, "episodes") >= 100)
        steps.append(float(column(run, "step")[reached][0]) if reached.any() else float("inf"))
    return steps


def normalize(scores, env_id, published):
    """0 is the return of random actions, 1 the highest score in published.csv."""
    known = {algorithm: float(row["score"]) for (e, algorithm), row in published.items() if e == env_id}
    zero = known.pop("random")
    return (scores - zero) / (max(known.values()) - zero)


# ---------------------------------------------------------------------------- statistics


def iqm(scores):
    """The interquartile mean over runs, without the lowest and the highest quarter: (runs, ...) -> (...)"""
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(0)


def bootstrap(strata, statistic, repetitions=1000):
    """95% interval of statistic(strata), each of shape (runs, ...) having its runs drawn with replacement."""
    random = np.random.default_rng(0)
    draws = [[x[random.integers(len(x), size=len(x))] for x in strata] for _ in range(repetitions)]
    return np.percentile([statistic(draw) for draw in draws], [2.5, 97.5], axis=0)


def iqm_interval(scores):
    return bootstrap([scores], lambda strata: iqm(strata[0]))


def profile(strata, taus):
    """The share of runs with a score of tau or more, a mean over environments: (runs,) each -> (taus,)"""
    return np.mean([(scores[:, None] >= taus).mean(0) for scores in strata], axis=0)


# ---------------------------------------------------------------------------- tables


def markdown(head, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def format_steps(steps, _=None):
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps else "0"


def spread(scores):
    digits = 0 if abs(mean(scores)) >= 1000 else 1
    deviation = f" ± {stdev(scores):.{digits}f}" if len(scores) > 1 else ""
    return f"{mean(scores):.{digits}f}{deviation} ({len(scores)})"


def by_group(runs, settings, head, cell):
    """A table of scripts x environments for every group of environments in the settings."""
    tables = []
    for name in dict.fromkeys(settings[env_id].get("like") for env_id in runs):
        env_ids = [env_id for env_id in runs if settings[env_id].get("like") == name]
        scripts = [script for script in COLORS if any(script in runs[env_id] for env_id in env_ids)]
        rows = [
            [f"`{x}.py`", *(cell(e, x, runs[e][x]) if x in runs[e] else "" for e in env_ids)] for x in scripts
        ]
        tables.append(markdown(["", *map(head, env_ids)], rows))
    return "\n".join(tables)


def final_table(runs, settings, published):
    def cell(env_id, script, group):
        ours, theirs = spread(final_returns(group)), published.get((env_id, script))
        if not theirs:
            return f"{ours}; -"
        if len(final_returns(group)) > 1 and mean(final_returns(group)) >= float(theirs["score"]):
            ours = f"**{ours}**"
        return f"{ours}; {theirs['score']}"

    def head(env_id):
        budgets = {run["total_timesteps"] for group in runs[env_id].values() for run in group}
        return f"{env_id}, {' or '.join(map(format_steps, sorted(budgets)))}"

    return by_group(runs, settings, head, cell)


def median_steps(threshold, group):
    """The median of steps_to, or - where it is not finite, and how many seeds get there."""
    steps = steps_to(float(threshold), group)
    half = f"{median(steps):,.0f}" if np.isfinite(median(steps)) else "-"
    return f"{half} ({np.isfinite(steps).sum()} of {len(steps)})"


def efficiency_table(runs, settings):
    def cell(env_id, script, group):
        return median_steps(settings[env_id]["threshold"], group)

    return by_group(runs, settings, lambda env_id: f"{env_id}, {settings[env_id]['threshold']}", cell)


def flags_table(runs):
    """The environments that a script was given the same flags on; those without flags are left out."""
    env_ids = {}
    for env_id, script, group in ((e, x, group) for e in runs for x, group in runs[e].items()):
        for flags in dict.fromkeys(run["flags"] for run in group if run["flags"]):
            env_ids.setdefault((script, flags), []).append(env_id)
    rows = [[f"`{script}.py`", ", ".join(e), f"`{flags}`"] for (script, flags), e in env_ids.items()]
    return rows and markdown(["", "environments", "flags"], rows)


def seeds_and_flags(group):
    seeds = ", ".join(str(run["seed"]) for run in group)
    return seeds, f"`{group[0]['flags']}`" if group[0]["flags"] else ""


def long_table(runs, published):
    head = "environment,script,seeds,mean ± std,IQM,its 95% interval,worst,seconds,published,source,flags"
    rows = []
    for env_id, script, group in ((e, x, group) for e in runs for x, group in runs[e].items()):
        scores, (seeds, flags) = final_returns(group), seeds_and_flags(group)
        low, high = iqm_interval(scores)
        numbers = [spread(scores), f"{iqm(scores):.1f}", f"{low:.1f} to {high:.1f}", f"{min(scores):.1f}"]
        seconds = f"{median(run['seconds'] for run in group):.0f}"
        row = published.get((env_id, script), {"score": "-", "std": "", "source": ""})
        theirs = f"{row['score']} ± {row['std']}" if row["std"] else row["score"]
        rows.append([env_id, script, seeds, *numbers, seconds, theirs, row["source"], flags])
    return markdown(head.split(","), rows)


def ablation_table(folder, settings, remarks):
    """All variants; what is odd about them is added to the remarks."""
    rows, env_ids = [], settings.sections()
    for variant in sorted({path.parents[1] for path in folder.rglob("*__*.json")}):
        name, (runs, odd) = str(variant.relative_to(folder)), load(variant, env_ids)
        remarks += [f"{name}: {line}" for line in odd]
        for env_id, script, group in ((e, x, group) for e in runs for x, group in runs[e].items()):
            seeds, flags = seeds_and_flags(group)
            threshold = settings[env_id]["threshold"]
            steps = f"{threshold}: {median_steps(threshold, group)}"
            rows.append([env_id, script, name, spread(final_returns(group)), steps, seeds, flags])
    rows.sort(key=lambda row: (env_ids.index(row[0]), row))
    head = "environment,script,variant,mean ± std,median steps to a return,seeds,flags".split(",")
    return rows and markdown(head, rows)


def conditions(runs):
    """The machines, versions and commits of all runs, with how many runs have each."""
    every = [run for scripts in runs.values() for group in scripts.values() for run in group]
    count = {}
    for run in every:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        for line in (f"{run['machine']}", versions, f"commit {run['commit']}"):
            count[line] = count.get(line, 0) + 1
    return "".join(f"- {line}: {number} runs\n" for line, number in count.items())


# ---------------------------------------------------------------------------- figures

STYLE = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E5E5E5", "svg.hashsalt": "0"}


def new_figure(runs):
    """A figure, and its panels with their environments."""
    import matplotlib.pyplot as plt

    plt.rcParams |= STYLE
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    size = 1 + 3.7 * max(2, columns), 1 + 2.6 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(h_pad=0.1)
    for ax in axes.flat[len(runs) :]:
        ax.remove()
    for ax, env_id in zip(axes.flat, runs):
        ax.set_title(env_id)
    return figure, list(zip(axes.flat, runs.items()))


def draw(ax, x, y, script, band=None):
    style = "--" if script in DASHED else "-"
    ax.plot(x, y, style, color=COLORS[script], label=f"{script}.py")
    if band is not None:
        ax.fill_between(x, *band, color=COLORS[script], alpha=0.15, linewidth=0)


def save(figure, title, path):
    """One legend for all panels, and a white background, which a dark page shows as it is."""
    handles = {}
    for ax in figure.axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    handles = {f"{script}.py": handles[f"{script}.py"] for script in COLORS if f"{script}.py" in handles}
    place = {"loc": "outside upper left", "ncols": 4, "frameon": False, "alignment": "left"}
    figure.legend(handles.values(), handles, title=title, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=100)


def plot_learning_curves(runs, path):
    figure, panels = new_figure(runs)
    for ax, (_, scripts) in panels:
        for script, group in scripts.items():
            steps, returns, _ = curves(group)
            draw(ax, steps, iqm(returns), script, iqm_interval(returns))
        ax.xaxis.set_major_formatter(format_steps)
        ax.set(xlabel="environment steps", ylabel="return")
    save(figure, "Mean of the last 100 training episodes: interquartile mean over seeds, 95% interval", path)


def plot_wall_clock(runs, path):
    figure, panels = new_figure(runs)
    for ax, (_, scripts) in panels:
        for script, group in scripts.items():
            _, returns, seconds = curves(group)
            draw(ax, seconds.mean(0), iqm(returns), script)
        ax.set(xlabel="seconds", ylabel="return", xscale="log")
        ax.set_xlim(ax.dataLim.x1 / 300, ax.dataLim.x1 * 1.3)  # the first moments would take half of it
        ax.xaxis.set_major_formatter("{x:g}")
    save(figure, "Mean of the last 100 training episodes: interquartile mean over seeds", path)


def plot_sample_efficiency(runs, settings, path):
    figure, panels = new_figure(runs)
    names = [script for script in COLORS if any(script in scripts for scripts in runs.values())]
    for index, (ax, (env_id, scripts)) in enumerate(panels):
        threshold = settings[env_id].getfloat("threshold")
        for script, group in scripts.items():
            y, steps = names.index(script), steps_to(threshold, group)
            reached = [x for x in steps if np.isfinite(x)]
            ax.plot(reached, [y] * len(reached), "o", color=COLORS[script], alpha=0.5, ms=5, mew=0)
            if np.isfinite(median(steps)):
                ax.plot(median(steps), y, "|", color=COLORS[script], ms=14, mew=3)
            share = f"{len(reached)} of {len(steps)}"
            ax.text(1.01, y, share, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        ax.set_yticks(range(len(names)), [f"{x}.py" for x in names] if index % 3 == 0 else [""] * len(names))
        ax.set(xlim=(0, max(run["total_timesteps"] for group in scripts.values() for run in group)))
        ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"steps to a return of {threshold:g}")
        ax.xaxis.set_major_formatter(format_steps)
    save(figure, "Steps until the mean of 100 episodes is high enough: dots are seeds, bars medians", path)


def plot_profile(runs, published, path):
    """Only over environments that every script was run on: all shall have stood the same test."""
    scripts = [script for script in COLORS if any(script in group for group in runs.values())]
    env_ids = [e for e in runs if set(scripts) == set(runs[e]) and (e, "random") in published]
    figure, [(ax, _)] = new_figure({"": {}})
    taus = np.linspace(0, 1.2, 121)
    for script in scripts if env_ids else ():
        strata = [normalize(final_returns(runs[e][script]), e, published) for e in env_ids]
        draw(ax, taus, profile(strata, taus), script, bootstrap(strata, lambda draw: profile(draw, taus)))
    ax.set(
        xlabel="τ: 0 is random actions, 1 the highest published score", ylabel="share of runs at τ or above"
    )
    over = ", ".join(env_ids) if len(env_ids) < 4 else f"{len(env_ids)} environments"
    save(figure, f"Performance profile over {over}; 95% interval", path)


# ---------------------------------------------------------------------------- files

FINAL = """\
Mean ± sample standard deviation over seeds (how many) of the mean return of the last 100 training episodes,
at the budget of steps in the head; after the semicolon a published score of the algorithm, perhaps at another
budget. Bold: not below it, over more than one seed.
"""
EFFICIENCY = """\
Median steps until the mean of 100 episodes reaches the return in the head (how many seeds do):
"""
FLAGS = """\
Every run is `python SCRIPT.py --env-id ENVIRONMENT --seed SEED --total-timesteps BUDGET`, and these flags:
"""


def main(args):
    settings = ConfigParser(interpolation=None)
    settings.read_string(args.commands.read_text())
    with open(args.published) as file:
        published = {(row["environment"], row["algorithm"]): row for row in csv.DictReader(file)}
    runs, remarks = load(args.results / "matrix", settings.sections())
    for line in remarks:
        print(f"plot.py: {line}", file=sys.stderr)
    if not runs:
        sys.exit(f"plot.py: no runs in {args.results / 'matrix'}")

    plot_learning_curves(runs, args.figures / "learning_curves")
    plot_wall_clock(runs, args.figures / "wall_clock")
    plot_sample_efficiency(runs, settings, args.figures / "sample_efficiency")
    plot_profile(runs, published, args.figures / "profile")

    final = f"{FINAL}\n{final_table(runs, settings, published)}"
    efficiency = f"{EFFICIENCY}\n{efficiency_table(runs, settings)}"
    tables = {
        "Final returns": final,
        "Sample efficiency": efficiency,
        "All numbers": long_table(runs, published),
        "Ablations": ablation_table(args.results / "ablations", settings, remarks),
        "Machine, versions, commits": conditions(runs),
        "Remarks": "".join(f"- {line}\n" for line in remarks),
    }
    text = "".join(f"\n## {title}\n\n{table}" for title, table in tables.items() if table)
    head = "# Tables of the benchmark\n\nMade by `python benchmarks/plot.py`.\n"
    (args.results / "tables.md").write_text(head + text)

    def image(name, text):
        return f"![{text}]({os.path.relpath(args.figures / name, args.readme.parent)}.svg)\n"

    link = os.path.relpath(args.results / "tables.md", args.readme.parent)
    section = [final, f"Seeds, intervals, times and sources: [{link}]({link}).\n"]
    section += [FLAGS, flags] if (flags := flags_table(runs)) else []
    section += [image("learning_curves", "Learning curves in every environment"), efficiency]
    section += [image("wall_clock", "Return against seconds"), image("profile", "Performance profile")]
    if args.readme.exists():
        text = "<!-- results -->\n" + "\n".join(section) + "<!-- /results -->"
        old = args.readme.read_text()
        args.readme.write_text(re.sub("<!-- results -->.*<!-- /results -->", lambda _: text, old, flags=re.S))


if __name__ == "__main__":
    main(tyro.cli(Args))
