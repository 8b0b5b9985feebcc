"""The benchmarks of the training step run to their ends at toy sizes, so that they do not rot."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOY = ["--width", "0.05"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the benchmarks; one untimed step will do."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])

    def imported(name: str):
        module = __import__(name)
        monkeypatch.setattr(module, "UNTIMED", 1)
        return module

    yield imported
    for name in ("step", "gpu", "contestants"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("model", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_gpu_script_runs_on_a_cpu(script, tmp_path, capsys, model):
    gpu = script("gpu")
    file = tmp_path / "figures.json"
    sizes = ["--precision", "no", "--steps", "1", "--pairs", "2", "--peak", "1e12", "--checkpointing"]
    found = gpu.main(["--runs", f"{model}@32", *TOY, *sizes, "--ways", "lora", "--json", str(file)])
    assert [row["name"] for row in found] == ["published", "plain lora", "ours lora", "ours lora, cache"]
    assert [row["pairs"] for row in found] == [1, 1, 2, 2]
    full, plain, live, cached = (row["flops_per_pair"] for row in found)
    assert cached < live == plain < full
    for row in found:
        assert row["mfu"] == pytest.approx(row["pairs_per_second"] * row["flops_per_pair"] / 1e12)
        assert 0 <= row["data_wait"] < 1
    assert json.loads(file.read_text()) == found
    assert "out of memory" not in capsys.readouterr().out


def test_the_peaks_of_cards_are_found_by_what_torch_calls_them(script):
    gpu = script("gpu")
    assert gpu.peak_of("NVIDIA H200") == gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_of("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_of("NVIDIA A100-SXM4-80GB") == 312e12 and gpu.peak_of("NVIDIA A10") == 125e12
    assert gpu.peak_of("NVIDIA L4") == 121e12 and gpu.peak_of("NVIDIA L40S") == 362e12
    assert gpu.peak_of("Another") is None


@pytest.mark.slow
def test_the_step_script_prints_its_ratios(script, capsys):
    script("step").main([*TOY, "--resolution", "64", "--rounds", "1"])
    told = capsys.readouterr().out
    assert told.count("ours LoRA, cache / published") == 2
    lines = [line for line in told.splitlines() if line.strip().startswith("ours ") and line.endswith("%")]
    assert len(lines) == 4 and all(abs(float(line.split()[-1].rstrip("%"))) <= 1 for line in lines)
