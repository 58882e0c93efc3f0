"""The page of an analysis, in a real browser: it opens from disk, and its controls work."""

import re
import shutil
import time

import numpy as np
import pytest
from analysis_test import TOKENS, pretrained

from nrgpt_jax.analysis.examination import examine
from nrgpt_jax.analysis.report import report
from nrgpt_jax.analysis.webpage import webpage

pytestmark = pytest.mark.ci

FIND = """
const find = (root, selector) => {
  const here = root.querySelector(selector);
  if (here) return here;
  for (const element of root.querySelectorAll("*")) {
    const inside = element.shadowRoot && find(element.shadowRoot, selector);
    if (inside) return inside;
  }
  return null;
};
return find(document, arguments[0]);"""
READOUT = "return Bokeh.documents[0].get_model_by_name('readout').text"
VISIBLE = """
const probe = document.createElement("div");
probe.innerHTML = arguments[0];
return probe.textContent;"""
HOSTILE = "</script></title><img/src=x/onerror=window.reached=1>"
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --disable-quic "
    "--host-resolver-rules=MAP*~NOTFOUND --window-size=1320,1000"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    odd = ["<eos>", "<i>", "&amp;", "<", HOSTILE, *"fghijk"]
    trained = pretrained(odd, mask="strict", norm="layer_norm", inference_rate="gamma")
    found = examine(trained, TOKENS, num_steps=7)  # as in analysis_test: compiled once
    path = tmp_path_factory.mktemp("page") / "analysis.html"
    page = webpage(found, f"a <small> model{HOSTILE}", report(found) + HOSTILE)
    path.write_text(page, encoding="utf-8")
    return found, path


@pytest.fixture(scope="module")
def browser():
    chrome = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chrome or not driver:
        pytest.skip("needs chromium (or google-chrome) and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for option in OPTIONS.split():
        options.add_argument(option.replace("~", " ").replace("MAP*", "MAP *"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def test_it_is_self_contained_and_small(page):
    _, path = page
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 5e6
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=", text)


def test_what_it_shows_is_text(page):
    _, path = page
    text = path.read_text(encoding="utf-8")
    assert "<img/src=x" not in text
    assert "</script></title>" not in text
    assert "img/src=x/onerror" in text


def wait_for(read, condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition(read()):
        assert time.monotonic() < end, read()
        time.sleep(0.05)
    return read()


def energy_in(text):
    return float(re.findall(r"energy <b>(-?[\d.]+)", text)[0])


def test_the_slider_and_the_choice_of_a_token(page, browser):
    found, path = page
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    browser.get(path.as_uri())
    total, depth = found.path.energies["total"], found.depth
    read = lambda: browser.execute_script(READOUT)
    wait_for(lambda: browser.execute_script("return typeof Bokeh"), lambda kind: kind == "object")
    text = wait_for(read, lambda text: f"step <b>{depth}</b>" in text)
    assert energy_in(text) == pytest.approx(total[depth, 7], abs=0.006)
    handle = browser.execute_script(FIND, ".noUi-handle")
    handle.send_keys(keys.ARROW_RIGHT)
    handle.send_keys(keys.ARROW_RIGHT)
    text = wait_for(read, lambda text: f"step <b>{depth + 2}</b>" in text)
    assert energy_in(text) == pytest.approx(total[depth + 2, 7], abs=0.006)
    browser.execute_script(FIND, "select").send_keys(keys.ARROW_UP)
    text = wait_for(read, lambda text: "token 6" in text)
    assert energy_in(text) == pytest.approx(total[depth + 2, 6], abs=0.006)
    shown = browser.execute_script(
        "return Bokeh.documents[0].get_model_by_name('tokens').data_source.data.energy"
    )
    values = np.array(list(shown.values()) if isinstance(shown, dict) else shown)
    np.testing.assert_allclose(values, total[depth + 2], rtol=1e-4)
    for step in range(found.num_steps + 1):
        browser.execute_script(
            "Bokeh.documents[0].get_model_by_name('step').value = arguments[0]", step
        )
        text = wait_for(read, lambda text, step=step: f"step <b>{step}</b>" in text)
        shown = browser.execute_script(VISIBLE, text)
        best = found.vocabulary[found.predictions.tokens[step, 6, 0]]
        assert f"token 6 {found.symbols[6]}: " in shown
        assert f"next {best} (" in shown
    assert browser.execute_script(FIND, "h2").text == f"a <small> model{HOSTILE}"
    assert browser.execute_script("return window.reached") is None
    errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors
