"""AlignSAE against naive formulas: losses, penalty, schedule, saving, the swap, and what is refused."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from scipy.stats import entropy

from saeutils import metrics
from saeutils.kernels import sparse
from saeutils.saes import alignlosses, alignsae, initializers
from saeutils.training import stages, train

NAMES = ["birth city", "major", "pet"]


def make(d=8, free=20, seed=0, **kwargs) -> alignsae.AlignTrainingSAE:
    torch.manual_seed(seed)
    return alignsae.AlignTrainingSAE(
        alignsae.AlignTrainingSAEConfig(d_in=d, d_sae=len(NAMES) + free, slots=NAMES, answers=5, **kwargs)
    )


def world(n=240, d=8, seed=0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    relation, answer = torch.randint(0, 3, (n,), generator=g), torch.randint(0, 5, (n,), generator=g)
    directions = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    return 2 * directions[relation] + 0.5 * torch.randn(n, d, generator=g), relation, answer


def naive_decorrelation(slots: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    both = torch.cat([slots, free], dim=1)
    block = torch.corrcoef(both.T)[: slots.shape[1], slots.shape[1] :]
    return block.pow(2).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 60), st.integers(2, 6), st.integers(1, 40), st.integers(0, 9999))
def test_decorrelation_equals_the_full_matrix(batch, r, free, seed):
    g = torch.Generator().manual_seed(seed)
    slots = torch.rand(batch, r, generator=g, dtype=torch.double)
    a = torch.randn(batch, free, generator=g, dtype=torch.double).requires_grad_()
    b = a.detach().clone().requires_grad_()
    ours, theirs = alignlosses.decorrelation(slots, a, eps=0), naive_decorrelation(slots, b)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


def test_decorrelation_ignores_latents_that_never_fire():
    slots, free = torch.rand(30, 2), torch.rand(30, 4)
    dead = torch.cat([free, torch.zeros(30, 3)], dim=1).requires_grad_()
    loss = alignlosses.decorrelation(slots, dead)
    torch.testing.assert_close(loss, alignlosses.decorrelation(slots, free))
    loss.backward()
    assert torch.isfinite(dead.grad).all() and not dead.grad[:, 4:].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 60), st.integers(2, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9999))
def test_decorrelation_from_active_latents_alone(batch, r, free, share, seed):
    g = torch.Generator().manual_seed(seed)
    slots = torch.rand(batch, r, generator=g, dtype=torch.double)
    dense = torch.rand(batch, free, generator=g, dtype=torch.double)
    dense = (dense * (torch.rand(batch, free, generator=g) < share)).requires_grad_()
    row, latent = dense.detach().nonzero(as_tuple=True)
    values = dense.detach()[row, latent].requires_grad_()
    ours = alignlosses.sparse_decorrelation(slots, values, row, latent, free)
    theirs = alignlosses.decorrelation(slots, dense)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    if len(row):
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(values.grad, dense.grad[row, latent], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("labels", [False, True])
def test_sparse_pass_equals_dense(labels):
    sae = make(seed=1)
    x, relation, answer = world()
    sae.labels = (relation, answer) if labels else None
    step, found = TrainStepInput(x, {"l1": 0.05}, None, 1, False), []
    for share in (2.0, 0.0):
        sae.zero_grad()
        with patch.object(sparse, "DENSE_ABOVE", share):
            out = sae.training_forward_pass(step)
        out.loss.backward()
        found.append((out, {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}))
    (a, grads_a), (b, grads_b) = found
    assert a.feature_acts.is_sparse and not b.feature_acts.is_sparse
    assert a.losses.keys() == b.losses.keys() and grads_a.keys() == grads_b.keys()
    for one, other in ((a.losses, b.losses), (grads_a, grads_b)):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_decorrelation_never_builds_more_than_its_block():
    """6 × 100,000: what autograd keeps is the free activations themselves and a few vectors, nothing free × free."""
    slots, free = torch.rand(4, 6), torch.rand(4, 100_000).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        alignlosses.decorrelation(slots, free).backward()
    own = {t.data_ptr(): t.numel() for t in saved if t.data_ptr() != free.data_ptr()}
    assert sum(own.values()) < 6 * 6 * 100_000 and free.grad.shape == free.shape


def test_losses_of_stage_2_are_the_formulas():
    sae, (x, relation, answer) = make(), world()
    sae.labels = relation, answer
    out = sae.training_forward_pass(alignsae.TrainStepInput(x, {"l1": 0.05}, None, 0, False))
    with torch.no_grad():
        z = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        log_p, log_v = z[:, :3].log_softmax(1), (z[:, :3] @ sae.head.weight.T + sae.head.bias).log_softmax(1)
        expected = {
            "mse_loss": (x - z @ sae.W_dec - sae.b_dec).pow(2).sum(1).mean(),
            "l1_loss": 0.05 * z.sum(1).mean(),
            "bind_loss": 20 * -log_p[range(len(x)), relation].mean(),
            "decorrelation_loss": 0.5 * naive_decorrelation(z[:, :3], z[:, 3:]),
            "value_loss": 0.02 * -log_v[range(len(x)), answer].mean(),
        }
    assert set(out.losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, sum(expected.values()), rtol=1e-4, atol=1e-5)


def test_two_stages_bind_and_a_plain_sae_does_not():
    x, relation, answer = world()
    saes = {"aligned": make(), "plain": make(bind=0, decorrelate=0, value=0)}
    history = stages.fit(saes, x, relation, answer, stages=(30, 120), batch=80, lr=5e-3, progress=False)
    right = {name: (sae.encode(x)[:, :3].argmax(1) == relation).float().mean() for name, sae in saes.items()}
    assert right["aligned"] > 0.98 and right["plain"] < 0.9
    assert set(history.stage) == {1, 2} and history.step.max() == 150
    assert history[history.stage == 1]["bind_loss"].isna().all()


def test_a_dead_slot_is_woken_between_the_stages():
    x, relation, _ = world()
    sae = make()
    sae.b_enc.data[1] = -50
    before = sae.W_enc[:, [0, 2]].clone()
    assert stages.wake(sae, x, relation) == [NAMES[1]]
    assert float((sae.encode(x)[relation == 1, 1] > 0).float().mean()) > 0.9
    torch.testing.assert_close(sae.W_enc[:, [0, 2]], before)
    assert stages.wake(make(bind=0), x, relation) == []


def test_stage_1_alone_is_a_standard_sae():
    x, relation, answer = world()
    ours = make()
    cfg = StandardTrainingSAEConfig(d_in=8, d_sae=23, l1_coefficient=0.05, apply_b_dec_to_input=True)
    theirs = StandardTrainingSAE(cfg)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(theirs, name).data.copy_(getattr(ours, name).data)
    stages.fit({"": ours}, x, relation, answer, stages=(20, 0), batch=60, progress=False)
    batches = stages.labelled([], x, relation, answer, 60)
    train(theirs, batches, 20, lr=2e-3, progress=False)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec)


@pytest.mark.parametrize("free_k, architecture", [(None, "standard"), (4, "alignsae")])
def test_saves_and_loads_as_a_saelens_sae(tmp_path, free_k, architecture):
    sae, (x, relation, answer) = make(free_k=free_k), world()
    stages.fit({"": sae}, x, relation, answer, stages=(5, 5), batch=60, progress=False)
    initializers.fold_scale(sae, 0.5)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == architecture and loaded.cfg.metadata.slots == NAMES
    torch.testing.assert_close(loaded(2 * x), sae(2 * x))
    assert alignsae.slot(loaded, "major") == 1
    with pytest.raises(ValueError, match=r"no slot 'employer'.*birth city"):
        alignsae.slot(loaded, "employer")


def test_topk_acts_on_the_free_bank_only():
    sae, (x, *_) = make(free_k=4), world()
    z, dense = sae.encode(x), torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert ((z[:, 3:] > 0).sum(1) <= 4).all()
    torch.testing.assert_close(z[:, :3], dense[:, :3])
    torch.testing.assert_close(z[:, 3:].sum(1), dense[:, 3:].topk(4, dim=1).values.sum(1))


@pytest.mark.parametrize("at", [3, 7])  # the callback counts the steps of each stage
def test_a_killed_run_goes_on_with_the_right_labels(tmp_path, at):
    x, relation, answer = world()
    settings_ = {"stages": (5, 9), "batch": 60, "progress": False, "checkpoint_every": 2}
    whole, broken = make(), make()
    stages.fit({"a": whole}, x, relation, answer, **settings_)

    def dies(step, *_):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.fit({"a": broken}, x, relation, answer, checkpoint=tmp_path, callback=dies, log_every=1, **settings_)
    again = make()
    stages.fit({"a": again}, x, relation, answer, checkpoint=tmp_path, **settings_)
    assert torch.equal(again.W_enc, whole.W_enc)


def test_new_slots_leave_the_old_ones_alone():
    x, relation, answer = world()
    sae = make()
    stages.fit({"": sae}, x, relation, answer, stages=(10, 60), batch=80, lr=5e-3, progress=False)
    more = alignsae.extended(sae, ["hobby"], answers=5)
    torch.testing.assert_close(more.encode(x), sae.encode(x))
    before = more.W_enc[:, :3].clone(), more.W_dec[:3].clone(), more.b_enc[:3].clone()
    stages.fit({"": more}, x, torch.full_like(relation, 3), answer, stages=(0, 20), batch=80, progress=False)
    for was, weight in zip(before, (more.W_enc[:, :3], more.W_dec[:3], more.b_enc[:3])):
        torch.testing.assert_close(weight, was)
    torch.testing.assert_close(more.encode(x)[:, :3], sae.encode(x)[:, :3])
    assert more.cfg.metadata.slots == [*NAMES, "hobby"] and sae.cfg.metadata.slots == NAMES


def test_fragmentation_is_entropy_of_mean_activations():
    z, relation = torch.randn(90, 7, generator=torch.Generator().manual_seed(1)), torch.arange(90) % 3
    table = metrics.fragmentation(z, relation).set_index("concept")
    share = z[relation == 1].mean(0).clamp_min(0).numpy()
    assert table.EffFeat[1] == pytest.approx(np.exp(entropy(share)), rel=1e-5)
    assert table.Top1Conc[1] == pytest.approx((share / share.sum()).max(), rel=1e-5)
    one = metrics.fragmentation(torch.eye(3)[relation], relation)
    np.testing.assert_allclose(one[["EffFeat", "Top1Conc"]], 1, rtol=1e-5)
    assert metrics.fragmentation(torch.zeros(9, 4), relation[:9]).EffFeat.isna().all()


def test_swap_adds_the_difference_of_two_decodes():
    sae, (x, relation, _) = make(), world()
    sae.b_enc.data += 0.3
    target, value = (relation + 1) % 3, torch.rand(len(x))
    z = sae.encode(x)
    changed = z.clone()
    for i in range(len(x)):
        changed[i, relation[i]], changed[i, target[i]] = 0, value[i]
    torch.testing.assert_close(alignsae.swap(sae, x, relation, target, value), sae.decode(changed) - sae.decode(z))


def test_what_is_refused():
    x, relation, answer = world()
    with pytest.raises(ValueError, match="relations run to 3, the SAE has 3 slots"):
        stages.labelled([make()], x, relation + 1, answer, 10)
    with pytest.raises(ValueError, match="240 rows, 240 relations and 9 answers"):
        stages.labelled([make()], x, relation, answer[:9], 10)
    with pytest.raises(ValueError, match="answers run to 9, the value head tells 5 apart"):
        stages.labelled([make()], x, relation, answer + 5, 10)
    with pytest.raises(ValueError, match="orders shuffles rows away"):
        stages.fit({"a": make()}, x, relation, answer, orders={"a": 1})
    with pytest.raises(ValueError, match="at least two different names"):
        alignsae.AlignTrainingSAEConfig(d_in=8, d_sae=20, slots=["a", "a"])
    with pytest.raises(ValueError, match="free_k=30"):
        alignsae.AlignTrainingSAEConfig(d_in=8, d_sae=20, slots=["a", "b"], free_k=30)
