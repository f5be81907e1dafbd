"""Panels around the plots: they hold no logic, and use core ipywidgets common to versions 7.7 and 8."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "families": ["family_panel"],
        "labels": ["label_panel"],
        "pairs": ["pairs_panel"],
        "probes": ["Task", "probe_panel"],
        "recovery": ["Recovery", "recovery_panel"],
        "retrain": ["retrain_panel"],
        "swaps": ["swap_panel"],
        "words": ["word_panel"],
    },
)
