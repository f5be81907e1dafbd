"""The explorer in JupyterLab, driven in Debian's chromium: what a reader clicks and types, at two widths."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
    pytest.mark.skipif(not importlib.util.find_spec("playwright"), reason="no playwright: pip install playwright"),
    pytest.mark.skipif(not importlib.util.find_spec("jupyterlab"), reason="no JupyterLab"),
]
ROOT = Path(__file__).parents[2]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETUP = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from saeutils import steering
from saeutils.lm import models
from saeutils.notebook import explorer
lm = models.load_lm("bilingual-lm/step-0004000")
torch.manual_seed(0)
sae = TopKSAE(TopKSAEConfig(d_in=lm.cfg.d_model, d_sae=600, k=8, metadata=SAEMetadata(hook_name="blocks.2.hook_resid_post")))
texts = ["The girl went to school with her brother.", "He said that it was too late.", "犬が走っています。"] * 10
opened = []
class Kept(explorer.Explorer):
    def begin(self, *state):
        opened.append(self)
        super().begin(*state)
explorer.Explorer = Kept
"""
SHOW = 'explorer.show(lm, sae, texts=texts, latents=[3], sentence="The girl went to school.", prompt="The girl went", strength=1.0)'


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (SETUP, SHOW)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, folder / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--allow-root", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    own = {"JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".work")}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=os.environ | own, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?reset", folder
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    from playwright.sync_api import Error, sync_playwright

    address, folder = lab
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(60_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            _open(page, address, Error)
            yield page
        finally:
            page.screenshot(path=folder / "last.png")
            browser.close()
        assert not errors


def _open(page, address: str, refused: type[Exception]) -> None:
    for _ in range(60):
        try:
            page.goto(address)
            break
        except refused:
            time.sleep(0.5)
    page.wait_for_selector(".jp-Notebook")
    page.add_locator_handler(page.locator(".jp-Dialog"), lambda dialog: dialog.locator(".jp-mod-accept").click())
    page.wait_for_selector("#jp-main-statusbar >> text=/ipykernel.*Idle/")
    for _ in range(20):  # what is asked before the kernel is there is lost, or answered by a dialog that asks which kernel
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_timeout(1000)
        if page.locator(".jp-InputArea-prompt").first.inner_text()[1:2] in {"*", "1", "2", "3"}:
            break
    page.wait_for_selector(".jp-OutputArea .widget-html >> text=repeated token pairs", timeout=60_000)


def _button(page, name: str):
    return page.locator(".jp-OutputArea .widget-button", has_text=name).first


def _settled(page) -> None:
    """Nothing is grey any more."""
    page.wait_for_timeout(400)
    page.wait_for_function("() => !document.querySelector('.saeutils-old')")


def _ask(page, code: str) -> str:
    """What the kernel prints, asked in a cell at the end."""
    page.locator(".jp-Notebook-footer").click()
    cell = page.locator(".jp-CodeCell").last
    cell.locator(".cm-content").click()
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    page.wait_for_timeout(300)
    return cell.locator(".jp-OutputArea-output").last.inner_text()


def _written(page, name: str) -> str:
    """The text of a column of the comparison, prompt included."""
    cell = page.locator(".jp-OutputArea .widget-html td", has=page.locator(f"b:text-is('{name}')")).first
    return cell.inner_text().split("\n", 1)[1]


def _type(page, placeholder: str, text: str) -> None:
    box = page.locator(f"input[placeholder='{placeholder}']")
    box.fill(text)
    _settled(page)


def test_it_opens_with_its_first_state_and_a_static_rendering_below(page):
    assert page.locator("text=The panel as it opens").count() == 1
    assert _written(page, "before").startswith("The girl went") and _written(page, "after") != _written(page, "before")


def test_sentence_token_card_steer_slider_undo(page):
    _type(page, "a sentence", "He said that it was late.")
    assert page.locator("text=The panel as it opens").count() == 0  # it is used: the static rendering is gone
    _button(page, "that").click()
    _settled(page)
    option = page.locator(".jp-OutputArea select option").first
    label = option.inner_text()
    page.locator(".jp-OutputArea select[size]").first.select_option(index=0)
    _settled(page)
    number = label.split()[0]
    assert page.locator(f"text=latent {number}").first.is_visible()
    before = _written(page, "after")
    _button(page, "steer with this").click()
    page.wait_for_timeout(50)
    slider = page.locator(".widget-slider .noUi-handle").nth(0)
    slider.focus()
    for _ in range(6):  # while text is written
        page.keyboard.press("ArrowRight")
    _settled(page)
    after = _written(page, "after")
    assert after != before
    said = "edits = lambda e: explorer.writing.edits(e.sae, e.hook, e.setting(), e.unit, e._typical)\n" \
        "e = opened[-1]\ns = e.setting()\n" \
        "print(s.prompt + steering.generate(lm, [s.prompt], edits(e), tokens=s.tokens, temperature=s.temperature, seed=s.seed)[0][0])"
    assert " ".join(_ask(page, said).split()) == " ".join(after.split())
    _button(page, "undo").click()
    _settled(page)
    assert _written(page, "after") == before or _written(page, "after") != after


@pytest.mark.parametrize("text", ["猫が好きです。", "😀 party 🎉", "   ", "word " * 2000, "<b>bold</b> & more"])
def test_anything_can_be_typed_and_the_panel_answers(page, text):
    page.locator("input[placeholder='a sentence']").fill(text)
    page.wait_for_timeout(900)
    _type(page, "a sentence", "The girl went.")
    assert _button(page, "girl").is_visible()


@pytest.mark.parametrize("width", [1280, 900])
def test_nothing_is_clipped_or_jumps(page, width):
    page.set_viewport_size({"width": width, "height": 1400})
    page.wait_for_timeout(500)
    area = page.locator(".jp-OutputArea-output .widget-vbox").first.bounding_box()
    for box in page.locator(".jp-OutputArea .widget-vbox input:visible, .jp-OutputArea .widget-vbox button:visible").all()[:40]:
        found = box.bounding_box()
        assert found["x"] >= area["x"] - 2 and found["x"] + found["width"] <= area["x"] + area["width"] + 2
    _type(page, "a prompt", "He said")
    assert page.locator(".jp-OutputArea-output .widget-vbox").first.bounding_box()["height"] == pytest.approx(area["height"], abs=2)
