"""`diffpref COMMAND ...`: find the command's module and run it. Nothing heavy is imported here."""

import importlib
import logging
import os
import sys

from diffpref.errors import LostProcessError, RunError, Stopped, UserError, first_line, nearest, out_of_memory
from diffpref.files import disk_full
from diffpref.redaction import log_filter, redacted, show_traceback

COMMANDS = {
    "demo": "align the embedded model on the embedded preferences and measure it",
    "data": "import, check and cache preference data",
    "plan": "what a run would take: memory, disk, work, time on GPUs, and which settings fit",
    "train": "train a preset",
    "launch-config": "files that start a run on several processes or machines",
    "checkpoints": "which checkpoints a run holds, and whether they are whole",
    "generate": "images for a prompt set",
    "score": "scores for folders of generated images",
    "evaluate": "a published evaluation of a model, beside the published figures",
    "compare": "a paired comparison of scored folders, with intervals and a page to look at",
    "judge": "a model of images and text chooses between two folders' images, in both orders",
}


def usage() -> str:
    """The text of `diffpref --help`."""
    rows = "\n".join(f"  {name:<15}{text}" for name, text in COMMANDS.items())
    return f"usage: diffpref COMMAND [options]\n\n{rows}\n\n`diffpref COMMAND --help` tells a command's options."


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the input is wrong, 1 anything else, 130 interrupted.

    A run that a signal stopped in order ends with 128 + its number: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two busy processes otherwise spin each other to a halt
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here uses
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("diffpref").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft, it warns of kernels that it lacks
    logging.getLogger("huggingface_hub").propagate = False  # it writes its lines itself
    for handler in logging.getLogger().handlers:
        handler.addFilter(log_filter)
    sys.excepthook = show_traceback
    try:
        if not arguments:
            raise UserError("no command; `diffpref --help` lists them")
        if arguments[0] in ("-h", "--help"):
            print(usage())
            return 0
        if arguments[0] == "--version":
            from diffpref import __version__

            print(__version__)
            return 0
        if arguments[0] not in COMMANDS:
            raise UserError(f"unknown command {arguments[0]!r}: {nearest(arguments[0], COMMANDS)}")
        command = importlib.import_module(f"diffpref.cli.{arguments[0].replace('-', '_')}")
        command.main(arguments[1:])
    except UserError as error:
        print(f"diffpref: {redacted(str(error))}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"diffpref: {redacted(str(error))}", file=sys.stderr)
        if isinstance(error, LostProcessError):
            sys.stderr.flush()
            os._exit(1)
        return 1
    except BrokenPipeError:  # whoever reads our output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"diffpref: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("diffpref: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = _fault_of_the_machine(error)
        if line is None:
            raise
        print(f"diffpref: {redacted(line)}", file=sys.stderr)
        return 1
    return 0


def _fault_of_the_machine(error: Exception) -> str | None:
    """One line where memory or the disk is full; `train` has more to say of these, and says it itself."""
    if out_of_memory(error):
        return f"out of memory ({first_line(error)}): fewer at once (--batch-size) or a smaller resolution need less"
    if disk_full(error):
        return f"the disk is full ({first_line(error)}): make room, then call the same command again"
    return None


if __name__ == "__main__":
    sys.exit(main())
