"""Tiny random models that write text, in the folders of their real classes: with eyes, from text to text, and chats."""

from pathlib import Path

import torch
from support.tiny import write_json
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

END = "<|endoftext|>"
CHAT = (
    "{% for m in messages %}<|user|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "red",
    "blue",
    "two",
    "three",
    "cat",
    "dog",
    "on",
    "under",
    "the",
    "a",
    "photo",
    "of",
    "small",
    "large",
    "house",
]
WORDS += [".", ",", "lexical", "order", "=", "<", ">", "sent", "/", *"01246"]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "bos_token_id": None,
}


def make_tokenizer(*marks: str) -> Qwen2Tokenizer:
    """One token for each printable character of ASCII, blank and newline, and the marks."""
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokenizer = Qwen2Tokenizer(vocab={symbol: number for number, symbol in enumerate([*letters, END])}, merges=[])
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", *marks], special_tokens=True)
    return tokenizer


def _words(tokenizer: Qwen2Tokenizer) -> dict:
    end = tokenizer.eos_token_id
    return TEXT | {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end}


def make_llava(folder: Path, seed: int = 0) -> Path:
    """LLaVA: CLIP's eyes on 16 pixels in 4 patches, and a Llama of two layers."""
    tokenizer = make_tokenizer("<image>")
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_words(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _saved(LlavaForConditionalGeneration, config, folder, seed)


def make_idefics3(folder: Path, seed: int = 0) -> Path:
    """Idefics3: SigLIP-like eyes on 16 pixels, 4 tokens an image."""
    tokenizer = make_tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    eyes = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    Idefics3Processor(eyes, tokenizer, image_seq_len=4, chat_template=CHAT.replace("IMAGE", "<image>")).save_pretrained(
        folder
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config=vision | {"image_size": 16, "patch_size": 4, "initializer_range": 0.5},
        text_config=LlamaConfig(**_words(tokenizer)).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.eos_token_id,
    )
    return _saved(Idefics3ForConditionalGeneration, config, folder, seed)


def make_qwen2vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2-VL, whose processor has a part for videos that needs torchvision."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(*marks)
    tokenizer.chat_template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(folder)
    eyes = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=512)
    write_json(folder / "preprocessor_config.json", eyes.to_dict() | {"processor_class": "Qwen2VLProcessor"})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    text = _words(tokenizer) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    }
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision | {"initializer_range": 0.5},
        **{name: tokenizer.convert_tokens_to_ids(mark) for name, mark in zip(names, marks, strict=True)},
    )
    return _saved(Qwen2VLForConditionalGeneration, config, folder, seed)


def make_blip(folder: Path, seed: int = 0) -> Path:
    """BLIP, which has no chat template."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS[:16]]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"projection_dim": 16, "initializer_range": 0.5}
    text = shared | {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    text |= {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 8})
    return _saved(BlipForConditionalGeneration, config, folder, seed)


def make_t5(folder: Path, seed: int = 0) -> Path:
    """T5 with a decoder, and a token for each of a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        initializer_factor=2.0,
        decoder_start_token_id=0,
    )
    return _saved(T5ForConditionalGeneration, config, folder, seed)


def make_chat(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return _saved(LlamaForCausalLM, LlamaConfig(**_words(tokenizer)), folder, seed)


def _saved(kind: type, config: object, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).eval().save_pretrained(folder)
    return folder
