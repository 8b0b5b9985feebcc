"""`diffpref launch-config [NAME]`: the path of a file that starts a run on several processes or machines."""

from pathlib import Path

from diffpref.errors import UserError, nearest

FOLDER = Path(__file__).parents[1] / "launch"
FILES = {
    "ddp": ("ddp.yaml", "accelerate: the whole network on every GPU; for networks that fit one, as SD1.5 and all LoRA"),
    "fsdp2": ("fsdp2.yaml", "accelerate: weights split over the GPUs; for full fine-tuning of SD3.5, FLUX, Qwen-Image"),
    "zero1": ("zero1.yaml", "accelerate: DeepSpeed ZeRO 1, the optimizer's state split; needs deepspeed"),
    "zero2": ("zero2.yaml", "accelerate: DeepSpeed ZeRO 2, the gradients split too; needs deepspeed"),
    "slurm": ("train.sbatch", "a Slurm job on several nodes that stops in order before its time is over"),
}


def main(arguments: list[str]) -> None:
    """Print the path of the named file, or what there is."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = arguments
    if name == "zero3":
        raise UserError("launch-config: zero3 is not supported; fsdp2 splits the same and is")
    if name not in FILES:
        raise UserError(f"launch-config: there is no {name!r}: {nearest(name, FILES)}")
    if rest:
        raise UserError(f"launch-config: takes one name, not also {rest[0]!r}")
    print(FOLDER / FILES[name][0])


def _usage() -> str:
    rows = "\n".join(f"  {name:<8}{text}" for name, (_, text) in FILES.items())
    return f"""usage: diffpref launch-config NAME

Prints the path of a file that comes with diffpref, for example
  accelerate launch --config_file "$(diffpref launch-config fsdp2)" --num_processes 8 -m diffpref train ...

{rows}"""
