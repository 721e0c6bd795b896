"""What changes from one script to another, as a page: every changed line, and in it the words.

    python tools/diff.py vpg_gae.py ppo.py

`--site docs/site` writes the family, all its diffs and the derivations. The lines are those of `diff`.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["markdown", "pydantic", "pygments", "tyro>=1.0.16"]
# ///

import re
import subprocess
import tempfile
import webbrowser
from difflib import SequenceMatcher
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

import tyro
from markdown import markdown
from pydantic import FilePath
from pydantic.dataclasses import dataclass
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Operator, String

ROOT = Path(__file__).resolve().parents[1]
EDGES = [  # from, to, idea; a file comes from the first that leads to it; depth first
    ("reinforce.py", "reinforce_baseline.py", "baselines"),
    ("reinforce.py", "offpolicy_is.py", "importance weights"),
    ("vpg_gae.py", "npg.py", "natural gradient"),
    ("npg.py", "trpo.py", "surrogate, line search"),
    ("vpg_gae.py", "ppo.py", "ratio, clip, epochs"),
    ("ppo.py", "variants/ppo_kl_penalty.py", "KL penalty for the clip"),
    ("ppo.py", "variants/ppo_lstm.py", "memory"),
    ("ppo.py", "variants/ppo_masked.py", "masks of actions"),
    ("ppo.py", "variants/ppo_atari.py", "Atari games"),
    ("ppo.py", "variants/ppo_torchrun.py", "many processes"),
    ("vpg_gae.py", "a3c_nstep.py", "asynchronous workers"),
    ("trpo.py", "ppo.py", "clip for line search"),
]
COLOURS = {Comment: "c", Keyword: "k", Operator.Word: "k", String: "s", Name.Function: "f", Name.Class: "f"}
THEME = """
:root { --back: #fff; --text: #1f2328; --soft: #505861; --bar: #f3f5f8; --blue: #0550ae; --red: #a40e26;
  --navy: #0a3069; --violet: #6639ba; --del: #ffebe9; --gone: #ffc8c2; --ins: #dafbe1; --came: #a4edb4 }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --soft: #aab3bd; --bar: #1c222b; --blue: #79c0ff; --red: #ff9a94;
    --navy: #a5d6ff; --violet: #d8b9ff; --del: #33181c; --gone: #6b2226; --ins: #12271d; --came: #17482b } }
svg { font: 13px system-ui, sans-serif; text-anchor: middle; background: var(--back); fill: var(--text) }
a { fill: var(--blue) } rect { fill: var(--bar); stroke: var(--soft) } .c { fill: var(--soft) }
path { fill: none; stroke: var(--soft); marker-end: url(#tip) }"""
STYLE = """:root { color-scheme: light dark } svg { max-width: 100% }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3, p, figure { margin: 16px 16px 8px } h1 { font-size: 22px } h2 { font-size: 18px }
article { max-width: 900px; overflow-wrap: break-word } h3 { font-size: 16px } a { color: var(--blue) }
pre, p code, li code { background: var(--bar); font-size: 14px } pre { padding: 8px 16px; overflow: auto }
summary { padding: 4px 16px; background: var(--bar); color: var(--soft); font-size: 14px; cursor: pointer }
:focus-visible, .change:focus { outline: 3px solid var(--blue); outline-offset: -2px }
.c { color: var(--soft) } .k { color: var(--red) } .s { color: var(--navy) } .f { color: var(--violet) }
.lines { display: grid; grid: auto / 4ch 5ch minmax(0, 1fr); font: 12px/1.6 ui-monospace, monospace }
.lines > a { padding-right: 1ch; color: var(--soft); text-align: right; user-select: none }
.lines > * { text-decoration: none; scroll-margin-top: 96px } .lines > span { display: none }
.lines > :not(a) { grid-column: 3; padding-left: 3ch; text-indent: -2ch; font: inherit; white-space: pre-wrap;
  overflow-wrap: anywhere } .lines > :not(a)::before { content: "  " } [id^=L] { grid-column: 1 }
.lines > del::before { content: "- " } del { background: var(--del) } del mark { background: var(--gone) }
.lines > ins::before { content: "+ " } ins { background: var(--ins) } ins mark { background: var(--came) }
mark { color: inherit } a:target + * { box-shadow: inset 4px 0 var(--blue) } [id^=R] { grid-column: 2 }
@media (min-width: 900px) {
  .lines { grid: auto-flow dense / 5ch minmax(0, 1fr) 5ch minmax(0, 1fr) } .lines > [id^=R] { grid-column: 3 }
  .lines > :is(span, del) { grid-column: 2; display: block } .lines > :is(code, ins) { grid-column: 4 } }"""
SCRIPT = """
onhashchange = onload = () => {  // a link to a line opens the fold that it is in
  document.querySelector("details:has(:target)")?.setAttribute("open", "")
  document.querySelector(":target")?.scrollIntoView()
}
onkeydown = event => {  // from the change in focus, or else from the place in sight
  const all = [...document.querySelectorAll(".change")], step = {n: 1, j: 1, p: -1, k: -1}[event.key]
  const at = all.indexOf(document.activeElement), above = all.filter(x => x.offsetTop < scrollY + 99).length
  const next = all[at >= 0 ? at + step : step > 0 ? above : above - 1]
  if (!step || !next || event.ctrlKey || event.metaKey || event.altKey) return
  location.replace("#" + next.firstChild.id); next.focus({preventScroll: true})
}"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style>
<header><h1>{title}</h1><p>{intro}</p></header><main>{main}</main><script>{script}</script></html>\n"""


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[FilePath, FilePath] | None] = None  # two scripts
    site: Path = Path("docs/site")  # folder to write the whole site to, if no scripts are given
    output: Path | None = None  # HTML file to write; by default a temporary one
    open: bool = True  # show the page in the browser


def read(path):
    """The lines of a file, each a list of [word, colour, whether it is marked]."""
    lines = [[]]
    for kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(path.read_text("utf-8")):
        colour = next((c for t, c in COLOURS.items() if kind in t), "")
        for word in re.findall(r"\n|[^\S\n]+|\w+|[^\w\s]", text):
            lines[-1].append([word, colour, False])
            lines += [[]] * (word == "\n")
    return lines if lines[-1] else lines[:-1]


def mark(old, new):
    """Mark the words that only one of two stretches of lines has."""
    sides = [[word for line in lines for word in line] for lines in (old, new)]
    texts = ([text for text, *_ in side] for side in sides)
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, *texts, False).get_opcodes():
        for word in sides[0][i1:i2] + sides[1][j1:j2]:
            word[2] = tag != "equal" and not word[0].startswith("  ")


def cell(side, k, tag, line):
    """A line as HTML, after its number; its words are marked unless most of it would be."""
    few = sum(marked for *_, marked in line) <= len(line) / 2
    html = f'<a id="{side}{k + 1}" href="#{side}{k + 1}" tabindex="-1">{k + 1}</a><{tag}>'
    for (colour, marked), run in groupby(line, lambda word: (word[1], word[2] and few)):
        text, kind = escape("".join(word for word, *_ in run)), "mark" if marked else "span"
        html += f'<{kind} class="{colour}">{text}</{kind}>' if colour or marked else text
    return f"{html}</{tag}>"


def compare(old, new, context=3):
    """What changes from one file to another as HTML, and the number of changed lines."""
    a, b, html, number, i, j = read(old), read(new), "<h2>docstring and arguments</h2>", 0, 0, 0
    texts = ["".join(word for word, *_ in line) for line in a]
    commands = subprocess.run(["diff", old, new], capture_output=True).stdout.decode("utf-8", "replace")
    commands += f"{len(a)}a{len(b) + 1},{len(b)}\n"  # an empty change at the end
    for i1, i2, do, j1, j2 in re.findall(r"(?m)^(\d+),?(\d*)([acd])(\d+),?(\d*)$", commands):
        i1, i2, j1, j2 = int(i1) - (do != "a"), int(i2 or i1), int(j1) - (do != "d"), int(j2 or j1)
        headings = {k: escape(texts[k].strip("# -\n")) for k in range(i, i1) if texts[k].startswith("# ----")}
        for start, end in pairwise(sorted({i, i1, min(i + context, i1), max(i1 - context, i), *headings})):
            row = [cell("L", k, "span", a[k]) + cell("R", k + j - i, "code", a[k]) for k in range(start, end)]
            rows = f'<div class="lines">{"".join(row)}</div>'
            if end - start > context:
                names = ["", *re.findall(r"(?m)^(?:def|class) (\w+)", "".join(texts[start:end]))]
                label = f"{end - start} unchanged lines{' · '.join(names)}"
                rows = f"<details><summary>{label}</summary>{rows}</details>"
            html += f"<h2>{headings[start]}</h2>{rows}" if start in headings else rows
        mark(a[i1:i2], b[j1:j2])
        rows = [cell("L", k, "del", a[k]) for k in range(i1, i2)]
        rows += [cell("R", k, "ins", b[k]) for k in range(j1, j2)]
        html += f'<div class="change lines" tabindex="-1">{"".join(rows)}</div>' if rows else ""
        i, j, number = i2, j2, number + len(rows)
    return html, number


def family(edges):
    """The SVG of who comes from whom: (from, to, idea, page, number of changed lines) of every edge."""
    place, drawn = {}, ""
    for old, new, idea, page, number in edges:
        x1, y1 = place.setdefault(old, (2, 56 * len(place) + 20))
        x2, y2 = place.setdefault(new, (x1 + 208, 56 * len(place) + 20))
        end, x = (x2 - 1, x2 - 92) if x1 < x2 else (x2 + 177, x1 + 104)
        drawn += f"""<a href="{page}"><title>{old} → {new}</title><path d="M{x1 + 20} {y1}V{y2}H{end}"/>
<text x="{x}" y="{y2 - 6}">{idea}</text><text x="{x}" y="{y2 + 16}" class="c">{number} lines</text></a>
"""
    for file, (x, y) in place.items():
        drawn += f'<rect x="{x}" y="{y - 17}" width="176" height="34" rx="6"/>'
        drawn += f'<text x="{x + 88}" y="{y + 4}" font-weight="600">{Path(file).name}</text>\n'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 596 {y + 20}" width="596">
<title>Who comes from whom</title><style>{THEME}</style>
<marker id="tip" overflow="visible" orient="auto"><polygon points="-7,-4 0,0 -7,4" class="c"/></marker>
{drawn}</svg>"""


def main(args):
    """Write the page of two scripts, or else the site, and open it."""
    path = (args.output if args.files else args.site / "index.html") or Path(tempfile.mkdtemp(), "diff.html")
    pages, edges, home = {}, [], "" if args.files else '<a href="index.html">the family</a>'
    for old, new, idea in [(*args.files, "")] if args.files else EDGES:
        html, number = compare(ROOT / old, ROOT / new) if home else compare(old, new)
        name = f"{Path(old).stem}-{Path(new).stem}.html" if home else path.name
        edges.append((old, new, idea, name, number))
        intro = idea, f"<b>{number} changed lines</b>", "key n: next change, p: previous change", home
        pages[name] = escape(f"{old} → {new}"), " · ".join(filter(None, intro)), html
    path.parent.mkdir(parents=True, exist_ok=True)
    if home:
        text = re.sub(r"\$([^$\n]+)\$", r"`\1`", Path(ROOT, "docs/derivations.md").read_text("utf-8"))
        text, depth = "[TOC]\n" + text.split("\n", 1)[1], {"toc": {"toc_depth": 2}}
        text = markdown(text, extensions=["fenced_code", "toc"], extension_configs=depth)
        pages["derivations.html"] = "Derivations", home, f"<article>{text}</article>"
        link, svg = 'Click an arrow for its diff · <a href="derivations.html">derivations</a>', family(edges)
        pages["index.html"] = "Policy gradients, one file each", link, f"<figure>{svg}</figure>"
        Path(path.parent, "family.svg").write_text(svg, "utf-8")
    for name, (title, intro, html) in pages.items():
        page = PAGE.format(title=title, intro=intro, main=html, style=THEME + STYLE, script=SCRIPT)
        Path(path.parent, name).write_text(page, "utf-8")
    print(path)
    if args.open:
        webbrowser.open(path.resolve().as_uri())


if __name__ == "__main__":
    main(tyro.cli(Args))
