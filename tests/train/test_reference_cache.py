"""The reference cache: the same training as with a live reference at the same draws, and no reference forward twice."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.runs import assert_resumes_bit_for_bit, metrics, tiny_config, with_lora
from support.tiny import copy_of, make_mixed, make_pairs, make_pipeline, write_json, write_pairs

from diffpref.data.ahead import Ahead
from diffpref.data.loader import asked
from diffpref.errors import RunError, UserError
from diffpref.models.loading import load_backbone
from diffpref.objectives import DPO, DSPO, KTO, SFT, SmPO
from diffpref.points import Independent, Inverted, Paired, Replay
from diffpref.reference import adapters_off, frozen_copy
from diffpref.train.blame import one_item
from diffpref.train.calibration import calibrated_objective
from diffpref.train.check import check
from diffpref.train.config import GuardConfig, ValidationConfig
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train
from diffpref.train.placing import make_placer
from diffpref.train.preferences import open_preferences
from diffpref.train.reference_cache import fingerprint, with_reference_errors
from diffpref.train.step import Learner
from diffpref.train.strategy import Replicated
from diffpref.train.validation import heldout_metrics
from diffpref.types import Outputs

K = 2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten pairs of their own, for what is kept lies beside them."""
    return write_pairs(tmp_path_factory.mktemp("kept") / "pairs", make_pairs(10))


@pytest.fixture
def config(pipeline, pairs, tmp_path):
    """A run over three epochs of K draws, with flips and prompt drops, whose store is this test's own."""
    made = tiny_config(pipeline, pairs, tmp_path / "run", max_steps=15, checkpointing_steps=0, reference_cache=K)
    return replace(made, data=replace(made.data, cache=str(tmp_path / "cache")))


