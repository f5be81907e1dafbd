"""Several gloo processes train what one trains, from the same global batches; checkpoints move between them; a death is told."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist

from saeutils.kernels import ranks
from saeutils.saes import (
    GBATrainingSAE,
    GBATrainingSAEConfig,
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseJumpReLUTrainingSAE,
    SparseJumpReLUTrainingSAEConfig,
    SparseStandardTrainingSAE,
    SparseStandardTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)
from saeutils.training import train

pytestmark = pytest.mark.cluster
ROOT, D, LATENTS = Path(__file__).parents[2], 32, 256


def data(steps: int, size: int = 64) -> list[torch.Tensor]:
    """Rows from a hidden dictionary with few active directions, so that some latents die."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(100, D, generator=g), dim=1)
    f = torch.rand(steps * size, 100, generator=g) * (torch.rand(steps * size, 100, generator=g) < 0.04)
    x = f @ W + 0.5
    return list((x / x.pow(2).sum(1).mean().sqrt()).split(size))


def sae(kind: str, dtype: str = "float32"):
    torch.manual_seed(1)
    of = dict(d_in=D, d_sae=LATENTS, dtype=dtype)
    return {
        "topk": lambda: SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(k=4, **of)),
        "batchtopk": lambda: SparseBatchTopKTrainingSAE(SparseBatchTopKTrainingSAEConfig(k=4, **of)),
        "jumprelu": lambda: SparseJumpReLUTrainingSAE(SparseJumpReLUTrainingSAEConfig(target_l0=4.0, jumprelu_bandwidth=0.05, jumprelu_init_threshold=0.02, **of)),
        "relu": lambda: SparseStandardTrainingSAE(SparseStandardTrainingSAEConfig(l1_coefficient=0.05, **of)),
        "gba": lambda: GBATrainingSAE(GBATrainingSAEConfig(d_in=D, d_sae=260)),
    }[kind]()


def run(kind: str, dtype: str, steps: int, folder: Path | None, **more) -> dict:
    """What a training run ends with."""
    own, size = sae(kind, dtype), more.pop("size", 64)
    if kind == "jumprelu":  # SAELens keeps θ in float32 whatever the rest is in: one of its roundings is 1e-8
        own.threshold.data = own.threshold.data.to(own.dtype)
    batches = data(max(steps, 200), size)
    settings = dict(lr=1e-3, warm_up=10, decay=0, dead_window=3, log_every=20, checkpoint=folder, checkpoint_every=50, progress=False)
    history = train(own, lambda start=0: iter(batches[start:]), steps, **settings | more)
    return {"weights": {n: v.double().clone() for n, v in own.state_dict().items()}, "history": history}


def process(rank: int, port: int, out: Path, kind: str, dtype: str, steps: int, folder: Path | None, more: dict, world: int, dies: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SAEUTILS_CACHE": str(out), "TQDM_DISABLE": "1"}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    if dies >= 0 and rank == dies:
        more = more | {"log_every": 1, "callback": lambda step, *_: os.kill(os.getpid(), signal.SIGKILL) if step == 73 else None}
    elif dies >= 0:
        more = more | {"log_every": 1, "callback": lambda step, *_: None}
    more = {k: v[rank] if isinstance(v, list) else v for k, v in more.items()}  # a list: of each process another
    try:
        torch.save(run(kind, dtype, steps, folder, **more), out / f"{rank}.pt")
        dist.barrier()
    except (ValueError, RuntimeError) as error:
        (out / f"{rank}.txt").write_text(str(error))
        os._exit(3)  # gloo's own farewell would wait for the dead


@pytest.fixture(scope="module")
def start():
    context = tiny.forks("sae_lens", "saeutils.training.loop", "saeutils.saes.gba")

    def together(out: Path, kind: str, dtype: str = "float32", steps: int = 200, folder: Path | None = None, world: int = 2, dies: int = -1, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out.mkdir(exist_ok=True)
        all_ = [context.Process(target=process, args=(r, port, out, kind, dtype, steps, folder, more, world, dies)) for r in range(world)]
        for one in all_:
            one.start()
        for one in all_:
            one.join(120)
        return [torch.load(out / f"{r}.pt", weights_only=False) if (out / f"{r}.pt").exists() else None for r in range(world)]

    return together


def apart(a: dict, b: dict) -> float:
    return max(float((a["weights"][n] - b["weights"][n]).abs().max()) for n in a["weights"])


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "relu"])
def test_two_give_what_one_gives(start, kind, tmp_path):
    one, (first, second) = run(kind, "float64", 200, None), start(tmp_path / "64", kind, "float64")
    assert apart(first, second) == 0
    assert apart(one, first) < 1e-9
    for column in ("dead", "samples", "lr", "l0", "fvu"):
        assert one["history"][column].tolist() == pytest.approx(first["history"][column].tolist(), rel=1e-5 if column == "fvu" else 1e-9)  # FVU is taken in float32
    assert kind == "relu" or one["history"]["dead"].max() > 0, "nothing died: dead counts were not tried"
    one, (first, second) = run(kind, "float32", 200, None), start(tmp_path / "32", kind, "float32")
    assert apart(first, second) == 0
    assert one["history"]["loss"].to_numpy() == pytest.approx(first["history"]["loss"].to_numpy(), rel=1e-4)


