"""Memory stays flat: what a round of load, collect, train and steer leaves behind does not add up."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROUNDS = """
    import gc, os, sys
    sys.path.insert(0, {tests!r})
    import tiny, torch
    from functools import partial
    from datasets import Dataset
    from saeutils import steering
    from saeutils.lm import activations, models
    from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
    from saeutils.training import train

    torch.set_num_threads(1)
    folder, hook = tiny.saved("llama"), "blocks.1.hook_resid_post"
    text = Dataset.from_dict({{"text": [f"the quick brown fox {{i}} jumps over the lazy dog " * 3 for i in range(20)]}})

    def used():
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, sum(map(torch.is_tensor, gc.get_objects()))

    for round in range(30):
        acts = activations.collect(folder, hook, text, context=64, seed=round, dtype=torch.float32)
        sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=1024, k=8))
        train(sae, partial(acts.batches, 64), 5, progress=False)
        lm = models.load_lm(folder, dtype=torch.float32)
        steering.generate(lm, ["a fox"], [steering.clamp(hook, sae, 3, 1.0)], tokens=4)
        steering.loss_recovered(lm, sae, hook, ["the quick brown fox jumps"])
        del acts, sae, lm
        if round in (9, 29):
            print(*used())
"""


def test_memory_and_live_tensors_stay_flat(tmp_path):
    code = textwrap.dedent(ROUNDS).format(tests=str(Path(__file__).parents[1]))
    env = {"SAEUTILS_CACHE": str(tmp_path), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, check=True)
    (before, tensors), (after, later) = (map(float, line.split()) for line in done.stdout.strip().splitlines()[-2:])
    assert after < 1.02 * before, f"resident memory grew from {before:.0f} to {after:.0f} MiB in twenty rounds"
    assert later <= 1.02 * tensors, f"live tensors grew from {tensors:.0f} to {later:.0f}"


LIMITED = """
    import json, resource, sys, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from saeutils.lm.activations import Activations

    torch.set_num_threads(1)
    folder, rows, shards = Path({folder!r}), 16_384, 32  # two groups of 16 shards, 64 MiB each in bfloat16
    known = {{f"shard-{{i:05d}}.safetensors": {{"rows": rows, "sha256": ""}} for i in range(shards)}}
    for name in known:
        numbers = {{what: torch.arange(rows, dtype=torch.int32) for what in ("doc", "token", "position")}}
        save_file({{"x": torch.randn(rows, 128).bfloat16(), **numbers}}, folder / name)
    (folder / "meta.json").write_text(json.dumps({{"lm": "", "hook": "", "shards": known, "complete": True, "d": 128}}))
    acts = Activations(folder, (1.0, 0.0, 0.0))
    acts.count()
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
    group = 16 * rows * 128 * 2
    most = used + int({share} * group)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    batches = acts.batches(4096)
    for _ in range(2 * shards * rows // 4096):
        next(batches)
    print("all read")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit counts mapped memory on Linux alone")
@pytest.mark.parametrize("share, message", [(1.5, "all read"), (0.9, "t allocate memory")])
def test_rows_are_shuffled_within_one_group_and_a_half(tmp_path, share, message):
    """What Colab's 12 GB have to hold at most: a group of 16 shards of 65,536 rows, 3.2 GB for d = 768 in float32."""
    code = textwrap.dedent(LIMITED).format(folder=str(tmp_path), share=share)
    # small shards are mapped and given back as large ones are: glibc keeps what is below 32 MiB in a heap with holes, sometimes half a group
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert message in done.stdout + done.stderr
