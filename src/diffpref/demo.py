"""The demo: align the embedded model on the embedded preferences, and measure on held-out prompts whether it helped.

Every step is the one that its own command runs, on real files in the output folder; a run that was cut goes on where
it stopped.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffpref.errors import Stopped, UserError
from diffpref.evaluate.compare import Comparison, compare
from diffpref.evaluate.features import Pixels
from diffpref.evaluate.generate import fingerprint, generate, wishes
from diffpref.evaluate.prompts import read_prompts
from diffpref.models.loading import best_device, load_backbone, weights_dtype
from diffpref.presets import preset
from diffpref.report.page import write_report
from diffpref.report.run import read_run
from diffpref.sampling import Sampling
from diffpref.scorers.base import load_scorer
from diffpref.train.config import Config, ModelConfig
from diffpref.train.loop import train
from diffpref.train.preferences import import_embedded

IMAGE_BATCH = 54
EVALUATION_SEED = 0


def run_demo(output: Path, seed: int) -> dict[str, Any]:
    """Run or go on with the demo in `output`; the content of its result.json.

    Raises UserError where `output` holds something else or cannot be written.
    """
    result_file = output / "result.json"
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "preferences").is_dir())):
        raise UserError(f"--output-dir: {output} holds something other than a demo; choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        import_embedded(output / "preferences")
    except OSError as error:
        raise UserError(f"--output-dir: cannot write {output}: {error.strerror}") from error
    config = preset("embedded-dpo")
    config = replace(
        config,
        output_dir=str(output / "run"),
        data=replace(config.data, path=str(output / "preferences")),
        train=replace(config.train, seed=seed),
    )
    try:
        run = train(config, resume=True)
    except Stopped as stopped:
        raise Stopped(f"{stopped}; the same command goes on", stopped.code) from None
    _draw("embedded", output / "base", "images of the base model", config)
    _draw(str(run / "final"), output / "tuned", "images of the tuned model", config)
    comparison = compare([output / "base", output / "tuned"], [load_scorer("embedded-judge")], Pixels())
    result = _result(comparison, run, output / "report.html")
    write_report(
        output / "report.html",
        title="Diffusion-DPO on the embedded model",
        run=run,
        comparison=comparison,
        reproduce=_commands(output, seed),
    )
    result_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines for people."""
    return f"""
held-out prompts   {result["prompts"]}
win rate           {result["win_rate"]:.1%} (95% interval {result["win_rate_low"]:.1%} to {result["win_rate_high"]:.1%})
judge score        {result["judge_base"]:.3f} before, {result["judge_tuned"]:.3f} after
implicit accuracy  {result["implicit_accuracy"]:.1%} on held-out pairs
speed              {result["pairs_per_second"]:.1f} pairs/s in training
report             {result["report"]}"""


def _draw(model: str, folder: Path, description: str, config: Config) -> None:
    device = best_device()
    backbone = load_backbone(ModelConfig(pretrained=model), device, weights_dtype("no", device), trainable=False)
    look = config.validation
    how = Sampling(look.sampler, look.num_inference_steps, look.guidance_scale)
    wanted = wishes(read_prompts("embedded"), 1, EVALUATION_SEED)
    resolution = config.data.resolution
    generate(backbone, folder, wanted, how, resolution, IMAGE_BATCH, description, model=fingerprint(backbone))


def _result(comparison: Comparison, run: Path, report: Path) -> dict[str, Any]:
    record, result = read_run(run), comparison.results[0]
    return {
        "win_rate": result.win_rate,
        "win_rate_low": result.win_rate_low,
        "win_rate_high": result.win_rate_high,
        "prompts": result.prompts,
        "judge_base": result.mean_a,
        "judge_tuned": result.mean_b,
        "implicit_accuracy": record.series("heldout_accuracy").final(),
        "pairs_per_second": record.series("pairs_per_second").median(),
        "report": str(report),
    }


def _commands(output: Path, seed: int) -> list[str]:
    look = preset("embedded-dpo").validation
    how = f"--sampler {look.sampler} --steps {look.num_inference_steps} --guidance-scale {look.guidance_scale}"
    run, base, tuned = (f"runs/by-hand/{name}" for name in ("run", "base", "tuned"))
    return [
        f"diffpref demo --seed {seed} --output-dir {output}",
        "# or step by step:",
        f"diffpref train embedded-dpo --train.seed {seed} --output-dir {run}",
        f"diffpref generate embedded {base} --prompts embedded {how}",
        f"diffpref generate {run}/final {tuned} --prompts embedded {how}",
        f"diffpref score {base} {tuned} --scorer embedded-judge",
        f"diffpref compare {base} {tuned} --scorer embedded-judge",
    ]
