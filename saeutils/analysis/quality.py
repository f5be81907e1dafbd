"""What a dictionary knows: SAEBench's measures on pooled or single-token activations, without a hub.

Formulas follow SAEBench 0.6 (Karvonen et al. 2025, arXiv:2503.09532); each function says where it departs. Two kinds of
input: latents of documents, pooled over tokens, and latents of single tokens. All are in the model's own scale
(:func:`saeutils.saes.initializers.fold_scale`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from saeutils.kernels.door import door
from saeutils.metrics import require_two_classes

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE

Array = np.ndarray


@torch.no_grad()
def pooled(rows: dict[str, Tensor], n_docs: int, encode: Callable[[Tensor], Tensor] | None = None) -> Array:
    """Mean over each document's rows of x, or of ``encode(x)``: [n_docs, width]. ``rows`` as ``Activations.all`` gives."""
    door(n_docs=n_docs)
    width = rows["x"].shape[1] if encode is None else encode(rows["x"][:2]).shape[1]
    total, count = torch.zeros(n_docs, width), torch.bincount(rows["doc"].long(), minlength=n_docs)
    for x, doc in zip(rows["x"].split(2048), rows["doc"].long().split(2048)):
        total.index_add_(0, doc, (x if encode is None else encode(x)).float().cpu())
    return (total / count.clamp_min(1)[:, None]).numpy()


def linear_probe(x: Array, y: Array) -> tuple[Array, float]:
    """Logistic probe (L2, standardised inputs, C = 0.1) as weights on raw ``x`` [n, d]: (w [d], b).

    SAEBench fits by AdamW and keeps the epoch best on the *test* rows; this one never sees them.

    Raises:
        ValueError: labels of one class.
    """
    door(x=x)
    require_two_classes(y, "linear probe")
    mu, sd = x.mean(0), x.std(0) + 1e-6 * np.abs(x).mean() + 1e-30  # columns may be constant, all of them too
    fit = LogisticRegression(C=0.1, max_iter=1000).fit((x - mu) / sd, y)
    w = fit.coef_[0] / sd
    return w, float(fit.intercept_[0] - w @ mu)


def accuracy(probe: tuple[Array, float], x: Array, y: Array) -> float:
    """Share of rows x [n, d] on the right side of a probe (w [d], b); y [n] is positive for the one class."""
    return float(((x @ probe[0] + probe[1] > 0) == (y > 0)).mean())


def most_different(z: Array, y: Array, rows: Array, k: int) -> Array:
    """The k columns of ``z`` [n, width] whose class means differ most on the chosen ``rows`` (boolean [n]), the first by most, [k].

    Raises:
        ValueError: labels of one class among these rows, k that is none of the columns' numbers.
    """
    door(z=z, k=k)
    require_two_classes(y[rows], "the latents that differ most")
    if not 1 <= k <= z.shape[1]:
        raise ValueError(f"k={k} must lie between 1 and the {z.shape[1]:,} columns")
    gap = np.abs(z[rows & (y > 0)].mean(0) - z[rows & (y == 0)].mean(0))
    return np.argsort(-gap, kind="stable")[:k]


def k_sparse_probing(z: Array, y: Array, train: Array, k: int) -> float:
    """Test accuracy of a logistic probe on the k columns of ``z`` [n, width] with the largest |difference of class means|.

    As in SAEBench: L2, C = 1, no standardisation. ``train``: boolean [n]. Gurnee et al. 2023, arXiv:2305.01610.

    Raises:
        ValueError: labels of one class on either side, k that is none of the columns' numbers.
    """
    for rows, side in ((train, "train"), (~train, "test")):
        require_two_classes(y[rows], f"k-sparse probing, {side} rows")
    best = most_different(z, y, train, k)
    fit = LogisticRegression(max_iter=1000).fit(z[train][:, best], y[train])
    return float(fit.score(z[~train][:, best], y[~train]))


def _without(x: Array, z: Array, W_dec: Array, latents: Array) -> Array:
    """Pooled residuals after zeroing latents: exact, as pooling and decoding are linear (the SAE's error stays)."""
    return x - z[:, latents] @ W_dec[latents]


def _difference(z: Array, y: Array) -> Array:
    return z[y > 0].mean(0) - z[y == 0].mean(0)


