"""What an SAE remembers of its rows: language model, hook point, how they were scaled, and whether that is folded into it.

Kept in ``cfg.metadata``, SAELens' own place, so it survives saving; ``model_name`` and ``hook_name`` are SAELens' fields,
``rows`` is ours. An SAE from elsewhere has no ``rows``: nothing is known, nothing is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

CLOSE = 1e-3  # relative difference of two factors that are the same but for rounding


def record(sae: SAE, origin: dict) -> None:
    """Write what the batches said of themselves: ``lm``, ``hook``, ``normalise``, ``factor``, ``centred``."""
    meta = sae.cfg.metadata
    meta.model_name, meta.hook_name = origin["lm"], origin["hook"]
    meta.rows = {name: origin[name] for name in ("normalise", "factor", "centred")}


def require_foldable(sae: SAE, scale: float, shifted: bool) -> None:
    """Can (x − shift)·scale be folded into the SAE?

    Raises:
        ValueError: an SAE that scales each row itself, one that is folded already or was trained on
            rows of another factor or shift.
    """
    if sae.cfg.normalize_activations != "none" or getattr(sae, "unit_rows", False):
        raise ValueError(f"{type(sae).__name__} scales each row itself: no one factor can be folded into it")
    if sae.cfg.metadata.folded:
        raise ValueError(f"the SAE is folded already (factor {sae.cfg.metadata.folded:.4g}): it takes rows as they are")
    rows = sae.cfg.metadata.rows
    if rows and rows["normalise"] == "l2":
        raise ValueError("the SAE was trained on rows of norm 1: no one factor can be folded into it")
    if rows and (abs(scale / rows["factor"] - 1) > CLOSE or shifted != rows["centred"]):
        trained = f"(x − mean)·{rows['factor']:.4g}" if rows["centred"] else f"x·{rows['factor']:.4g}"
        raise ValueError(f"the SAE was trained on {trained}, not {'(x − shift)' if shifted else 'x'}·{scale:.4g}: fold those")


def require_raw(sae: SAE, hook: str = "") -> None:
    """Does the SAE take a model's activations as they are?

    Raises:
        ValueError: it was trained at another hook point than ``hook``, or on scaled rows and is not folded.
    """
    meta = sae.cfg.metadata
    if hook and meta.hook_name and meta.hook_name != hook:
        raise ValueError(f"the SAE was trained at {meta.hook_name}, not at {hook}")
    if takes_unit_rows(sae):
        raise ValueError("the SAE takes rows of norm 1, not activations as they are: give it those, or its saved form if that scales")
    if meta.rows and not meta.folded and (meta.rows["centred"] or meta.rows["factor"] != 1):
        raise ValueError(
            "the SAE was trained on scaled rows, not on activations as they are: initializers.fold_scale(sae, acts.scale(…), acts.mean) first"
        )


def takes_unit_rows(sae: SAE) -> bool:
    """Was it trained on rows of norm 1, and does not bring them there itself?"""
    rows, itself = sae.cfg.metadata.rows, sae.cfg.normalize_activations != "none"
    return getattr(sae, "unit_rows", False) or bool(rows and rows["normalise"] == "l2" and not itself)