def test_the_choice_of_batchtopk_is_over_all_rows():
    """What each process keeps of its part is what one process keeps of the whole."""
    values = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0])
    assert ranks.largest(values, 3).tolist() == [0, 2, 3] and ranks.largest(values, 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind, close", [("batchtopk", 1e-9), ("jumprelu", 3e-8)])  # θ is saved in float32
def test_checkpoints_of_two_resume_as_one_and_the_other_way_round(start, kind, close, tmp_path):
    whole = run(kind, "float64", 200, None)
    start(tmp_path / "a", kind, "float64", 100, tmp_path / "two-one", decay=0)
    relabel(tmp_path / "two-one", 200)
    assert apart(whole, run(kind, "float64", 200, tmp_path / "two-one")) < close
    run(kind, "float64", 100, tmp_path / "one-two")
    relabel(tmp_path / "one-two", 200)
    assert apart(whole, start(tmp_path / "b", kind, "float64", 200, tmp_path / "one-two")[0]) < close


def relabel(folder: Path, steps: int) -> None:
    """A run that was meant for so many steps and stopped before: only its options say what it was meant for."""
    from saeutils.kernels import files

    for path in folder.glob("step-*"):
        extra = torch.load(path / "extra.pt", weights_only=True)
        torch.save(extra | {"steps": steps}, path / "extra.pt")
        (path / "sha256.json").unlink()
        files.seal(path)


@pytest.mark.parametrize("dies", [0, 1])
def test_one_that_dies_ends_the_run_with_a_sentence_and_a_checkpoint(start, dies, tmp_path):
    start(tmp_path / "out", "batchtopk", "float64", 200, tmp_path / "run", dies=dies)
    told = (tmp_path / "out" / f"{1 - dies}.txt").read_text()
    assert "one of the 2 processes died, or was asked to end, after step 73; saved is step 73: the same command goes on from there" in told
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000050", "step-00000073"]
    one = run("batchtopk", "float64", 200, tmp_path / "run", log_every=1)
    assert apart(one, run("batchtopk", "float64", 200, None)) < 1e-9


@pytest.mark.parametrize("kind, more, message", [
    ("topk", dict(lr=[1e-3, 2e-3]), "the 2 processes differ in lr: give all the same, and one folder of checkpoints that all see"),
    ("topk", dict(seed=[0, 1], dead=["none", "aux_k"]), "the 2 processes differ in dead, seed"),
    ("topk", dict(size=[64, 32]), "the 2 processes differ in batch, rows"),
    ("topk", dict(log_every=[10, 20]), "the 2 processes differ in log_every"),
    ("topk", dict(median_rows=[0, 128]), "the 2 processes differ in median_rows"),
    ("topk", dict(size=63), "batches of 63 rows cannot be divided among 2 processes"),
    ("gba", {}, "GBATrainingSAE cannot be trained by several processes; these can"),
])  # fmt: skip
def test_what_cannot_be_is_told_before_work_starts(start, kind, more, message, tmp_path):
    start(tmp_path, kind, steps=20, **more)
    assert all(message in (tmp_path / f"{rank}.txt").read_text() for rank in range(2))


def test_the_script_makes_an_sae_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saeutils.training.ddp"]
    command += ["--lm", tiny.saved("llama"), "--hook", "blocks.1.hook_resid_post", "--text", "tatoeba", "--documents", "300", "--architecture", "batchtopk"]
    command += ["--latents", "64", "--l0", "4", "--steps", "40", "--batch", "64", "--every", "20", "--out", str(tmp_path / "sae")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "SAEUTILS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'fvu'" in done.stdout and json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert (tmp_path / "sae-checkpoints" / "step-00000040").is_dir()
    again = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1], again.stderr[-2000:]
