"""The configuration: YAML there and back, and one line for each thing that is wrong in it."""

from dataclasses import asdict, replace

import pytest
import yaml

from diffpref.errors import UserError
from diffpref.objectives import DPO, SFT
from diffpref.points import Independent, Paired
from diffpref.presets import PRESETS, preset
from diffpref.train.check import check
from diffpref.train.config import Config, DataConfig, ModelConfig, TrainConfig
from diffpref.train.config_file import from_yaml, to_yaml


@pytest.fixture
def read(tmp_path):
    """Reads YAML text over a base configuration."""
    file = tmp_path / "config.yaml"

    def reader(text: str, base: Config = PRESETS["embedded-dpo"]) -> Config:
        file.write_text(text, encoding="utf-8")
        return from_yaml(file, base)

    return reader


def refusal(read, text: str) -> str:
    """The message for wrong text, without the file's name with which it must start; one line."""
    with pytest.raises(UserError) as error:
        read(text)
    message = str(error.value)
    start, _, rest = message.partition("config.yaml")
    assert "\n" not in message and start.startswith("/")
    return rest.removeprefix(":").strip()


class TestRoundTrip:
    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("base", ["embedded-dpo", "embedded-sft", "sd15-dpo-lora"])
    def test_every_preset_reads_back_whatever_lies_under_it(self, read, name, base):
        assert read(to_yaml(PRESETS[name]), PRESETS[base]) == PRESETS[name]

    def test_every_kind_of_value_reads_back(self, read):
        config = Config(
            output_dir="runs/ü: 'x' #1",
            model=ModelConfig(revision="1e5", lora_rank=3, lora_alpha=7, lora_targets=("to_q", "on")),
            data=DataConfig(holdout=1e-12, flip=True, ties="soft", cache="null"),
            objective=DPO(beta=1 / 3),
            train=TrainConfig(learning_rate=2.05e-8),
        )
        assert read(to_yaml(config)) == config
        assert isinstance(read(to_yaml(config)).model.lora_targets, tuple)

    @pytest.mark.parametrize("name", ["\x85", "a\u2028b", "\u2029", "ünï 漢字", " two\nlines "])
    def test_any_text_comes_back(self, read, name):
        assert read(to_yaml(replace(Config(), output_dir=name))) == replace(Config(), output_dir=name)

    def test_the_text_is_plain_yaml_in_the_order_of_the_groups(self):
        text = to_yaml(PRESETS["sd15-dpo"])
        assert list(yaml.safe_load(text)) == [
            "output_dir",
            "model",
            "data",
            "objective",
            "points",
            "train",
            "guard",
            "validation",
        ]
        assert yaml.safe_load(text)["objective"] == {"beta": 5000.0, "label_smoothing": 0.0, "name": "dpo"}
        assert "!!" not in text

    def test_keys_left_out_stay(self, read):
        config = read("train: {max_steps: 7}\ndata:\n  flip: true\n")
        base = PRESETS["embedded-dpo"]
        assert config == replace(base, train=replace(base.train, max_steps=7), data=replace(base.data, flip=True))

    @pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
    def test_an_empty_file_changes_nothing(self, read, text):
        assert read(text) == PRESETS["embedded-dpo"]


class TestNumbers:
    @pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("'2e3'", 2000.0), ("3", 3.0)])
    def test_floats_are_read_as_people_write_them(self, read, text, value):
        rate = read(f"train:\n  learning_rate: {text}\n").train.learning_rate
        assert rate == value and isinstance(rate, float)
        assert read(f"objective:\n  beta: {text}\n").objective.beta == value

    def test_only_where_a_float_is_wanted(self, read):
        assert read("output_dir: 1e-4\n").output_dir == "1e-4"
        assert refusal(read, "train: {max_steps: 1e3}").startswith("train.max_steps: input should be a valid integer")

    @pytest.mark.parametrize(
        ("text", "key", "shown"),
        [
            ("train: {learning_rate: fast}", "train.learning_rate", "'fast'"),
            ("train: {learning_rate: true}", "train.learning_rate", "True"),
            ("train: {learning_rate: [1]}", "train.learning_rate", "[1]"),
            ("train: {max_steps: true}", "train.max_steps", "True"),
            ("train: {max_steps: 2.5}", "train.max_steps", "2.5"),
            ("train: {max_steps: '20'}", "train.max_steps", "'20'"),
            ("train: {max_steps: null}", "train.max_steps", "None"),
            ("train: {scale_lr: 1}", "train.scale_lr", "1"),
            ("train: {scale_lr: 'yes'}", "train.scale_lr", "'yes'"),
            ("output_dir: 7", "output_dir", "7"),
            ("data: {crop: middle}", "data.crop", "'middle'"),
            ("model: {lora_targets: to_q}", "model.lora_targets", "'to_q'"),
            ("model: {lora_targets: [to_q, 1]}", "model.lora_targets.1", "1"),
            ("objective: {beta: strong}", "objective.beta", "'strong'"),
            ("validation: {prompts: [a]}", "validation.prompts", "['a']"),
        ],
    )
    def test_values_of_a_wrong_type_are_named(self, read, text, key, shown):
        message = refusal(read, text)
        assert message.startswith(f"{key}: input should be ") and message.endswith(f", got {shown}")


