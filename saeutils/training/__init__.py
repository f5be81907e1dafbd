"""How an SAE learns: the loop around SAELens' trainer, checkpoints, dead latents, AlignSAE's two stages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": ["train"],
        "resampling": ["resample_anthropic", "resample_post"],
        "sweeps": ["finished", "sweep"],
        "stages": ["fit", "labelled", "wake"],
    },
)