def opened(config):
    """Accelerator, backbone and both loaders of a configuration, before the reference's errors are asked for."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    backbone = load_backbone(config.model, accelerator.device, torch.float32, trainable=True)
    return accelerator, backbone, *open_preferences(config, backbone, accelerator)[:2]


def filled(config):
    accelerator, backbone, loader, heldout = opened(config)
    return with_reference_errors(config, backbone, accelerator, loader, heldout)


def learner_of(config, cached: bool) -> Learner:
    """With errors that are kept, or with a live reference at the same draws."""
    accelerator, backbone, loader, _ = opened(config)
    if cached:
        loader, reference = with_reference_errors(config, backbone, accelerator, loader, None)[0], None
    else:
        loader = replace(loader, draws=config.train.reference_cache)
        reference = adapters_off(backbone) if config.model.lora_rank else frozen_copy(backbone)
    place = make_placer(config.points, backbone, reference, config.train, accelerator)
    return Learner(
        accelerator, Replicated(accelerator), backbone, reference, place, Ahead(loader), config.objective, config.train
    )


def curve(config, cached: bool) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """What twelve steps log, and the weights after them."""
    learner = learner_of(config, cached)
    trained = [p for p in learner.policy.net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    logged = [learner.step(number, optimizer).entry for number in range(12)]
    return logged, [p.detach() for p in trained]


KINDS = {
    "dpo": {},
    "lora": {"lora": True},
    "snr and safeguard": {"snr_gamma": 5.0, "sdpo_mu": 0.5},
    "moments": {"moments": True},
    "kto": {"objective": KTO(beta=100.0), "points": Independent(noise_offset=0.1), "gradient_accumulation_steps": 2},
    "smpo": {"objective": SmPO(beta=20.0), "points": Paired(input_perturbation=0.1)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_live_reference_at_the_same_draws(config, kind):
    given = dict(KINDS[kind])
    config = with_lora(config) if given.pop("lora", False) else config
    if given.pop("moments", False):
        config = replace(config, data=replace(config.data, latents="moments", augmentation="independent"))
    chosen = {key: given.pop(key) for key in ("objective", "points") if key in given}
    config = replace(config, **chosen, train=replace(config.train, **given))
    live, cached = curve(config, False), curve(config, True)
    for mine, theirs in zip(cached[0], live[0], strict=True):
        assert mine.keys() == theirs.keys() and "reference_error" in mine
        for name, value in mine.items():
            wanted = theirs[name]
            if name == "implicit_accuracy":  # of equal networks, the margin is rounding of either sign
                continue
            assert value == pytest.approx(wanted, rel=1e-4, abs=2e-5), name
    for mine, theirs in zip(cached[1], live[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert abs(live[0][-1]["loss"] - live[0][0]["loss"]) > 1e-3  # something was learnt


def test_each_item_has_k_draws_that_come_equally_often(config):
    _, _, loader, _ = opened(config)
    three = replace(loader, draws=3)
    seen: dict[str, list[int]] = {}
    for sample in three.samples(range(2 * 3 * len(three))):
        seen.setdefault(sample.name, []).append(sample.draw)
    assert len(seen) == 10
    for draws in seen.values():
        assert len(set(draws)) == 3 and sorted(draws[:3]) == sorted(draws[3:])
    assert len({draw for draws in seen.values() for draw in draws}) == 30
    assert any(draws[:3] != draws[3:] for draws in seen.values())
    other = replace(three, seed=99)
    again: dict[str, list[int]] = {}
    for sample in other.samples(range(3 * len(three))):
        again.setdefault(sample.name, []).append(sample.draw)
    assert {name: set(draws) for name, draws in again.items()} == {name: set(draws) for name, draws in seen.items()}
    assert any(again[name] != seen[name][:3] for name in seen)
    fresh = [sample.draw for sample in loader.samples(range(3 * len(loader)))]
    assert len(set(fresh)) == len(fresh)


def test_the_reference_runs_once_for_all_epochs_and_runs(config, forwards, monkeypatch):
    def no_copy(backbone):
        raise AssertionError("a second network was made")

    monkeypatch.setattr("diffpref.train.loop.frozen_copy", no_copy)
    train(config)
    assert forwards.count(True) == 15 and forwards.count(False) == K * 10 / 2
    for name, other in {
        "again": {},
        "beta": {"objective": DPO(beta=7.0)},
        "smpo": {"objective": SmPO()},
        "train": {"train": replace(config.train, seed=11, learning_rate=1e-5, batch_size=1, snr_gamma=5.0)},
        "split": {"train": replace(config.train, batch_size=4, gradient_accumulation_steps=2)},
    }.items():
        forwards.clear()
        train(replace(config, output_dir=f"{config.output_dir}-{name}", **other))
        assert forwards and all(forwards), name
    forwards.clear()
    train(with_lora(replace(config, output_dir=f"{config.output_dir}-lora")))  # in fp32 it has the same reference
    assert forwards and all(forwards)


def test_a_short_run_computes_only_what_it_meets(config, forwards):
    filled(replace(config, train=replace(config.train, max_steps=3)))
    assert len(forwards) == 3
    forwards.clear()
    filled(config)
    assert len(forwards) == K * 10 / 2 - 3


def test_a_pass_that_was_cut_goes_on(config, forwards, monkeypatch):
    accelerator, backbone, loader, _ = opened(config)
    monkeypatch.setattr("diffpref.data.shard.SHARD_SECONDS", 0)  # what was made is saved at once
    whole, predict = Paired.__call__, []

    def placed(self, batch, schedule):
        predict.append(batch)
        if len(predict) == 8:
            raise KeyboardInterrupt
        return whole(self, batch, schedule)

    monkeypatch.setattr(Paired, "__call__", placed)
    with pytest.raises(KeyboardInterrupt):
        with_reference_errors(config, backbone, accelerator, loader, None)
    assert len(forwards) == 7
    with_reference_errors(config, backbone, accelerator, loader, None)
    assert len(forwards) == K * 10 / 2


@pytest.fixture
def known(config, forwards):
    """The errors of the configuration's first batch, with its store filled."""
    batch = filled(config)[0].batch(list(range(10)))
    forwards.clear()
    return batch.known_error


def test_another_reference_schedule_precision_or_point_is_another_cache(config, known, forwards, pipeline, tmp_path):
    other = copy_of(make_pipeline(tmp_path / "other", seed=5), tmp_path / "mixed") / "unet"
    schedule = copy_of(pipeline, tmp_path / "schedule")
    told = json.loads((schedule / "scheduler" / "scheduler_config.json").read_text())
    write_json(schedule / "scheduler" / "scheduler_config.json", {**told, "beta_end": 0.02})
    predicts = copy_of(pipeline, tmp_path / "predicts")
    write_json(predicts / "scheduler" / "scheduler_config.json", {**told, "prediction_type": "v_prediction"})
    model = config.model
    for changed in (
        replace(config, model=replace(model, unet=str(other))),
        replace(config, model=replace(model, pretrained=str(schedule))),
        replace(config, model=replace(model, pretrained=str(predicts))),
        replace(config, train=replace(config.train, mixed_precision="bf16")),
        replace(config, points=Paired(noise_offset=0.1)),
        replace(config, data=replace(config.data, resolution=64)),
        replace(config, data=replace(config.data, latents="moments")),
    ):
        forwards.clear()
        errors = filled(changed)[0].batch(list(range(10))).known_error
        assert len(forwards) == K * 10 / 2
        others = (~torch.isclose(errors, known, rtol=1e-5)).sum()
        assert others > 10 or changed.train.mixed_precision == "bf16"  # this test opens all in fp32
    forwards.clear()
    assert torch.equal(filled(config)[0].batch(list(range(10))).known_error, known) and not forwards


