"""SAEBench in an environment of its own: its pins (numpy < 2, transformers < 5) exclude ours."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

METRICS = ("core", "sparse_probing", "absorption", "scr", "tpp", "ravel", "unlearning", "autointerp")
PACKAGES = ["sae-bench==0.6.0", "transformer-lens<3", "transformers<5", "beartype<0.18", "torch>=2.6,<2.14"]
RUNNER = Path(__file__).with_name("saebench_runner.py")


def _python(environment: str | Path) -> Path:
    return Path(environment) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install(environment: str | Path) -> None:
    """Make SAEBench's environment (2.8 GB); minutes."""
    venv.create(environment, with_pip=True)
    subprocess.run([_python(environment), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    # PyPI's torchvision, which SAEBench never imports, does not load beside a CPU build of torch
    subprocess.run([_python(environment), "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)


def run(
    sae_folder: str | Path,
    model: str,
    environment: str | Path,
    metrics: tuple[str, ...] = METRICS,
    model_folder: str | Path | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Run SAEBench on an exported SAE: one row for each measure's headline figures, or the reason why there is none.

    Args:
        sae_folder: as ``save_inference_model`` writes it, with ``hook_name`` in its metadata.
        model: the name TransformerLens knows the LM by; ``model_folder``: where its files lie, if not on the hub.
        environment: made by :func:`install`.

    Raises:
        FileNotFoundError: no environment there, or no SAE.
        ValueError: unknown measure.
    """
    if unknown := set(metrics) - set(METRICS):
        raise ValueError(f"unknown measures {sorted(unknown)}: SAEBench has {METRICS}")
    if not _python(environment).exists():
        raise FileNotFoundError(
            f"no SAEBench environment at {environment}: make it with saeutils.analysis.saebench.install({str(environment)!r})"
        )
    if not (Path(sae_folder) / "cfg.json").exists():
        raise FileNotFoundError(f"no SAE at {sae_folder}: write it with sae.save_inference_model(folder)")
    out = Path(sae_folder) / "saebench"
    call = [
        _python(environment),
        RUNNER,
        Path(sae_folder).resolve(),
        model,
        out.resolve(),
        str(batch_size),
        ",".join(metrics),
    ]
    if model_folder:
        call.append(Path(model_folder).resolve())
    with (
        subprocess.Popen(list(map(str, call)), stdout=subprocess.PIPE, text=True, cwd=Path(sae_folder)) as process,
        tqdm(total=len(metrics), desc="SAEBench") as bar,
    ):
        for line in process.stdout:
            if line.startswith("saebench "):
                bar.write(line.strip())
                bar.update(": started" not in line)
    rows = []
    for metric in metrics:
        file = out / f"{metric}.json"
        found = json.loads(file.read_text()) if file.exists() else {"failed": "the runner ended early"}
        rows += [{"measure": metric, "key": key, "value": value} for key, value in found.items()]
    return pd.DataFrame(rows)
