"""Runs inside SAEBench's own environment (see ``saebench.run``), never imported by ours.

Arguments: SAE folder, model name, output folder, batch size, measures by comma, [folder of the model's files].
"""

import importlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

# measure → module, configuration, category of its results, headline keys
EVALS = {
    "sparse_probing": ("sparse_probing", "SparseProbingEvalConfig", "sae", "sae_top_"),
    "absorption": ("absorption", "AbsorptionEvalConfig", "mean", "mean_"),
    "scr": ("scr_and_tpp", "ScrAndTppEvalConfig", "scr_metrics", "scr_metric_threshold_"),
    "tpp": ("scr_and_tpp", "ScrAndTppEvalConfig", "tpp_metrics", "tpp_threshold_"),
    "ravel": ("ravel", "RAVELEvalConfig", "ravel", ""),
    "unlearning": ("unlearning", "UnlearningEvalConfig", "unlearning", "unlearning_score"),
    "autointerp": ("autointerp", "AutoInterpEvalConfig", "autointerp", "autointerp_score"),
}


def lay_out(model: str, folder: Path) -> None:
    """A folder in the working directory named like the hub repository is found before the hub is asked."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}  # written by transformers 5, unread by 4
    for source, key in (
        (rope.get("full_attention", rope), "rope_theta"),
        (rope.get("sliding_attention", {}), "rope_local_base_freq"),
    ):
        if "rope_theta" in source:
            config[key] = source["rope_theta"]
    target = Path(get_official_model_name(model))
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config))
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)


def core(sae, name: str, out: Path, batch_size: int, device: str, dtype: str) -> dict:
    from sae_bench.evals.core import main

    errors: list[str] = []
    main.logger.error = lambda message, *_, **__: errors.append(str(message))  # it swallows its exceptions
    found = main.multiple_evals(
        [(name, sae)], 200, 2000, min(batch_size, 16), True, True, True, "Skylion007/openwebtext",
        output_folder=str(out), dtype=dtype, device=device, force_rerun=True,
    )  # fmt: skip
    if not found:
        raise RuntimeError(errors[-1] if errors else "no result")
    metrics = found[0]["metrics"]
    # its explained_variance is left out: E‖x‖² − (E‖x‖²/d)² is no variance
    return {
        "ce_loss_score": metrics["model_performance_preservation"]["ce_loss_score"],
        "l0": metrics["sparsity"]["l0"],
    }


def measure(metric: str, sae, name: str, model: str, out: Path, batch_size: int, device: str, dtype: str) -> dict:
    if metric == "core":
        return core(sae, name, out, batch_size, device, dtype)
    module_name, config_name, category, prefix = EVALS[metric]
    module = importlib.import_module(f"sae_bench.evals.{module_name}.main")
    config = getattr(module, config_name)
    wanted = dict(model_name=f"{model}-it" if metric == "unlearning" else model, random_seed=42, llm_dtype=dtype, llm_batch_size=batch_size, perform_scr=metric == "scr")  # fmt: skip
    cfg = config(**{k: v for k, v in wanted.items() if k in config.__dataclass_fields__})
    arguments = [cfg, [(name, sae)], device]
    if metric == "autointerp":
        if not (key := os.environ.get("OPENAI_API_KEY")):
            raise RuntimeError("needs OPENAI_API_KEY")
        arguments.append(key)
    found = module.run_eval(*arguments, str(out), force_rerun=True)
    if not found:
        raise RuntimeError(
            "no result" + (" (fewer than 20 letters have a probe of F1 > .6)" if metric == "absorption" else "")
        )
    values = next(iter(found.values()))["eval_result_metrics"][category]
    return {k: v for k, v in values.items() if k.startswith(prefix) and v is not None}


def main() -> None:
    sae_folder, model, out, batch_size, metrics, *folder = sys.argv[1:]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # SAEBench keeps its artefacts in the working directory
    import torch
    from sae_lens import SAE

    if folder:
        lay_out(model, Path(folder[0]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # an older card only emulates bfloat16
    dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    name = f"{Path(sae_folder).name}-{os.path.getmtime(Path(sae_folder) / 'sae_weights.safetensors'):.0f}"  # results are reused by name
    for metric in metrics.split(","):
        print(f"saebench {metric}: started", flush=True)
        try:
            sae = SAE.load_from_disk(sae_folder, device=device, dtype=dtype)
            sae.cfg.metadata.model_name = model
            found = measure(metric, sae, name, model, out / metric, int(batch_size), device, dtype)
            line = "done " + " ".join(f"{k}={v:.4f}" for k, v in found.items())
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            found, line = {"failed": reason}, f"failed ({reason})"
        (out / f"{metric}.json").write_text(json.dumps(found))
        print(f"saebench {metric}: {line}", flush=True)


if __name__ == "__main__":
    main()
