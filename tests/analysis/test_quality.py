"""SAEBench's measures on data whose answer is known, and on the real model where its facts are needed."""

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

from saeutils import steering
from saeutils.analysis import embeddings, interventions, quality, saebench
from saeutils.kernels import files
from saeutils.lm import activations, models, text

HOOK = "blocks.12.hook_resid_post"
EARLY = "blocks.9.hook_resid_post"  # where a city's facts still lie at the city


def _identity(d=16):
    """A dictionary of the coordinates: latent i is relu(x_i), latent d + i is relu(−x_i)."""
    sae, eye = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d)), torch.eye(d)
    sae.load_state_dict(
        {
            "W_enc": torch.cat([eye, -eye], 1),
            "W_dec": torch.cat([eye, -eye]),
            "b_enc": torch.zeros(2 * d),
            "b_dec": torch.zeros(d),
        }
    )
    return sae


def _world(n=600, d=16, seed=0):
    """Rows whose coordinate 0 says the wanted label, 1 (more loudly) the spurious one, 2…5 one of four classes."""
    rng = np.random.default_rng(seed)
    wanted, spurious, classes = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.integers(0, 4, n)
    x = rng.normal(size=(n, d)) * 0.3
    x[:, 0] += 2 * wanted
    x[:, 1] += 6 * spurious - 3  # two-sided: zeroing it leaves no offset
    x[np.arange(n), 2 + classes] += 3
    return x.astype(np.float32), wanted, spurious, classes, np.arange(n) < 400


def test_pooled_is_the_mean_of_encoded_rows():
    rows = {"x": torch.randn(50, 16), "doc": torch.randint(5, (50,))}
    sae = _identity()
    expected = torch.stack([sae.encode(rows["x"][rows["doc"] == i]).mean(0) for i in range(5)])
    assert np.allclose(quality.pooled(rows, 5, sae.encode), expected.detach(), atol=1e-6)
    assert quality.pooled(rows, 7)[6].sum() == 0  # a document without rows


def test_probing_finds_the_one_latent_that_knows():
    x, wanted, _, _, train = _world()
    z = _identity().encode(torch.from_numpy(x)).detach().numpy()
    assert quality.k_sparse_probing(z, wanted, train, 1) > 0.98
    assert quality.accuracy(quality.linear_probe(x[train], wanted[train]), x[~train], wanted[~train]) > 0.98
    gap = np.abs(z[train & (wanted == 1)].mean(0) - z[train & (wanted == 0)].mean(0))
    assert quality.most_different(z, wanted, train, 3).tolist() == np.argsort(-gap)[:3].tolist()
    with pytest.raises(ValueError, match="k=99999 must lie between 1 and"):
        quality.most_different(z, wanted, train, 99_999)
    shuffled = np.random.default_rng(0).permutation(wanted)
    assert quality.k_sparse_probing(z, shuffled, train, 5) < 0.65


def test_scr_and_tpp_of_a_perfect_and_of_a_useless_dictionary():
    x, wanted, spurious, classes, train = _world()
    sae = _identity()
    z, W = sae.encode(torch.from_numpy(x)).detach().numpy(), sae.W_dec.detach().numpy()
    assert quality.scr(x, z, W, wanted, spurious, train, 2) > 0.8
    assert quality.tpp(x, z, W, classes, train, 1) > 0.2
    assert abs(quality.scr(x, np.zeros_like(z), W, wanted, spurious, train, 2)) < 1e-9
    assert quality.tpp(x, np.zeros_like(z), W, classes, train, 1) == 0
    zeroed = quality._without(x, z, W, np.array([1]))
    assert np.allclose(zeroed[:, 1], np.minimum(x[:, 1], 0), atol=1e-5) and np.allclose(
        np.delete(zeroed, 1, 1), np.delete(x, 1, 1)
    )