def test_another_prompt_or_image_is_computed_anew(config, known, forwards, tmp_path):
    rows = make_pairs(10)
    rows[3] = replace(rows[3], prompt="something else")
    rows[6] = replace(rows[6], rejected=rows[7].rejected)
    changed = replace(config, data=replace(config.data, path=str(write_pairs(tmp_path / "pairs", rows))))
    loader = filled(changed)[0]
    assert len(forwards) <= 2 * K  # two items, whose prompts may be dropped
    forwards.clear()
    assert len(loader.batch(list(range(10))).known_error) == 20
    dropped = replace(config, data=replace(config.data, prompt_dropout=0.99))
    filled(dropped)
    assert forwards


def test_keys_tell_apart_what_latents_depend_on(config, known):
    loader = filled(config)[0]
    rows = asked(loader.samples(range(10)))
    assert not loader.errors.missing(rows).any() and torch.equal(loader.errors.of(rows), known)
    mirrored = [replace(row, view=replace(row.view, mirrored=not row.view.mirrored)) for row in rows]
    sampled = [replace(row, view=replace(row.view, seed=1)) for row in rows]
    drawn = [replace(row, draw=row.draw + 1) for row in rows]
    for others in (mirrored, sampled, drawn):
        assert loader.errors.missing(others).all()
        with pytest.raises(RunError, match="start again"):
            loader.errors.of(others)


def test_one_item_of_a_look_has_its_own_errors(config, known):
    look = learner_of(config, cached=True).look(0, 0)
    assert one_item(look, 1).known_error.tolist() == [known[1], known[11]] and look.known is None


def test_min_snr_weights_are_no_part_of_what_is_kept():
    error, scale = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.25])
    policy, target = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    ones = torch.ones(1)
    outputs = Outputs(policy, target, None, ones, ones, scale, known_error=error)
    assert outputs.reference_error().tolist() == [1.5, 0.5]
    assert outputs.gain().tolist() == [1.5 - 3.0, 0.5 - 0.25]
    assert outputs.pair_metrics(torch.zeros(1))["reference_error"].tolist() == [1.0]
    with pytest.raises(ValueError, match="needs the reference's prediction"):
        DSPO()(outputs)


