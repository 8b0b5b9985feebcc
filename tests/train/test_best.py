"""Evaluation during training: several scorers, the best checkpoint marked and kept, and the training undisturbed."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from support.runs import finals, logged, tiny_config

from diffpref.train.config import Config
from diffpref.train.loop import train
from diffpref.train.run_folder import RunFolder
from diffpref.train.validation import undisturbed


def scorer(folder: Path, name: str) -> Path:
    """A scorer of brightness that disturbs every generator."""
    file = folder / f"{name}.py"
    file.write_text(
        "import random\nimport numpy as np\nimport torch\n"
        "class Loud:\n"
        f"    name, version = {name!r}, '1'\n"
        "    def __call__(self, images, prompts):\n"
        "        torch.manual_seed(0), np.random.seed(0), random.seed(0)\n"
        "        torch.rand(3), np.random.rand(3), random.random()\n"
        "        return [float(np.asarray(image).mean()) for image in images]\n"
        "def load(device):\n    return Loud()\n"
    )
    return file


def looked_at(config: Config, tmp_path: Path, scorers: str, **changes: object) -> Config:
    (tmp_path / "prompts.txt").write_text("a large red circle\na small blue cross\n")
    look = replace(config.validation, prompts=str(tmp_path / "prompts.txt"), steps=1, scorer=scorers, **changes)
    return replace(config, validation=look)


def means(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def best_step(scores: dict[int, float]) -> int:
    return max((step for step in scores if step), key=lambda step: (scores[step], -step))


def test_training_is_bit_equal_with_evaluation_and_without(pipeline, tiny_pairs, tmp_path):
    plain = tiny_config(pipeline, tiny_pairs, tmp_path / "plain", max_steps=4, ema=True, ema_decay=0.5)
    scorers = f"{scorer(tmp_path, 'loud')},embedded-judge"
    watched = looked_at(replace(plain, output_dir=str(tmp_path / "watched")), tmp_path, scorers)
    first, second = train(plain), train(watched)
    assert logged(first) == logged(second)
    assert all(torch.equal(a, b) for a, b in zip(finals(first), finals(second), strict=True))
    for name in ("weights", "optimizer", "ema"):
        a, b = (load_file(run / "checkpoints" / "step-4" / f"{name}.safetensors") for run in (first, second))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    loud, judge = means(second, "validation_score_loud"), means(second, "validation_score_embedded-judge")
    assert set(loud) == set(judge) == {0, 1, 2, 3, 4}
    assert means(second, "validation_score") == loud
    marked = json.loads((second / "checkpoints" / "best.json").read_text())
    assert marked == {"step": best_step(loud), "scorer": "loud", "value": loud[best_step(loud)]}
    assert not (first / "checkpoints" / "best.json").exists()


def test_generators_go_on_as_if_nothing_was_drawn():
    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = [draw()]
    with undisturbed():
        draw()
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert [*found, draw()] == expected


def test_the_best_checkpoint_is_written_kept_and_survives_a_resume(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=5, learning_rate=3e-2)
    config = replace(config, train=replace(config.train, checkpointing_steps=4, checkpoints_total_limit=1))
    config = looked_at(config, tmp_path, str(scorer(tmp_path, "loud")))
    run = train(config)
    scores = means(run, "validation_score")
    best = best_step(scores)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best}", "step-5"})
    assert RunFolder(run).best()["step"] == best
    forgotten = train(
        replace(config, output_dir=str(tmp_path / "no"), validation=replace(config.validation, keep_best=False))
    )
    assert [path.name for path in (forgotten / "checkpoints").glob("step-*")] == ["step-5"]
    assert RunFolder(forgotten).best()["step"] == best
    longer = replace(config, train=replace(config.train, max_steps=6))
    train(longer, resume=True)
    scores = means(run, "validation_score")
    assert set(scores) == set(range(7)) and RunFolder(run).best()["step"] == best_step(scores)


def test_a_resume_forgets_a_best_that_it_will_take_again(tmp_path):
    run = RunFolder(tmp_path)
    for step, value in ((0, 9.0), (1, 1.0), (2, 3.0), (3, 3.0), (4, 5.0)):
        run.log({"step": step, "validation_score": value, "validation_score_x": value})
    assert run.mark_best("x") == 4 and run.best() == {"step": 4, "scorer": "x", "value": 5.0}
    run.rewind_metrics(3)
    assert run.mark_best("x") == 2  # of equal ones the first, and never the start
    run.rewind_metrics(0)
    assert run.mark_best("x") is None and run.best() is None
    for line in ({"loss": 1.0}, {"skipped": "not finite"}, {"heldout_loss": 1.0}, {"validation_score_x": 2.0}):
        run.log({"step": 5, **line})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    run.rewind_metrics(5, looked=True)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before
    run.rewind_metrics(5, looked=False)  # that step is to be looked at again
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:-2]
    run.rewind_metrics(0)
    shutil.rmtree(tmp_path / "checkpoints")
    assert run.mark_best("y") is None
