"""Models, checkpoints, SAEs and text by their names on the hub, and what is said where it is out of reach."""

import json
import subprocess
import sys

import pytest

from saeutils.kernels import files

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
def said(environment, tmp_path_factory):
    """expression → what a process says that reaches the hub, or one that does not: two processes, as imports take seconds."""
    found = {}
    for codes, reach in (([*REACHED, *REFUSED], {}), ([*OUT_OF_REACH], {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})):
        env = environment(tmp_path_factory.mktemp("hf"), files.cache_dir()) | reach
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
