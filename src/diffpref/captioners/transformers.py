"""Any image-text-to-text model of transformers as a captioner, by hub id or folder.

A model with a chat template is asked in a chat of one turn, images first. One without (BLIP, GIT, PaliGemma) gets the
text as it is, one image at a time, for each of them understands padding differently. torchvision is not needed:
transformers then takes the processors that work with PIL. Only parts for videos have no such form, and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffpref.captioners.base import Captioner, CaptionOptions, NoCaption
from diffpref.errors import UserError
from diffpref.language import (
    RowSampler,
    check_template,
    in_batches,
    known_place,
    load_network,
    load_part,
    plain,
    weights,
    write,
)
from diffpref.models.folder import first_line

TAKES = (
    "model",
    "revision",
    "template",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "dtype",
    "device",
    "batch_size",
)
VERSION = "1"  # of this module: raise it whenever the captions change


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model with its processor, which turns images and text into its inputs."""

    network: Any
    processor: Any
    options: CaptionOptions

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        """One caption for each image, `batch_size` at a time."""
        return self.look([[image] for image in images], prompts, draws)

    def look(
        self, shown: Sequence[Sequence[Image.Image]], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        """The same for several images at once: one answer for each row of images that are shown together.

        Raises UserError for several images where the model has no chat template, which says where they stand.
        """
        if not self._chats and any(len(images) > 1 for images in shown):
            raise UserError(f"--model: {self.options.model} has no chat template, so it cannot be shown several images")
        size = self.options.batch_size if self._chats else 1
        return in_batches(self._batch, size, shown, prompts, draws)

    @property
    def _chats(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _batch(
        self, shown: Sequence[Sequence[Image.Image]], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        texts = [self.options.template.format(prompt=self._harmless(prompt)) for prompt in prompts]
        sampler = RowSampler(draws, self.options.temperature, self.options.top_p)
        limit = self.options.max_new_tokens
        tokens = write(self.network, self._inputs(shown, texts), sampler, max_new_tokens=limit)
        written = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [plain(text) or NoCaption("the model says nothing") for text in written]

    def _harmless(self, prompt: str) -> str:
        """A prompt without the marks by which the model tells images and turns from text."""
        marks = [str(token) for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special]
        for mark in sorted(marks, key=len, reverse=True):
            prompt = prompt.replace(mark, " ")
        return prompt

    def _inputs(self, shown: Sequence[Sequence[Image.Image]], texts: list[str]) -> Any:
        """What the model reads, padded, on its device and in its dtype."""
        if self._chats:
            turns = [
                [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]
                for images, text in zip(shown, texts, strict=True)
            ]
            texts = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        start = self.processor.tokenizer.bos_token
        written = start is not None and all(text.startswith(start) for text in texts)  # by the chat template
        inputs = self.processor(
            images=[list(images) for images in shown],
            text=texts,
            padding=True,
            add_special_tokens=not written,
            return_tensors="pt",
        )
        return inputs.to(self.network.device, self.network.dtype)


def version(options: CaptionOptions) -> str:
    """Of this module and of the weights. Raises UserError where there is no model or the template is wrong."""
    check_template(options.template, ["prompt"])
    return f"{VERSION} {weights(_place(options), options.revision)}"


def load(options: CaptionOptions) -> Captioner:
    """The model and its processor. Raises UserError where they do not load."""
    from transformers import AutoModelForImageTextToText

    check_template(options.template, ["prompt"])
    model = _place(options)
    processor = _processor(model, options.revision)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    processor.tokenizer.padding_side = "left"  # what is written goes on where the text ends
    network = load_network(AutoModelForImageTextToText, model, options.revision, options.dtype, options.device)
    return VisionLanguageModel(network, processor, options)


def _place(options: CaptionOptions) -> str:
    return known_place(options.model, "the captioner 'transformers'")


def _processor(model: str, revision: str | None) -> Any:
    from transformers import AutoProcessor

    try:
        processor = load_part(AutoProcessor, model, revision)
    except UserError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        processor = _without_videos(model, revision, error)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"--model: {model} is no model of images and text: it has no processor for both")
    return processor


def _without_videos(model: str, revision: str | None, reason: UserError) -> Any:
    """A processor whose part for videos needs torchvision, without that part: it still reads images.

    Raises `reason` where that is not what was missing, and UserError where something else is.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING.get(type(load_part(AutoConfig, model, revision)), None)
    wanted = kind.get_attributes() if kind else []
    if "video_processor" not in wanted:
        raise reason
    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = [load_part(loaders[name], model, revision) if name in loaders else None for name in wanted]
    # the check of the parts' classes would not have None, and cannot be told to
    images_only = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, part: None})
    try:
        given, _ = kind.get_processor_dict(model, **({"revision": revision} if revision else {}))
        return images_only.from_args_and_dict(parts, given)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"--model: {model} does not load as {kind.__name__}: {first_line(error)}") from error