def scr(x: Array, z: Array, W_dec: Array, wanted: Array, spurious: Array, train: Array, n: int) -> float:
    """Spurious correlation removal: how far zeroing n latents brings a biased probe to the clean one's accuracy.

    The biased probe learns from training rows on which both labels agree. The n latents of largest effect
    |Δz̄_i·(w_s·d_i)| on the spurious label's own probe are zeroed, and (after − before)/(clean − before) is the score, on
    balanced test rows. SAEBench also takes the other direction and keeps the one that its probe leans to: here the labels
    are chosen so that this is the spurious one. 0 where the biased probe was as good as the clean one.

    Args:
        x: pooled residuals [n, d]; z: pooled latents [n, d_sae]; wanted, spurious: 0/1 [n]; train: boolean [n].
    """
    door(x=x, z=z, W_dec=W_dec, n=n)
    agree, test = train & (wanted == spurious), ~train
    biased, clean, concept = (
        linear_probe(x[rows], y[rows]) for rows, y in ((agree, wanted), (train, wanted), (train, spurious))
    )
    effect = np.abs(_difference(z[train], spurious[train]) * (W_dec @ concept[0]))
    top = np.argsort(-effect)[:n]
    before, best = accuracy(biased, x[test], wanted[test]), accuracy(clean, x[test], wanted[test])
    after = accuracy(biased, _without(x[test], z[test], W_dec, top), wanted[test])
    return 0.0 if best - before < 1e-3 else (after - before) / (best - before)


def tpp(x: Array, z: Array, W_dec: Array, y: Array, train: Array, n: int) -> float:
    """Targeted probe perturbation: drop of a class's probe when its n latents are zeroed, less the mean drop of the others.

    One-vs-rest probes on pooled residuals, balanced by resampling the rest; latents by the signed effect
    max(Δz̄_i, 0)·(w_c·d_i). Unlike SAEBench, clean and ablated accuracy share their negatives.

    Args:
        y: class of each row, 0…C−1, [n]. Others as in :func:`scr`.
    """
    door(x=x, z=z, W_dec=W_dec, n=n)
    classes, rng = np.unique(y), np.random.default_rng(0)
    test, probes, rows, tops = ~train, {}, {}, {}
    for c in classes:
        for part, name in ((train, "train"), (test, "test")):
            positive, rest = np.flatnonzero(part & (y == c)), np.flatnonzero(part & (y != c))
            rows[c, name] = np.r_[positive, rng.permutation(rest)[: len(positive)]]
        at = rows[c, "train"]
        probes[c] = linear_probe(x[at], (y[at] == c).astype(int))
        effect = np.maximum(_difference(z[at], (y[at] == c).astype(int)), 0) * (W_dec @ probes[c][0])
        tops[c] = np.argsort(-effect)[:n]

    def drop(ablated: int, probed: int) -> float:
        at = rows[probed, "test"]
        label = (y[at] == probed).astype(int)
        changed = _without(x[at], z[at], W_dec, tops[ablated])
        return accuracy(probes[probed], x[at], label) - accuracy(probes[probed], changed, label)

    gains = [drop(c, c) - np.mean([drop(c, o) for o in classes if o != c]) for c in classes]
    return float(np.mean(gains))


def letter_probes(x: Array, letter: Array, train: Array, min_f1: float = 0.6) -> dict[int, tuple[Array, float]]:
    """One-vs-rest logistic probes of first letters on residuals ``x`` [n, d], those with a test F1 of ``min_f1`` or more."""
    door(x=x, min_f1=min_f1)
    found = {}
    for c in np.unique(letter):
        y = (letter == c).astype(int)
        if y[train].sum() < 10 or y[~train].sum() < 5:
            continue
        w, b = _balanced_probe(x, y, train)
        if f1_score(y[~train], x[~train] @ w + b > 0) >= min_f1:
            found[int(c)] = (w, b)
    return found


@torch.no_grad()
def absorption(
    x: Tensor,
    letter: Array,
    sae: SAE,
    train: Array,
    probes: dict[int, tuple[Array, float]],
    max_k: int = 10,
    jump: float = 0.03,
) -> dict[str, float]:
    """First-letter absorption (Chanin et al. 2024, arXiv:2409.14507) as SAEBench 0.6 scores it; lower is better.

    A word that the residual probe gets right is (fully) absorbed if all of its letter's main latents are silent and
    another latent, aligned with the probe, carries at least 0.4 of the probe's projection. ``fraction`` is the part of the
    projection that such latents carry beside the main ones. Main latents: the first k by signed weight of an L1 probe,
    k grown while test F1 gains more than ``jump``. Departs from SAEBench in the probes' solver (liblinear) only.

    Args:
        x: residuals at the words' tokens [n, d]; letter: 0…25 [n]; train: boolean [n]; probes: :func:`letter_probes`.

    Returns:
        fraction, full (means over letters), letters (how many), split (mean number of main latents); NaN without a probe.
    """
    door(x=x, sae=sae, max_k=max_k, jump=jump)
    if not probes:
        return {"fraction": np.nan, "full": np.nan, "split": np.nan, "letters": 0}
    f = torch.cat([sae.encode(part.to(sae.device, sae.dtype)) for part in x.split(2048)]).float().cpu().numpy()
    raw, unit = x.cpu().numpy(), torch.nn.functional.normalize(sae.W_dec.float(), dim=1).cpu().numpy()
    deviation = f[train].std(0)
    rows = [
        _absorbed(raw, f, deviation, unit, (letter == c).astype(int), train, probe, max_k, jump)
        for c, probe in probes.items()
    ]
    return dict(zip(("fraction", "full", "split"), map(float, np.mean(rows, axis=0)))) | {"letters": len(rows)}