class TestUnknown:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("trian: {}", "unknown key trian: did you mean 'train'?"),
            ("train: {max_step: 3}", "unknown key train.max_step: did you mean 'max_steps'?"),
            ("objective: {betta: 3}", "unknown key objective.betta: did you mean 'beta'?"),
            ("objective: {name: sft, beta: 3}", "unknown key objective.beta: known: name"),
            ("1: 2", "unknown key 1: known: data, guard, model, objective, output_dir, points, train, validation"),
            ("objective: {name: dpoo}", "objective.name: unknown 'dpoo': did you mean 'dpo'?"),
            ("objective: {name: [dpo]}", "objective.name: unknown ['dpo']: did you mean 'dpo'?"),
            ("points: {name: 3}", "points.name: unknown 3: known: independent, inverted, paired, replay"),
            ("train: 3", "train: expected a group of keys, got 3"),
            ("objective: dpo", "objective: expected a group of keys, got 'dpo'"),
            ("train:", "train: expected a group of keys, got None"),
            ("- a", "expected keys with values at the top, found a list"),
            ("just text", "expected keys with values at the top, found a str"),
        ],
    )
    def test_what_is_unknown_is_refused_with_the_nearest(self, read, text, message):
        assert refusal(read, text) == message

    def test_broken_yaml_is_one_line(self, read):
        assert refusal(read, "train: {max_steps: 3\nfoo: [").startswith("is not valid YAML: ")

    def test_a_missing_file_a_folder_and_bytes_are_one_line(self, tmp_path):
        (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
        for file in (tmp_path / "none.yaml", tmp_path, tmp_path / "bytes.yaml"):
            with pytest.raises(UserError, match=f"^{file} cannot be read: ") as error:
                from_yaml(file, Config())
            assert "\n" not in str(error.value)

    def test_yaml_cannot_run_code(self, read, tmp_path):
        target = tmp_path / "made"
        assert refusal(read, f"output_dir: !!python/object/apply:pathlib.Path.touch ['{target}']").startswith(
            "is not valid"
        )
        assert not target.exists()

    def test_a_date_is_read_as_the_text_it_was(self, read):
        assert read("output_dir: 2026-11-22").output_dir == "2026-11-22"


class TestKinds:
    def test_a_name_switches_the_kind(self, read):
        config = read("objective: {name: sft}\npoints: {name: independent}")
        assert config.objective == SFT() and config.points == Independent()
        assert check(config) is config

    def test_a_switched_kind_starts_from_its_own_defaults(self, read):
        assert read("objective: {name: dpo}", PRESETS["embedded-sft"]).objective == DPO()
        assert read("objective: {name: dpo, beta: 7}", PRESETS["embedded-sft"]).objective == DPO(beta=7.0)

    def test_naming_the_same_kind_keeps_its_values(self, read):
        assert read("objective: {name: dpo}").objective == PRESETS["embedded-dpo"].objective

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "objective: {name: sft}",
                "points.name: the objective 'sft' needs points of single images (independent), not 'paired'",
            ),
            (
                "points: {name: independent}",
                "points.name: the objective 'dpo' needs points of pairs (paired, inverted, replay), not 'independent'",
            ),
        ],
    )
    def test_objective_and_points_must_fit(self, read, text, message):
        with pytest.raises(UserError) as error:
            check(read(text))
        assert str(error.value) == message


def with_value(key: str, value) -> Config:
    """The default configuration with one dotted key changed."""
    group, name = key.split(".")
    config = Config()
    return replace(config, **{group: replace(getattr(config, group), **{name: value})})


