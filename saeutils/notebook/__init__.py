"""What a cell calls around its experiment: scales, the ledger of claims, figures, widgets; and what is derived from them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "claims": ["Ledger", "at_least", "at_most", "between"],
        "scales": ["choose", "seed"],
    },
)
