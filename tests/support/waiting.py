"""One of two processes that wait for one another, over and over: `python waiting.py SECONDS` in torchrun's setting."""

import sys
import time

import torch

from diffpref.__main__ import main
from diffpref.cli import data
from diffpref.train.processes import lost, waiting_at_most


def wait(arguments: list[str]) -> None:
    """A command that ends as `train` does when another process is gone."""
    seconds = float(arguments[0])
    torch.distributed.init_process_group("gloo", timeout=waiting_at_most(seconds).timeout)
    print("ready", flush=True)
    try:
        while True:
            torch.distributed.all_reduce(torch.ones(1))
            time.sleep(0.02)
    except Exception as error:
        gone = lost(error, seconds)
        assert gone is not None
        raise gone from error


if __name__ == "__main__":
    data.main = wait
    sys.exit(main(["data", sys.argv[1]]))