def test_no_flipped_bit_and_no_torn_file_is_read(config, known, forwards):
    shard = next(config_cache(config).glob("reference-*.safetensors"))
    sidecar, content = shard.with_suffix(".json"), shard.read_bytes()
    noted = sidecar.read_text()
    accelerator, backbone, loader, _ = opened(config)

    def read() -> torch.Tensor:
        ready, _ = with_reference_errors(config, backbone, accelerator, loader, None)
        return ready.batch(list(range(10))).known_error

    random = np.random.default_rng(0)
    spoilt = [content[:-3], content[: len(content) // 2], b""]
    for _ in range(12):
        flipped = bytearray(content)
        flipped[random.integers(len(content))] ^= 1 << int(random.integers(8))
        spoilt.append(bytes(flipped))
    for number, now in enumerate(spoilt):
        for file in config_cache(config).glob("reference-*"):
            file.unlink()
        shard.write_bytes(now)
        sidecar.write_text(noted)
        if keeps_time := number % 2 == 1:
            os.utime(shard, ns=(0, json.loads(noted)["mtime_ns"]))
        forwards.clear()
        try:
            errors = read()
        except RunError as error:
            assert "damaged" in str(error) and keeps_time
            errors = read()  # as it says: start again
        assert torch.equal(errors, known)
        assert forwards or keeps_time  # of a row that is not read in this batch, nobody need know


def config_cache(config) -> Path:
    return Path(config.data.cache)


def test_resume_is_bit_equal(config, tmp_path):
    config = replace(config, train=replace(config.train, checkpointing_steps=5, optimizer="adamw"))
    assert_resumes_bit_for_bit(config, tmp_path, cut=10)


def test_splits_and_processes_change_nothing(config, tmp_path):
    def of(name: str, **sizes):
        return replace(config, output_dir=str(tmp_path / name), train=replace(config.train, **sizes))

    whole = metrics(train(of("whole", batch_size=4)))
    split = metrics(train(of("split", batch_size=2, gradient_accumulation_steps=2)))
    file = tmp_path / "config.yaml"
    two = of("two", batch_size=2)
    file.write_text(to_yaml(replace(two, data=replace(two.data, cache=str(tmp_path / "fresh")))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "-m", "diffpref", "train", "--config", str(file)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for other in (split, metrics(tmp_path / "two")):
        assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in whole], abs=1e-5)
        kept = [line["reference_error"] for line in whole]
        assert [line["reference_error"] for line in other] == pytest.approx(kept, rel=1e-6)
    assert len({line["loss"] for line in whole}) == 15


def test_buckets_find_all_that_they_meet(config, tmp_path):
    pairs = write_pairs(tmp_path / "mixed", make_mixed(13))
    data = replace(config.data, path=str(pairs), buckets=True, bucket_step=8, bucket_max_aspect=2.0)
    run = train(replace(config, data=data, train=replace(config.train, max_steps=3 * K * 13 // 4, batch_size=4)))
    assert len(metrics(run)) == 3 * K * 13 // 4


def test_beta_auto_and_held_out_figures_are_those_of_the_live_reference(config):
    automatic = replace(config, objective=DPO(beta="auto"))
    betas = [calibrated_objective(learner_of(automatic, cached)).beta for cached in (True, False)]
    assert betas[0] == pytest.approx(betas[1], rel=1e-5)
    config = replace(
        config, data=replace(config.data, holdout=0.7), objective=KTO(), points=Independent(), validation=LOOK
    )
    accelerator, backbone, loader, heldout = opened(config)
    kept = with_reference_errors(config, backbone, accelerator, loader, heldout)[1]
    place = make_placer(config.points, backbone, None, config.train, accelerator)
    reference = frozen_copy(backbone)
    with torch.no_grad():
        for parameter in backbone.net.parameters():
            parameter.mul_(1.05)
    live = heldout_metrics(backbone, reference, config.objective, place, heldout, LOOK)
    cached = heldout_metrics(backbone, None, config.objective, place, kept, LOOK)
    assert cached == pytest.approx(live, rel=1e-4) and live["heldout_loss"] != pytest.approx(0.5, abs=1e-4)


LOOK = ValidationConfig(pairs=3, seed=7)


def test_the_guard_sees_a_policy_that_leaves(config):
    config = replace(
        config, guard=GuardConfig("stop", 0.05, 3), train=replace(config.train, learning_rate=0.5, max_grad_norm=0.0)
    )
    with pytest.raises(RunError, match="guard"):
        train(config)


def test_an_error_that_is_not_finite_ends_it_and_is_not_kept(config):
    accelerator, backbone, loader, _ = opened(config)
    with torch.no_grad():
        next(backbone.net.parameters()).fill_(float("inf"))
    with pytest.raises(RunError, match=r"on pair-[0-9] is not finite"):
        with_reference_errors(config, backbone, accelerator, loader, None)
    assert not list(config_cache(config).glob("reference-*"))


def test_the_fingerprint_is_of_the_weights_without_adapters(v_pipeline, config):
    def net(model, weights=torch.float32):
        return load_backbone(model, torch.device("cpu"), weights, trainable=True).net

    plain, lora = net(config.model), net(replace(config.model, lora_rank=2))
    assert fingerprint(plain) == fingerprint(lora)
    half = net(replace(config.model, lora_rank=2), torch.bfloat16)
    assert (
        len({fingerprint(each) for each in (plain, half, net(replace(config.model, pretrained=str(v_pipeline))))}) == 3
    )
    with torch.no_grad():
        list(plain.parameters())[-1].view(-1)[-1] += 1e-3
    assert fingerprint(plain) != fingerprint(lora)


REFUSED = {
    "objective 'sft' has no reference": {"objective": SFT(), "points": Independent()},
    "objective 'dspo' needs the reference's predictions": {"objective": DSPO()},
    "'inverted' points follow the policy": {"points": Inverted()},
    "'replay' points follow the policy": {"points": Replay()},
    "moves by train.reference_decay": {"train": {"reference_decay": 0.9}},
    "leave out data.cache none": {"data": {"cache": "none"}},
    "leave out data.cache none and random": {"data": {"cache": "none", "crop": "random"}},
    "-1 is not a finite number from 0 up": {"train": {"reference_cache": -1}},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_needs_more_than_errors_is_refused(config, text):
    changed = {
        group: replace(getattr(config, group), **value) if isinstance(value, dict) else value
        for group, value in REFUSED[text].items()
    }
    with pytest.raises(UserError, match=r"train\.reference_cache: ") as refused:
        check(replace(config, **changed))
    assert text in str(refused.value) and "\n" not in str(refused.value)