class TestCheck:
    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_pass(self, name):
        assert check(preset(name)) is PRESETS[name]

    @pytest.mark.parametrize(
        ("key", "bad", "good"),
        [
            ("train.max_steps", 0, 1),
            ("train.batch_size", -1, 1),
            ("train.gradient_accumulation_steps", 0, 1),
            ("train.logging_steps", 0, 1),
            ("train.learning_rate", 0.0, 1e-30),
            ("train.learning_rate", float("nan"), 1e-8),
            ("train.learning_rate", float("inf"), 1e-8),
            ("data.resolution", 0, 8),
            ("validation.num_inference_steps", 0, 1),
            ("validation.pairs", 0, 1),
            ("model.lora_alpha", 0, None),
            ("objective.beta", -1.0, 0.1),
            ("objective.beta", float("inf"), 1e9),
        ],
    )
    def test_what_must_be_above_0(self, key, bad, good):
        with pytest.raises(UserError) as error:
            check(with_value(key, bad))
        assert str(error.value) == f"{key}: {bad} is not a finite number above 0"
        check(with_value(key, good))

    @pytest.mark.parametrize(
        "key",
        [
            "model.lora_rank",
            "train.lr_warmup_steps",
            "train.weight_decay",
            "train.adam_epsilon",
            "train.max_grad_norm",
            "train.checkpointing_steps",
            "train.checkpoints_total_limit",
            "train.checkpoints_keep_every",
            "validation.steps",
            "validation.images",
            "validation.guidance_scale",
        ],
    )
    def test_what_may_be_0_but_not_below(self, key):
        with pytest.raises(UserError) as error:
            check(with_value(key, -1))
        assert str(error.value) == f"{key}: -1 is not a finite number from 0 up"
        check(with_value(key, 0))

    @pytest.mark.parametrize("key", ["data.holdout", "data.prompt_dropout", "train.adam_beta1", "train.adam_beta2"])
    @pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
    def test_shares(self, key, bad):
        with pytest.raises(UserError) as error:
            check(with_value(key, bad))
        assert str(error.value) == f"{key}: {bad} is not from 0 up to below 1"
        check(with_value(key, 0.0))

    def test_checkpoints_are_kept_at_steps_that_have_one(self):
        def config(every: int, kept: int) -> Config:
            return replace(Config(), train=TrainConfig(checkpointing_steps=every, checkpoints_keep_every=kept))

        for every, kept in ((500, 750), (500, 100), (0, 500)):
            with pytest.raises(
                UserError, match=rf"^train\.checkpoints_keep_every: {kept} is no multiple of .*, {every},"
            ):
                check(config(every, kept))
        for every, kept in ((500, 1000), (500, 500), (500, 0), (0, 0)):
            check(config(every, kept))

    def test_adapters_need_layers(self):
        config = replace(Config(), model=ModelConfig(lora_rank=4, lora_targets=()))
        with pytest.raises(UserError, match=r"^model\.lora_targets: no layer is named"):
            check(config)


class TestPresets:
    def test_an_unknown_preset_is_refused_with_the_nearest(self):
        with pytest.raises(UserError, match=r"^unknown preset 'sd15dpo': did you mean 'sd15-dpo'"):
            preset("sd15dpo")

    def test_the_paper_settings(self):
        paper = PRESETS["sd15-dpo"]
        train = paper.train
        assert paper.objective == DPO(beta=5000.0) and paper.points == Paired()
        assert train.batch_size * train.gradient_accumulation_steps == 2048
        assert train.learning_rate == 1e-8 and train.scale_lr
        assert (train.lr_scheduler, train.lr_warmup_steps, train.max_steps) == ("constant_with_warmup", 500, 2000)
        assert (paper.data.resolution, paper.data.flip, paper.data.prompt_dropout) == (512, True, 0.2)
        assert paper.model.lora_rank == 0

    @pytest.mark.parametrize("name", PRESETS)
    def test_names_say_what_they_are(self, name):
        config = PRESETS[name]
        assert config.output_dir == f"runs/{name}"
        assert (config.model.lora_rank > 0) == name.endswith("-lora")
        method = name.removesuffix("-lora").split("-", 1)[1].removeprefix("turbo-").removeprefix("refiner-")
        loss = "dpo" if method in ("dcpo", "inpo", "npo", "spin") else method.replace("-", "_")
        assert config.objective.name == loss
        assert (config.data.captions == "image") == (method == "dcpo")
        assert (config.points.name == "inverted") == (method in ("inpo", "smpo"))
        assert (config.points.name == "replay") == (method == "dro")
        assert config.data.swap == (method == "npo")
        assert config.points.gives_pairs == config.objective.needs_pairs
        assert check(config) is config

    def test_no_two_presets_are_the_same_but_for_their_folder(self):
        contents = [{**asdict(config), "output_dir": ""} for config in PRESETS.values()]
        assert all(contents.count(content) == 1 for content in contents)

    def test_captions_that_say_left_are_not_mirrored(self):
        embedded = [config for config in PRESETS.values() if config.data.path == "embedded"]
        assert embedded and not any(config.data.flip for config in embedded)
