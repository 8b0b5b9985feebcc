"""The engine: ask a tool (a scorer, a captioner, a perturber) something of a million things, once each.

A *question* is what a tool is asked: a text, mostly with an image, told by content (the text, the image's SHA-256, and
a name where the answer depends on one, as a seed does). Equal questions are asked once. The different questions of a
dataset, in their order, are cut into fixed runs, the *units*. A *stage* is a tool with its settings: a pure function
from a unit to the rows of one small parquet file.

The *ledger* is a folder, DATASET.answers beside the dataset by default. In it each stage has a folder, named by a hash
of all that its answers depend on (this code's version, the tool's identity, its settings), and each unit a file, named
by a hash of its questions. So the same question to the same tool is answered once and for all: other rules, another
order, rows added or removed, another number of workers only look it up.

A unit is claimed, answered, written beside, flushed and renamed. Any number of processes on one folder share the work:
workers of one command, ranks of torchrun, a second command. A claim is a POSIX lock on one byte of an empty file
(`claims`), which the kernel takes back when its holder dies, however it dies; what a killed process had not finished
is taken over at once. Claims save work and nothing else: without them two processes would write the same file twice.

    stage = Stage("score-x", {"scorer": "x", "version": "2"}, load, "number")
    answers = ask(stage, image_questions(dataset, ledger), dataset, ledger, Running(workers=2))
    if answers is not None:  # None on the ranks that only work
        answers[0].value     # what is said of the first question; None with .broken or .why where nothing is

- `Stage(name, identity, load, answers, batch, unit)`: `load()` is called once in each process, when there is something
  to answer, and gives a function from a list of `Asked(text, image, name)` to a list of answers of the same length:
  a number (`answers="number"`) or a text (`"text"`), None, or `Refusal(why)`. `load` must be picklable: a function of a
  module, or a `functools.partial` of one; wrap a costly one in `Once` where the command itself needs the tool too.
- `ask_all(stages, ...)`: several tools in one pass over the images. Each image is decoded once, and prepared once in
  each way that a `Preparing` tool wants it, in threads that run ahead of the tools.
- `image_questions(dataset, ledger)`: one question for each image, row by row, side by side, with its row's prompt.
- `Question(text, name=...)`: a question without an image, such as a caption to be perturbed with its row's id as seed.
- `together(work, running)`: work without a ledger that shares itself out by claims on its own folder (the store, a
  folder of images), in as many processes or Ray tasks.
"""

from diffpref.data.engine.hashing import image_questions
from diffpref.data.engine.ledger import ledger_of
from diffpref.data.engine.plan import Question
from diffpref.data.engine.running import Answer, Answers, Running, ask, ask_all, is_main, own_device
from diffpref.data.engine.source import Captioned, Images
from diffpref.data.engine.stage import Asked, Once, Preparing, Refusal, Said, Say, Stage
from diffpref.data.engine.together import together

__all__ = [
    "Answer",
    "Answers",
    "Asked",
    "Captioned",
    "Images",
    "Once",
    "Preparing",
    "Question",
    "Refusal",
    "Running",
    "Said",
    "Say",
    "Stage",
    "ask",
    "ask_all",
    "image_questions",
    "is_main",
    "ledger_of",
    "own_device",
    "together",
]