def test_absorption_is_seen_where_it_was_put():
    """Latent c says letter c, except on a third of the letter's words, which have a latent of their own."""
    rng, letters, n, d = np.random.default_rng(0), 4, 1200, 40
    letter = rng.integers(0, letters, n)
    absorbed = np.arange(n) % 3 == 0
    x = np.zeros((n, d), np.float32)
    x[np.arange(n), letter] = 1 + rng.random(n) * 0.1
    x += rng.normal(size=(n, d)).astype(np.float32) * 0.02
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * letters))

    class Fake:
        cfg, device, dtype = sae.cfg, sae.device, torch.float32
        W_dec = torch.cat([torch.eye(d)[:letters], torch.eye(d)[:letters]])

        def __init__(self, absorbing):
            self.absorbing = absorbing

        def encode(self, rows):
            f = torch.zeros(len(rows), 2 * letters)
            start = self.at
            self.at += len(rows)
            for i in range(len(rows)):
                c, own = letter[start + i], absorbed[start + i] and self.absorbing
                f[i, c + (letters if own else 0)] = rows[i, c]
            return f

    first = np.arange(n) < 900
    probes = quality.letter_probes(x, letter, first)
    results = []
    for absorbing in (False, True):
        fake = Fake(absorbing)
        fake.at = 0
        results.append(quality.absorption(torch.from_numpy(x), letter, fake, first, probes, max_k=1))
    clean, bad = results
    assert clean["letters"] == bad["letters"] == letters
    assert clean["full"] == 0 and clean["fraction"] == 0
    assert bad["full"] == pytest.approx(1 / 3, abs=0.08) and bad["fraction"] == pytest.approx(1 / 3, abs=0.08)


def test_detection_tells_meaning_from_chance():
    rng = np.random.default_rng(0)
    topic = np.arange(300) % 2
    embedded = rng.normal(size=(300, 8)) * 0.1 + np.where(topic[:, None], 1, -1) * np.eye(8)[0]
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    f = torch.zeros(300, 3)
    f[:, 0] = torch.from_numpy(topic * (1 + rng.random(300)))
    f[:, 1] = torch.from_numpy((rng.random(300) < 0.3) * 1.0)
    f[0, 2] = 1  # too rare to judge
    seen = quality.detection(f, ["x"] * 300, embedded, [0, 1, 2])
    assert seen[0] > 0.95 and 0.1 < seen[1] < 0.9 and 2 not in seen


def test_sentence_embeddings():
    said = ["A man is eating food.", "Someone is having a meal.", "The stock market fell today."]
    e = embeddings.minilm(said)
    assert torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-5)
    assert e[0] @ e[1] > e[0] @ e[2] + 0.2


@pytest.fixture(scope="module")
def gemma():
    return models.load_lm("gemma-3-270m")


def test_facts_and_disentanglement(gemma):
    """Exchanging everything changes every answer, so with the coordinates as dictionary the extremes are known."""
    cities = (
        pd.read_csv(files.data_dir() / "cities.csv")
        .rename(columns={"city": "name"})
        .sample(40, random_state=0)
        .to_dict("records")
    )
    ask = {"country": "City: {}\nCountry:", "continent": "City: {}\nContinent:"}
    facts = interventions.Facts(gemma, EARLY, ask, cities)
    assert facts.known >= 20
    base, source = facts.pairs("country", 12, 0)
    everything = facts.answers("country", base, facts.x["country"][source])
    nothing = facts.answers("country", base, facts.x["country"][base])
    assert (everything == facts.answer["country"][source]).float().mean() > 0.8
    assert (nothing == facts.answer["country"][base]).all()
    gradients = facts.gradients(8, 0)
    found = interventions.disentanglement(facts, _identity(640), gradients, 8, sizes=(1280,))
    assert (
        found["cause"] > 0.7
        and found["isolation"] < 0.5
        and found["score"] == pytest.approx((found["cause"] + found["isolation"]) / 2)
    )
    with pytest.raises(ValueError, match=r"knows \d of 3 entities"):
        interventions.Facts(gemma, EARLY, ask, cities[:3])


def test_unlearning_pushes_what_fires_on_the_topic_only(gemma):
    wiki = text.load_text("wikipedia-summaries", max_docs=400)
    rows = activations.collect("gemma-3-270m", HOOK, wiki, n_tokens=6000, context=64).all()["x"]
    wins = steering.windows(gemma, wiki["text"][:2], 64)
    sae = _identity(640)
    same = interventions.unlearning(gemma, sae, HOOK, (rows, wins, 0.0), (rows, wins, 0.0), 1.0)
    assert same["score"] == 0  # a topic equal to the rest cannot be forgotten alone
    rates = interventions.firing_rates(sae, rows)
    assert torch.allclose(rates[:640], (rows > 0).float().mean(0), atol=1e-6)


def test_saebench_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown measures"):
        saebench.run(tmp_path, "gpt2", tmp_path, ("accuracy",))
    with pytest.raises(FileNotFoundError, match=r"saeutils.analysis.saebench.install"):
        saebench.run(tmp_path, "gpt2", tmp_path / "nowhere")
