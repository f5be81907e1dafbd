"""What an SAE is: SAELens classes of ours, whose passes touch active latents only, and starting points for their weights.

Importing this room tells SAELens of every architecture written here. It costs SAELens' own import, some seconds.
"""

import lazy_loader

from saeutils.saes import alignsae, batchtopk, gba, jumprelu, standard, topk  # each registers its classes

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "alignsae": [
            "AlignSAE", "AlignSAEConfig", "AlignTrainingSAE", "AlignTrainingSAEConfig", "extended", "slot", "swap",
        ],
        "batchtopk": ["SparseBatchTopKTrainingSAE", "SparseBatchTopKTrainingSAEConfig"],
        "gba": ["GBATrainingSAE", "GBATrainingSAEConfig", "geometric"],
        "initializers": [
            "calibrate", "data_points", "decoder_bias_at_median", "fold_scale", "geometric_median", "k_means",
            "mirror_decoder", "mlp_directions", "random_decoder", "residual_mirror_decoder", "start_jumprelu", "tie",
        ],
        "jumprelu": ["SparseJumpReLUTrainingSAE", "SparseJumpReLUTrainingSAEConfig"],
        "standard": ["SparseStandardTrainingSAE", "SparseStandardTrainingSAEConfig"],
        "topk": ["SparseTopKTrainingSAE", "SparseTopKTrainingSAEConfig"],
    },
)  # fmt: skip
