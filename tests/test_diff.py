"""tools/diff.py shows the lines that `diff` shows, and its pages work: by click, by key, on a phone."""

import importlib
import itertools
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import tyro

pytest.importorskip("markdown"), pytest.importorskip("pygments")
ROOT = Path(__file__).resolve().parents[1]
SITE = Path(ROOT, "docs/site")
tool = importlib.import_module("tools.diff")
PAIRS = {f"{Path(a).stem}-{Path(b).stem}.html": (Path(ROOT, a), Path(ROOT, b)) for a, b, _ in tool.EDGES}
PAGES = [*PAIRS, "index.html", "derivations.html"]


def changed(old, new):
    """The lines that `diff` marks with < and those with >."""
    output = subprocess.run(["diff", old, new], capture_output=True, encoding="utf-8").stdout
    return [re.findall(f"(?m)^{sign} (.*)$", output) for sign in "<>"]


def check(html, old, new):
    """The page has the lines that `diff` has, and every line of the files once and in order."""
    for tag, side, path, lines in zip(("del", "ins"), "LR", (old, new), changed(old, new)):
        shown = re.findall(f"(?s)</a><{tag}>(.*?)</{tag}>(?=<a|</div>)", html)
        assert [unescape(re.sub("<.*?>", "", line)).removesuffix("\n") for line in shown] == lines
        assert html.count(f'<a id="{side}') == len(path.read_text("utf-8").splitlines())


def test_the_site_is_up_to_date_and_has_the_lines_of_diff(tmp_path):
    tool.main(tool.Args(site=tmp_path, open=False))
    files, site = ({p.name: p.read_text("utf-8") for p in d.glob("*")} for d in (tmp_path, SITE))
    old = [name for name in files | site if files.get(name) != site.get(name)]
    assert not old, "to be made again: python tools/diff.py --site docs/site"
    assert sorted(files) == sorted([*PAGES, "family.svg"]) and max(map(len, files.values())) < 400_000
    assert set(re.findall('(?:href|src)="([^#].*?)"', "".join(files.values()))) <= {*files, "data:,"}
    for (name, pair), number in zip(PAIRS.items(), re.findall(r">(\d+) lines<", files["family.svg"])):
        check(files[name], *pair)
        assert f"<b>{number} changed lines</b>" in files[name]
        assert number == str(sum(map(len, changed(*pair))))
    assert '<mark class="s">ppo</mark><span class="s">.py' in files["vpg_gae-ppo.html"]  # but not .py


def test_strange_files_are_shown_and_escaped(tmp_path, capsys):
    old, new, output = tmp_path / "a&b.py", tmp_path / "<new>.py", tmp_path / "folder" / "page.html"
    end = "\n\n# ---- <i>\n" + "y = 1\n" * 20
    texts = ["", "\n", "x", f"s = '</script><b>&amp;' # {{é}}{end}", f"s = '<script>'{end[:-1]}"]
    for old_text, new_text in itertools.product(texts, texts):
        old.write_text(old_text, "utf-8"), new.write_text(new_text, "utf-8")
        check(tool.compare(old, new)[0], old, new)
    tool.main(tyro.cli(tool.Args, args=[str(old), str(new), f"--output={output}", "--no-open"]))
    html = output.read_text("utf-8")
    assert capsys.readouterr().out == f"{output}\n" and html.count("<script") == html.count("</script") == 1
    assert "a&amp;b.py → " in html and "&lt;new&gt;.py" in html and "<h2>&lt;i&gt;</h2>" in html


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(paths):
        pytest.skip("chromium or chromedriver is missing")
    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += f" disable-component-update disable-sync user-data-dir={tmp_path_factory.mktemp('profile')}"
    options.binary_location = paths[0]
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(paths[1])) as browser:
        yield browser


@pytest.fixture
def visit(browser):
    """Load a page; nothing may be written to the console, and nothing else be asked for."""

    def visit(name, width=1400, scheme="light"):
        screen = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.get("about:blank")  # else a new fragment is no new page
        browser.get(f"{SITE.as_uri()}/{name}")
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        return lambda script: browser.execute_script(f"return {script}")

    yield visit
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width, back", [(390, "rgb(13, 17, 23)"), (1400, "rgb(255, 255, 255)")])
def test_every_page_fits_is_light_or_dark_and_shows_all_changed_lines(visit, width, back):
    for name in [*PAGES, "family.svg"]:
        js = visit(name, width, "dark" if width == 390 else "light")
        assert js("getComputedStyle(document.body || document.rootElement).backgroundColor") == back
        assert js("document.documentElement.scrollWidth") <= width or name == "family.svg"
        if name in PAIRS:
            shown = js("[...document.querySelectorAll('del, ins')].filter(x => x.checkVisibility()).length")
            assert shown == sum(map(len, changed(*PAIRS[name])))
            assert js("document.querySelector('.lines > span').checkVisibility()") == (width > 390)


def test_a_fold_opens_by_a_click_and_by_a_link_to_a_line_in_it(visit, browser):
    js, line = visit("vpg_gae-ppo.html"), "document.querySelectorAll('details a')[9].checkVisibility()"
    assert not js(line)
    browser.find_element("css selector", "summary").click()
    assert js(line)
    for number in ("L300", "R300"):
        js = visit(f"vpg_gae-ppo.html#{number}")
        assert js("document.querySelectorAll('details[open]').length") == 1
        assert 0 < js(f"document.getElementById('{number}').getBoundingClientRect().top") < 400


def test_keys_move_a_visible_focus_from_change_to_change(visit, browser):
    js = visit("vpg_gae-ppo.html")
    at = "[...document.querySelectorAll('.change')].indexOf(document.activeElement)"
    for key, place in zip("pnnjpkkn", (-1, 0, 1, 2, 1, 0, 0, 1)):
        browser.switch_to.active_element.send_keys(key)
        assert js(at) == place
    browser.switch_to.active_element.send_keys("nnnnnnnn")
    assert js(at) == 9 and 0 <= js("document.activeElement.getBoundingClientRect().top") < 400
    assert js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert js("location.hash === '#' + document.activeElement.firstChild.id")
