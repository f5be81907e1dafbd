"""An SAE from text, by several processes or GPUs: a script for torchrun.

    torchrun --nproc-per-node 2 -m saeutils.training.ddp --lm gemma-3-270m --hook blocks.9.hook_resid_post \\
        --text wikipedia-summaries --architecture topk --latents 5120 --l0 32 --steps 1000 --out my-sae

Rows are collected once, the processes sharing the work; then each takes its part of every batch. Killed, the same command goes on.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from saeutils import metrics
from saeutils.kernels import ranks
from saeutils.lm import activations, text
from saeutils.saes import initializers
from saeutils.saes.batchtopk import SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig
from saeutils.saes.jumprelu import SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig
from saeutils.saes.standard import SparseStandardTrainingSAE, SparseStandardTrainingSAEConfig
from saeutils.saes.topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training.loop import train

MADE = {  # architecture → class, configuration, and the setting that --l0 (of relu: the L1 coefficient) stands for
    "topk": (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, "k"),
    "batchtopk": (SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig, "k"),
    "jumprelu": (SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig, "target_l0"),
    "relu": (SparseStandardTrainingSAE, SparseStandardTrainingSAEConfig, "l1_coefficient"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", required=True, help="as lm.load_lm takes it")
    parser.add_argument("--hook", required=True)
    parser.add_argument("--text", required=True, help="as lm.load_text takes it")
    parser.add_argument("--documents", type=int, help="how many of it; all of an embedded one where left out")
    parser.add_argument("--tokens", type=int, help="how many of these; all where left out")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--architecture", choices=MADE, default="topk")
    parser.add_argument("--latents", type=int, required=True)
    parser.add_argument("--l0", type=float, help="active latents a row (32); of relu the L1 coefficient (0.1)")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4096, help="rows a step, of all processes together")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between two checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="folder of the SAE; its checkpoints lie beside it")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("nccl" if gpu else "gloo")
    documents = text.load_text(asked.text, asked.documents)
    acts = activations.collect(asked.lm, asked.hook, documents, n_tokens=asked.tokens, context=asked.context, device=device)
    kind, config, sparsity = MADE[asked.architecture]
    torch.manual_seed(asked.seed)
    amount = asked.l0 or (0.1 if asked.architecture == "relu" else 32)
    sae = kind(config(d_in=acts.d, d_sae=asked.latents, device=device, **{sparsity: amount}))
    initializers.random_decoder(sae, asked.seed)
    batches = partial(acts.batches, asked.batch, seed=asked.seed, normalise="rms", centre=True)
    x = acts.sample(8192, "test")["x"]  # before the work: is there any?
    checkpoint = asked.out.with_name(asked.out.name + "-checkpoints")
    train(sae, batches, asked.steps, lr=asked.lr, checkpoint=checkpoint, checkpoint_every=asked.every, seed=asked.seed)
    if ranks.rank() == 0:
        initializers.fold_scale(sae, acts.scale(normalise="rms"), acts.mean.to(device))
        sae.save_inference_model(asked.out)
        print(f"{asked.out}: {metrics.evaluate(sae, x.to(device))}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
