"""The true Stable Diffusion 1.5 architecture: one LoRA step at 512 px, from the command line, within memory."""

import math
import resource
import subprocess
import sys

import pytest
from safetensors import safe_open
from support.full_size import make_sd15
from support.runs import metrics
from support.tiny import make_pairs, write_pairs


@pytest.mark.slow
def test_one_lora_step_at_512(tmp_path):
    pipeline = make_sd15(tmp_path / "sd15")
    command = [sys.executable, "-m", "diffpref", "train", "sd15-dpo-lora", "--model.pretrained", str(pipeline)]
    pairs = write_pairs(tmp_path / "pairs", make_pairs(1))
    command += ["--data.path", str(pairs), "--data.cache", str(tmp_path / "cache"), "--data.flip", "false"]
    command += ["--data.holdout", "0", "--train.max-steps", "1", "--train.batch-size", "1"]
    command += ["--train.gradient-accumulation-steps", "1", "--train.mixed-precision", "no"]
    command += ["--train.lr-warmup-steps", "0", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert line["grad_norm"] > 0
    with safe_open(tmp_path / "run" / "final" / "pytorch_lora_weights.safetensors", "pt") as weights:
        names = list(weights.keys())
        moved = [name for name in names if "lora_B" in name or "lora.up" in name]
        assert len(names) == 2 * 128  # 16 transformers x 2 attentions x 4 projections, down and up
        assert all(name.startswith("unet.") for name in names)
        assert any(weights.get_tensor(name).abs().max() > 0 for name in moved)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak {peak:.1f} GiB")
    assert peak < 16
