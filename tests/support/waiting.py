"""One of two processes that wait for one another, over and over: `python waiting.py SECONDS` in torchrun's setting."""

import sys
import time

import torch

from diffpref.errors import LostProcessError
from diffpref.train.processes import lost, waiting_at_most

if __name__ == "__main__":
    seconds = float(sys.argv[1])
    torch.distributed.init_process_group("gloo", timeout=waiting_at_most(seconds).timeout)
    print("ready", flush=True)
    try:
        while True:
            torch.distributed.all_reduce(torch.ones(1))
            time.sleep(0.02)
    except Exception as error:
        gone = lost(error, seconds)
        assert isinstance(gone, LostProcessError)
        print(gone, flush=True)
        sys.exit(1)
