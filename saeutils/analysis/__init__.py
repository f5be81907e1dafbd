"""What a dictionary says: its latents' texts and tokens, languages, stability across seeds, quality, interventions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "embeddings": ["minilm"],
        "features": ["LatentTable", "latent_table", "promoted", "promoting", "shaded", "token_table", "top_latents"],
        "interventions": ["Facts", "disentanglement", "unlearning"],
        "language": ["granularity", "language_of", "language_tendency", "signals"],
        "matching": ["compare", "match", "match_certified", "pw_mcc", "stability"],
        "quality": [
            "absorption", "accuracy", "detection", "k_sparse_probing", "letter_probes", "linear_probe", "most_different", "pooled", "scr",
            "tpp",
        ],
    },
)  # fmt: skip
