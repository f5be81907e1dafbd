"""A stand-in hub for this session, and rehearsals of notebooks against it."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hub
import nbformat
import pytest
from filelock import FileLock
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from saeutils.kernels import files
from saeutils.lm import embedded

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CAP = (
    "shard_tokens=1000,tokens=12000,docs=120,sentences=120,context=64,steps=6,arm_steps=12,hand_steps=3,seeds=2,prompts=2,samples=1,strengths=2,draws=2,generated=6,batch=128,"
    "l0=20,l0_warm_up=3,sets=2,per_class=20,per_cell=12,words=150,cities=16,pairs=2,judged=10,windows=20,loss_docs=1,"
    "sae_steps=8,read=80,top=10,graded=8,stored=100,"
    "width=64,lm_layers=3,block=1,lm_batch=8,vocabulary=1500,lm_steps=2,"
    "studied=10,validation=4,throwaway=8,variants=1,least=0,lms=2,blocks=2,alphas=4,fine=2,texts=3,free=60,stage_1=4,stage_2=6,"
    "features=64,ds=2,iterations=2,ratios=6,lrs=2,layers=2,"
    "toy_features=32,toy_d=16,latents=1000"
)
# on top of CAP: the SAE's own block; sizes that other notebooks have under another meaning, or that must divide
OWN = {"01": ",block=8", "02": ",expansion=2,arm_l1s=1,narrow=1,wider=1,width_steps=4,narrow_l1s=2", "03": ",expansions=2,ks=2,split_k=16,split_steps=6,test=500", "04": ",lms=1,sides=0,width=32,lm_layers=2,lm_batch=2,lrs=1,steps=4,other_steps=1,latents=128,sentences=150,natural=2,natural_docs=120,natural_latents=128,natural_k=4,natural_batch=128,natural_steps=4,chain_steps=3", "05": ",texts=1,docs=200,steps=8,gaussian=4,long=1,test=600,read=50,pairs=1", "06": ",other_l0s=1,seeds=2,judged=5,windows=40,per_class=12,per_cell=6,words=60,sets=1,topics=2,topic_docs=2,loss_docs=2", "07": ",tokens=3", "08": ",copies=2,width=60,widths=1,pool=2000,edge_features=1,ratios=7,every=3,lm_steps=4,lm_batch=128,latents=160,pairs=2"}
FACTS = ("06",)  # asks what the LM knows


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


@pytest.fixture(scope="session")
def environment(endpoint) -> Callable[[Path, Path], dict[str, str]]:
    """``environment(folder, cache)``: a machine that reaches a hub; an empty HF cache in ``folder``, no token, all else as here."""

    def reached(folder: Path, cache: Path) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **ours, "SAEUTILS_CACHE": str(cache)}

    return reached


@pytest.fixture(scope="module")
def kernel(environment, stand_in, shared, request) -> Iterator[KernelManager]:
    """One kernel a file, whose notebooks share its imports; two caches, where archives and a Gemma lie at first: thin, or real."""
    scale = request.module.SCALE
    cache, gemma = shared / f"cache-{scale}", Path(embedded.local_dir("gemma-3-270m"))
    with FileLock(f"{cache}.lock"):
        for size, put in (("thin", hub.thin_gemma), ("real", partial(shutil.copytree, copy_function=os.symlink))):
            if not (here := cache / size / "archives").exists():
                put(gemma, cache / size / "models" / gemma.name)
                here.symlink_to(files.cache_dir("archives"))
    # a job at a time and in the kernel, as where there is one GPU; processes of their own are tried at smoke
    env = environment(cache, cache / "thin") | {"SAEUTILS_SCALE": scale, "OMP_NUM_THREADS": "1", "LOKY_MAX_CPU_COUNT": "1"}
    # LLM-jp's checkpoints are on no hub: they come as folders
    env |= {"SAEUTILS_CHECKPOINTS": str(stand_in / "llm-jp-3-1.8b")} if scale == "paper" else {}
    manager, client = start_new_kernel(kernel_name="python3", env=env, cwd=str(NOTEBOOKS))
    client.stop_channels()
    manager.caches = cache
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def rehearse(kernel) -> Callable[[Path], None]:
    """``rehearse(notebook)`` runs every cell, capped, in an emptied namespace."""

    def run(path: Path) -> None:
        nb = nbformat.read(path, 4)
        number, size = path.name[:2], "real" if path.name[:2] in FACTS else "thin"
        own = {"SAEUTILS_CAP": CAP + OWN.get(number, ""), "SAEUTILS_CACHE": str(kernel.caches / size)}
        emptied = f"%reset -f\nimport gc, os\ngc.collect()\nos.environ.update({own!r})"
        nb.cells.insert(0, nbformat.v4.new_code_cell(emptied))
        NotebookClient(nb, timeout=600, km=kernel).execute()

    return run