def _absorbed(
    x: Array,
    f: Array,
    deviation: Array,
    unit: Array,
    y: Array,
    train: Array,
    probe: tuple[Array, float],
    max_k: int,
    jump: float,
) -> tuple[float, float, int]:
    """(fraction, full, number of main latents) of one letter."""
    main = _main_latents(f, deviation, y, train, max_k, jump)
    hits = np.flatnonzero(~train & (y > 0) & (x @ probe[0] + probe[1] > 0))
    direction = probe[0] / np.linalg.norm(probe[0])
    cosine, a = unit @ direction, x[hits] @ direction  # [d_sae], [hits]
    part = f[hits] * cosine  # projection that each latent carries, [hits, d_sae]
    inside = part[:, main].sum(1)
    allowed = cosine >= 0.1
    allowed[main] = False
    outside = np.sort(np.where(allowed, np.maximum(part, 0), 0), axis=1)[:, -3:].sum(1)
    beside = np.minimum(outside, a - inside)
    share = np.where(inside <= 0, 1.0, np.clip(beside / np.maximum(beside + inside, 1e-9), 0, 1))
    fraction = np.where((inside >= a) | (outside < 0.4 * a), 0.0, share).mean()
    largest = part.argmax(1)
    carried = part[np.arange(len(hits)), largest]
    silent = (f[hits][:, main] < 1e-8).all(1)
    full = (silent & (cosine[largest] >= 0.025) & (a >= 0) & (carried >= 0.4 * a)).mean()
    return fraction, full, len(main)


def _balanced_probe(x: Array, y: Array, train: Array) -> tuple[Array, float]:
    mu, sd = x[train].mean(0), x[train].std(0) + 1e-9
    fit = LogisticRegression(C=0.01, class_weight="balanced", solver="liblinear")
    fit.fit((x[train] - mu) / sd, y[train])
    w = fit.coef_[0] / sd
    return w, float(fit.intercept_[0] - w @ mu)


def _main_latents(f: Array, deviation: Array, y: Array, train: Array, max_k: int, jump: float) -> Array:
    """The latents that together say a letter: grown one by one in the order of an L1 probe's signed weights."""
    gap = np.abs(_difference(f[train], y[train])) / (deviation + 1e-9) * (deviation > 0)
    likely = np.argsort(-gap)[:100]  # the L1 probe would drop the others anyway
    z = f[:, likely] / (deviation[likely] + 1e-9)
    l1 = LogisticRegression(C=0.05, l1_ratio=1.0, class_weight="balanced", solver="liblinear").fit(z[train], y[train])
    order = np.argsort(-l1.coef_[0])
    last, kept = -np.inf, 1
    for k in range(1, max_k + 1):
        fit = LogisticRegression(class_weight="balanced", max_iter=500).fit(z[train][:, order[:k]], y[train])
        f1 = f1_score(y[~train], fit.predict(z[~train][:, order[:k]]))
        if f1 <= last + jump:
            break
        last, kept = f1, k
    return likely[order[:kept]]


def detection(
    f: Tensor, texts: Sequence[str], embedded: Array, latents: Sequence[int], seed: int = 0
) -> dict[int, float]:
    """Automated interpretability by detection, with a local judge: AUROC for each latent that can be judged.

    SAEBench asks an LLM for an explanation of a latent's top windows and which of 14 unseen windows it fires in. Here the
    explanation is the mean sentence embedding of ten top windows, the answer its similarity to each of 2 top, 2 sampled
    and 10 silent windows. AUROC needs no threshold; chance is .5. It rewards latents about meaning, not about form.

    Args:
        f: largest activation of each latent in each window, [windows, d_sae]. embedded: unit rows, [windows, e].
    """
    door(texts=texts, seed=seed)
    rng, out = np.random.default_rng(seed), {}
    for latent in latents:
        value = f[:, latent].float().cpu().numpy()
        order = np.argsort(-value)
        active = int((value > 0).sum())
        if active < 16 or len(texts) - active < 10:
            continue
        held = np.r_[order[10:12], rng.choice(order[12:active], 2, replace=False)]
        silent = rng.choice(order[active:], 10, replace=False)
        explanation = embedded[order[:10]].mean(0)
        asked = np.r_[held, silent]
        out[int(latent)] = float(roc_auc_score(np.r_[np.ones(4), np.zeros(10)], embedded[asked] @ explanation))
    return out
