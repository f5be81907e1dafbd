"""train(): history, schedules, constraint, dead latents, and a run that is killed and goes on bit for bit."""

import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from functools import partial
from itertools import count

import pandas as pd
import pytest
import torch
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

from saeutils.saes import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)
from saeutils.training import resampling, train


def _relu(rows, d_sae=256, l1=1.0):
    torch.manual_seed(0)
    return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=rows.shape[1], d_sae=d_sae, l1_coefficient=l1))


def _topk(d_in=640, d_sae=512, k=8, seed=0):
    torch.manual_seed(seed)
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))


def _batches(rows, start=0, size=256):
    for step in range(start, 10**9):
        yield rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[:size]]


def test_history_schedule_and_constraint(rows):
    sae = _topk()
    history = train(sae, partial(_batches, rows), 60, lr=1e-3, warm_up=10, decay=20, log_every=1, progress=False)
    for column in ("loss", "mse_loss", "fvu", "l0", "dead", "orthogonality", "lr"):
        assert history[column].notna().all()
    assert history["fvu"].iloc[-1] < 0.7 * history["fvu"].iloc[0]
    assert (history["l0"] <= 8).all()
    assert history["lr"].iloc[9] == pytest.approx(1e-3) and history["lr"].iloc[-1] < 1e-4  # up, then down
    assert history["lr"].iloc[0] < 3e-4
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(512), atol=1e-5)


