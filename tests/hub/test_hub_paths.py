"""Every notebook's colab and paper paths, from the first cell to the last, against the stand-in hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from filelock import FileLock

from saeutils.kernels import files
from saeutils.lm import models

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SCALES = ("colab", "paper")
CAP = (
    "shard_tokens=6000,tokens=12000,docs=120,sentences=120,steps=20,arm_steps=12,hand_steps=3,seeds=1,prompts=2,samples=1,strengths=2,draws=2,generated=6,batch=128,"
    "l0=20,l0s=2,l0_warm_up=3,per_class=20,per_cell=12,per_topic=8,words=300,cities=20,pairs=4,judged=10,windows=30,loss_docs=3,"
    "sae_steps=8,read=80,top=10,graded=8,stored=100,"
    "width=64,lm_layers=3,block=1,lm_batch=8,vocabulary=1500,lm_steps=2,"
    "people=12,read_steps=2,free=60,stage_1=4,stage_2=6,least_recall=0,swept=2,alphas=3,biographies=3,"
    "features=64,ds=2,rows=512,iterations=2,ratios=8,trained_features=64,trained_ratios=2,trained_steps=4,lrs=2,lm_lrs=2,"
    "toy_features=32,toy_d=16,toy_latents=60,toy_rows=800,toy_steps=4,toy_l0s=2,toy_l1s=2,latents=1000"
)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def stand_in(shared) -> Path:
    folder = shared / "hub"
    with FileLock(shared / "hub.lock"):
        if not (folder / ".built").exists():
            hub.build(folder)
            (folder / ".built").touch()
    return folder


@pytest.fixture(scope="session")
def endpoint(stand_in):
    with hub.serve(stand_in) as address:
        yield address


def _environment(endpoint: str, folder: Path, cache: Path) -> dict[str, str]:
    """That of a machine that reaches a hub: an empty HF cache in ``folder``, no token, no other setting changed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    reached = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **reached, "SAEUTILS_CACHE": str(cache)}


RUN = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], 4)
NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
"""


def _rehearse(path: Path, scale: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    env = {**env, "SAEUTILS_SCALE": scale, "SAEUTILS_CAP": CAP, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(path.parent)], env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def rehearsal(endpoint, stand_in, shared):
    """scale → environment; each scale has a cache of its own, in which only archives and the embedded model lie at first."""

    def environment(scale: str) -> dict[str, str]:
        folder = shared / f"cache-{scale}"
        for there in (Path(models.local_dir("gemma-3-270m")), files.cache_dir("archives")):
            if not (here := folder / there.relative_to(files.cache_dir())).exists():
                shutil.copytree(there, here, copy_function=os.symlink)
        # LLM-jp's checkpoints are on no hub: they come as folders
        own = {"SAEUTILS_CHECKPOINTS": str(stand_in / "llm-jp-3-1.8b")} if scale == "paper" else {}
        return _environment(endpoint, folder, folder) | own

    return environment


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", [pytest.param(s, marks=pytest.mark.xdist_group(f"hub-{s}")) for s in SCALES])
def test_notebook_runs_on_the_hub(path, scale, rehearsal):
    """A scale's notebooks run one after the other in one worker: 04 takes what 03 has trained, 06 what 05 has."""
    run = _rehearse(path, scale, rehearsal(scale))
    assert run.returncode == 0, run.stderr[-3000:]


REACHED = [
    "text.load_text('openwebtext', max_docs=7).num_rows == 7",
    "text.load_text('kocommercial', max_docs=7).num_rows == 7",
    "text.load_text('wikipedia-ja', max_docs=7).num_rows == text.load_text('wikipedia', max_docs=7).num_rows == 7",
    "list(c := models.checkpoints('EleutherAI/pythia-14m')) == [0, 512, 1000, 143000] and models.load_hf(**c[512])",
    "models.load_lm('gpt2', layers=3).cfg.n_layers == 3",
    "models.load_lm('google/gemma-2-2b', layers=13).cfg.d_model == 2304",
    "SAE.from_pretrained('gpt2-small-resid-post-v5-128k', 'blocks.8.hook_resid_post').cfg.normalize_activations == 'layer_norm'",
    "SAE.from_pretrained('gemma-scope-2b-pt-res-canonical', 'layer_12/width_16k/canonical').cfg.architecture() == 'jumprelu'",
    "SAE.from_pretrained('sae_bench_gemma-2-2b_topk_width-2pow12_date-1109', 'blocks.12.hook_resid_post__trainer_0').cfg.k == 20",
]  # fmt: skip
REFUSED = {
    "models.load_hf('nobody/nothing')": "the hub has no model 'nobody/nothing'; without a hub there are",
    "models.load_hf('meta-llama/Llama-3.2-1B')": "is gated: accept its licence on the hub",
}
OUT_OF_REACH = {
    "models.load_hf('gpt2')": "Without a hub use SCALE = 'laptop'",
    "text.load_text('openwebtext', max_docs=3)": "Without a hub use SCALE = 'laptop'",
}
ASK = """
import json, sys
from sae_lens import SAE
from saeutils.lm import models, text
said = {}
for code in json.load(sys.stdin):
    try:
        said[code] = "right" if eval(code) else "wrong"
    except Exception as error:
        said[code] = f"{type(error).__name__}: {error}"
print("SAID", json.dumps(said))
"""


@pytest.fixture(scope="session")
def said(endpoint, tmp_path_factory):
    """expression → what a process says that reaches the hub, or one that does not: two processes, as imports take seconds."""
    found = {}
    for codes, reach in (([*REACHED, *REFUSED], {}), ([*OUT_OF_REACH], {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})):
        env = _environment(endpoint, tmp_path_factory.mktemp("hf"), files.cache_dir()) | reach
        run = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, input=json.dumps(codes))
        assert run.returncode == 0, run.stderr[-3000:]
        found |= json.loads(run.stdout.rsplit("SAID", 1)[1])
    return found


@pytest.mark.parametrize("code", REACHED)
def test_sources_on_the_hub(code, said):
    assert said[code] == "right"


@pytest.mark.parametrize("code, message", {**REFUSED, **OUT_OF_REACH}.items())
def test_hub_errors_name_the_fix(code, message, said):
    assert message in said[code]
