"""What drifts unless a test holds it: the top level, sizes, archives, the shipped SAE, requirements and README's length."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from saeutils.kernels import files
from saeutils.lm import archives

ROOT = Path(__file__).parents[2]
TOP = ["README.md", "requirements.txt", "pyproject.toml", "LICENSE", "notebooks", "saeutils", "tests", "data", "figures"]


def _listed() -> list[str]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("no git here: the top level is compared with what git lists")
    return out.stdout.splitlines()


def test_nothing_else_at_the_top():
    assert {p.split("/")[0] for p in _listed() if not p.startswith(".")} <= set(TOP)


def test_no_file_is_binary_but_weights_and_figures():
    kinds = {Path(p).suffix for p in _listed()}
    assert not kinds & {".pt", ".pkl", ".npy", ".npz", ".bin", ".parquet", ".zst", ".gz"}


def test_data_fits_what_colab_installs():
    shipped = [ROOT / p for p in _listed() if p.startswith("data/")]
    assert sum(p.stat().st_size for p in shipped) <= 105e6
    for folder in {p.parent for p in shipped}:
        assert sum(p.stat().st_size for p in shipped if p.parent == folder) <= 25e6, folder


def test_readme_is_short_and_its_pictures_have_words():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        assert len(alt.split()) >= 3, f"{target} has no alt text"
        assert target.startswith("http") or (ROOT / target).exists(), target
    for target in re.findall(r"(?<!!)\[[^\]]*\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (ROOT / target).exists(), target


def test_archives_are_pinned():
    for name, pin in archives.pinned().items():
        assert re.fullmatch("[0-9a-f]{64}", pin["sha256"]) and pin["size"] > 0 and pin["licence"], name


def test_card_of_the_shipped_sae():
    from sae_lens import SAE

    folder = files.data_dir() / "sae-gemma-3-270m-block12"
    sae = SAE.load_from_disk(folder)
    card = json.loads((folder / "card.json").read_text())
    assert sae.cfg.architecture() == "topk" and sae.cfg.d_sae <= 8192 and sae.cfg.d_in == 640
    assert {"tokens", "l0", "fvu", "loss_recovered", "dead"} <= set(card)
    assert card["loss_recovered"] >= 0.95 and card["dead"] <= 0.05


def test_the_shipped_pair_takes_raw_activations():
    from sae_lens import SAE

    from saeutils import metrics
    from saeutils.analysis import features
    from saeutils.lm import models

    lm = models.load_lm("gemma-3-270m", layers=10, device="cpu")
    ids = lm.to_tokens("Japan is an island country in East Asia. It is in the Pacific Ocean off the northeast coast of the Asian mainland.")
    x = features.residual(lm, "blocks.9.hook_resid_post", ids)[0, 1:].float()
    for name, latents in (("sae-gemma-3-270m-block9", 4096), ("sae-gemma-3-270m-block9-plain", 2064)):
        sae = SAE.load_from_disk(files.data_dir() / name)
        assert sae.cfg.architecture() == "jumprelu" and sae.cfg.d_sae == latents and sae.cfg.metadata.hook_name == "blocks.9.hook_resid_post"
        told = metrics.evaluate(sae, x)
        assert 60 <= told["l0"] <= 120 and told["fvu"] < 0.15, name