def test_anthropic_resampling_points_at_badly_reconstructed_inputs(rows):
    sae, dead = _relu(rows), torch.tensor([3, 5, 8])
    optimizer = torch.optim.Adam(sae.parameters())
    sae(rows[:8]).sum().backward()
    optimizer.step()
    resampling.resample_anthropic(sae, dead, rows[:100], torch.Generator().manual_seed(0))
    resampling.reset_adam(optimizer, sae, dead)
    unit = torch.nn.functional.normalize(rows[:100] - sae.b_dec, dim=1)
    assert torch.allclose((sae.W_dec[dead] @ unit.T).amax(1), torch.ones(3), atol=1e-5)
    alive = torch.ones(256, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.allclose(sae.W_enc[:, dead].norm(dim=0), 0.2 * sae.W_enc[:, alive].norm(dim=0).mean().expand(3))
    assert (sae.b_enc[dead] == 0).all()
    assert (optimizer.state[sae.W_enc]["exp_avg"][:, dead] == 0).all()
    assert (optimizer.state[sae.W_dec]["exp_avg_sq"][dead] == 0).all()


@pytest.mark.parametrize("dead", ["post", "anthropic", "aux_k"])
def test_dead_latents_come_back(rows, dead):
    sae = _relu(rows)
    with torch.no_grad():
        sae.b_enc[:100] = -1e3  # killed
    history = train(
        sae, partial(_batches, rows), 60, dead=dead, dead_every=20, dead_window=5, aux_k=1.0, lr=1e-3, log_every=1,
        progress=False,
    )  # fmt: skip
    assert history["dead"].iloc[10] > 0.3
    if dead == "aux_k":
        assert history["aux_k_loss"].iloc[-1] > 0
    else:
        woken = 100 if dead == "post" else 10  # two of a hundred at a time
        assert history["resampled"].iloc[-1] >= woken
        assert history["dead"].iloc[-1] <= (100 - woken) / 256 + 0.1


KILLED = """
    import sys, torch
    torch.set_num_threads(1)
    from functools import partial
    sys.path.insert(0, {tests!r})
    from test_training import _batches, _relu, train
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) ** 3
    sae = _relu(rows)
    history = train(sae, partial(_batches, rows), 200, dead="anthropic", dead_every=50, dead_window=20, log_every=10,
                    checkpoint={folder!r}, checkpoint_every=25, progress=False)
    history.to_csv({out!r})
    sae.save_model({out!r} + ".sae")
"""


def test_killed_run_goes_on_bit_for_bit(tmp_path):
    """SIGKILL between two checkpoints; the second process must end with the weights and history of an unbroken run."""

    def start(folder, out):
        code = textwrap.dedent(KILLED).format(tests=__file__.rsplit("/", 1)[0], folder=str(folder), out=str(out))
        return subprocess.Popen([sys.executable, "-c", code])

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, tmp_path / "a").wait() == 0
    process = start(broken, tmp_path / "b")
    while not list(broken.glob("step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b").exists()
    newest = sorted(broken.glob("step-*"))[-1]
    (newest / "sae_weights.safetensors").write_bytes(b"torn")  # and the newest checkpoint is damaged on top
    assert start(broken, tmp_path / "b").wait() == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    same = [(tmp_path / f"{n}.sae" / "sae_weights.safetensors").read_bytes() for n in "ab"]
    assert same[0] == same[1]
    assert pd.read_csv(tmp_path / "a")["resampled"].iloc[-1] >= 0


def test_bad_input(rows, tmp_path):
    batches = partial(_batches, rows)
    with pytest.raises(ValueError, match=r"unknown dead='zap': one of"):
        train(_topk(), batches, 5, dead="zap")
    with pytest.raises(ValueError, match=r"expects \[batch, 32\]: same hook point"):
        train(_topk(32), batches, 5)
    with pytest.raises(ValueError, match="NaN or inf"):
        train(_topk(), [torch.full((8, 640), float("nan"))], 5)
    with pytest.raises(ValueError, match="batches is empty"):
        train(_topk(), [], 5)
    with pytest.raises(ValueError, match="batches ended after 3 of 5 steps"):
        train(_topk(), [rows[:256]] * 3, 5, median_rows=0, progress=False)
    train(_topk(), batches, 2, checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match="trained with another d_sae"):
        train(_topk(d_sae=256), batches, 2, checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match="trained with another steps, lr"):
        train(_topk(), batches, 4, lr=1e-5, warm_up=0, decay=0, checkpoint=tmp_path, progress=False)


def test_several_saes_on_one_stream(tmp_path, rows):
    """In lock-step each SAE ends where it would have ended alone, and a killed run goes on where all had got to."""

    def batches(start=0):
        return iter([rows[i * 128 : (i + 1) * 128] for i in range(start, 24)])

    def fresh():
        return {"a": _topk(seed=1), "b": _topk(seed=2)}

    together, orders = fresh(), {"a": 5, "b": 6}
    history = train(together, batches, 20, orders=orders, median_rows=256, progress=False)
    assert set(history["sae"]) == {"a", "b"} and (history.groupby("sae")["step"].max() == 20).all()
    for name, sae in fresh().items():
        train({name: sae}, batches, 20, orders=orders, median_rows=256, progress=False)
        assert torch.equal(sae.W_dec, together[name].W_dec)

    class Killed(Exception):
        pass

    def die(step, sae, row):
        if step == 15 and row["sae"] == "b":
            raise Killed

    kw = dict(orders=orders, median_rows=256, progress=False, checkpoint=tmp_path, checkpoint_every=5, log_every=5)
    with pytest.raises(Killed):  # by now a has written step 15, b has not
        train(fresh(), batches, 20, callback=die, **kw)
    resumed = fresh()
    train(resumed, batches, 20, **kw)
    for name in resumed:
        assert torch.equal(resumed[name].W_dec, together[name].W_dec)


def test_batchtopk_goes_on_bit_for_bit(tmp_path, rows):
    """Its guess of what passes is not kept, so its choice may not depend on it."""

    def batches(start=0):
        for i in count(start):
            yield rows[i % 4 * 256 :][:256]

    def fresh():
        torch.manual_seed(0)
        return SparseBatchTopKTrainingSAE(SparseBatchTopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=512, k=4.0))

    whole, resumed = fresh(), fresh()
    train(whole, batches, 10, checkpoint=tmp_path, checkpoint_every=5, progress=False)
    shutil.rmtree(tmp_path / "step-00000010")
    train(resumed, batches, 10, checkpoint=tmp_path, checkpoint_every=5, progress=False)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder, and the same run with something else: other data, another start, other options."""
    folder = tmp_path_factory.mktemp("run")

    def run(shift=0.0, start=0, order=0, **kw):
        data = torch.randn(60 * 64, 32, generator=torch.Generator().manual_seed(order)) * (1 + shift) + shift
        sae = _topk(32, 64, 4, seed=start)
        options = dict(progress=False, checkpoint=folder, checkpoint_every=10) | kw
        train(sae, lambda start=0: iter(data.split(64)[start:]), 40, **options)
        return sae

    return run(), run


OTHERS = {
    "other rows than these batches": [{"shift": 7.0}, {"order": 1}],
    "another start": [{"start": 5}],
    **{f"another {name}": [{name: value}] for name, value in {
        "unit_norm": False, "median_rows": 0, "lr": 1e-3, "betas": (0.8, 0.99), "warm_up": 1, "decay": 1, "dead_window": 7,
        "dead": "post", "dead_every": 5, "dead_until": 0.5, "dead_threshold": 1e-2, "aux_k": 0.5, "seed": 3,
    }.items()},
}  # fmt: skip


@pytest.mark.parametrize("what, changed", [(what, one) for what, several in OTHERS.items() for one in several])
def test_a_checkpoint_of_another_run_is_refused_by_name(finished, what, changed):
    with pytest.raises(ValueError, match=what):
        finished[1](**changed)


def test_a_finished_run_is_found_again(finished):
    sae, run = finished
    assert torch.equal(run().W_dec, sae.W_dec)
    assert torch.equal(run(log_every=5, checkpoint_every=7).W_dec, sae.W_dec)  # these change no weight


def test_an_order_of_its_own_is_part_of_the_run(tmp_path, rows):
    def run(order):
        sae = _topk()
        kw = dict(orders={"a": order}, median_rows=0, progress=False, checkpoint=tmp_path, checkpoint_every=5)
        train({"a": sae}, lambda start=0: iter(rows[: 24 * 128].split(128)[start:]), 13, **kw)
        return sae

    assert torch.equal(run(5).W_dec, run(5).W_dec)
    with pytest.raises(ValueError, match="another order: give another checkpoint folder, or delete this one"):
        run(6)


@pytest.mark.parametrize("kw, message", [
    ({"steps": 0}, "steps=0"), ({"steps": 2.5}, "steps=2.5"), ({"log_every": 0}, "log_every=0"), ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ({"batches": types.SimpleNamespace(batches=1)}, r"functools.partial\(acts.batches, 4096\)"), ({"sae": {}}, "no SAE to train"),
])  # fmt: skip
def test_refused_before_work_starts(rows, kw, message):
    given = {"sae": _topk(), "batches": partial(_batches, rows), "steps": 3, "progress": False} | kw
    with pytest.raises(ValueError, match=message):
        train(**given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cls, cfg", [
    (SparseTopKTrainingSAE, partial(SparseTopKTrainingSAEConfig, k=8)), (StandardTrainingSAE, StandardTrainingSAEConfig),
])  # fmt: skip
def test_half_precision_and_autocast_are_refused(rows, cls, cfg, dtype):
    with pytest.raises(ValueError, match=rf"the SAE is in torch.{dtype}, in which Adam's small steps are lost"):
        train(cls(cfg(d_in=640, d_sae=128, dtype=dtype)), partial(_batches, rows), 3, progress=False)
    with pytest.raises(ValueError, match="leave the block"), torch.autocast("cpu", torch.bfloat16):
        train(cls(cfg(d_in=640, d_sae=128)), partial(_batches, rows), 3, progress=False)


def test_rows_in_half_precision_train_as_their_float32_copies(rows):
    half, whole = _topk(), _topk()
    train(half, partial(_batches, rows.bfloat16()), 5, progress=False)
    train(whole, partial(_batches, rows.bfloat16().float()), 5, progress=False)
    assert torch.equal(half.W_dec, whole.W_dec)


def test_steps_may_be_written_as_a_float_and_a_single_latent_trains(rows):
    assert len(train(_topk(d_sae=1, k=1.0), partial(_batches, rows), 1e1, progress=False)) == 2
