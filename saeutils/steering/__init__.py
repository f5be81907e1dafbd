"""Hooks on a running language model: add, clamp, scale, ablate, project out, splice; what it writes under them, at what cost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "edits": ["ablate", "add", "clamp", "edited", "latents", "project_out", "scale", "splice"],
        "generation": ["continued", "generate", "stepwise"],
        "losses": ["continuation_loss", "loss_recovered", "mean_loss", "only", "windows"],
    },
)
