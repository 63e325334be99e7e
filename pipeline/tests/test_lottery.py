"""The lottery ticket on a micro decoder: what each arm claims about masks, weights, budgets and resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.errors import UserError
from pipeline import lottery, lottery_masks, lottery_report
from pipeline.lottery import ARMS, Job, Plan, checked, jobs, key_of, load, prunable, run, start
from pipeline.lottery_training import Small, Span, Texts, Training, new_model, read_texts, train_steps

PLAN = Plan(
    sparsity=0.75,
    rounds=3,
    compared=(1, 3),
    steps=6,
    rewind_step=2,
    seeds=1,
    small=Small(hidden_size=16, layers=2, ffn_size=32, heads=2, window_tokens=32, batch_windows=2),
)


def silent(_training: str, _state: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The work folder of a whole run, its outcomes, and how many steps every training really took."""
    work, counted, original = tmp_path_factory.mktemp("work"), [], lottery.train_steps

    def counting(*arguments):
        counted.append(0)
        for _ in original(*arguments):
            counted[-1] += 1
            yield

    lottery.train_steps = counting
    outcomes = run(PLAN, work, silent)
    lottery.train_steps = original
    steps = {job.name: count for job, count in zip(jobs(PLAN, 0), counted, strict=True)}
    return work / "lottery" / key_of(PLAN), outcomes, steps


def result(folder, arm: str, number: int) -> dict:
    return load(folder, Job(arm, number, 0, Span(0, 0), 0))


@pytest.fixture(scope="module")
def texts(done) -> Texts:
    return read_texts(PLAN.small, done[0], 0)


def test_masks_are_nested_and_reach_the_sparsity(done):
    folder, outcomes, _ = done
    before = result(folder, "dense", 0)["masks"]
    for number in range(1, PLAN.rounds + 1):
        masks = result(folder, "ticket", number)["masks"]
        for name, mask in masks.items():
            assert not (mask & ~before[name]).any()
        assert lottery_masks.sparsity(masks) == pytest.approx(1 - 0.25 ** (number / PLAN.rounds), abs=1e-4)
        before = masks
    assert {o.sparsity for o in outcomes if o.number == PLAN.rounds and o.arm != "dense_long"} == {lottery_masks.sparsity(before)}


def test_a_rewound_network_is_the_early_checkpoint_under_its_mask(done, texts):
    folder = done[0]
    early = result(folder, "dense", 0)["early"]
    assert any(not torch.equal(early[name], weight) for name, weight in result(folder, "dense", 0)["weights"].items())
    for job in [job for job in jobs(PLAN, 0) if job.arm in ("ticket", "random_mask")]:
        training = start(PLAN, job, folder, texts)
        for name, parameter in training.model.named_parameters():
            mask = training.masks.get(name.removesuffix(".weight"), torch.ones_like(parameter, dtype=torch.bool))
            assert torch.equal(parameter, torch.where(mask, early[name], 0))


def test_the_early_checkpoint_is_that_of_training_so_far(done, texts):
    model = new_model(PLAN.small, texts.vocab_size, 0)
    training = Training(model, lottery_masks.whole(prunable(model, dict(model.named_parameters()))))
    steps = train_steps(training, texts, Span(0, PLAN.steps), PLAN.small.batch_windows)
    for _ in range(PLAN.rewind_step):
        next(steps)
    early = result(done[0], "dense", 0)["early"]
    assert all(torch.equal(parameter, early[name]) for name, parameter in model.named_parameters())


def test_pruned_weights_stay_zero_in_training(done, texts):
    for arm in ("ticket", "reinit", "random_mask", "one_shot"):
        job = next(job for job in jobs(PLAN, 0) if job.arm == arm and job.number == PLAN.rounds)
        training = start(PLAN, job, done[0], texts)
        before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
        for _ in train_steps(training, texts, job.span, PLAN.small.batch_windows):
            weights = prunable(training.model, dict(training.model.named_parameters()))
            assert not any(weights[name][~mask].any() for name, mask in training.masks.items())
        assert all((weights[name] != before[f"{name}.weight"])[mask].any() for name, mask in training.masks.items())


def test_budgets_are_what_is_claimed(done):
    _, outcomes, steps = done
    by_name = {f"seed0-{o.arm}-{o.number:02d}": o for o in outcomes}
    for number in PLAN.compared:
        ticket = by_name[f"seed0-ticket-{number:02d}"]
        spent = steps["seed0-dense-00"] + sum(steps[f"seed0-ticket-{n:02d}"] for n in range(1, number + 1))
        assert ticket.total_steps == spent
        for arm in ("one_shot", "dense_long"):
            assert by_name[f"seed0-{arm}-{number:02d}"].total_steps == steps["seed0-dense-00"] + steps[f"seed0-{arm}-{number:02d}"] == spent
        for arm in ("ticket", "reinit", "random_mask"):
            inherited = 0 if arm == "reinit" else PLAN.rewind_step
            assert by_name[f"seed0-{arm}-{number:02d}"].own_steps == steps[f"seed0-{arm}-{number:02d}"] + inherited == PLAN.steps
    assert sum(steps.values()) == sum(job.span.steps for job in jobs(PLAN, 0))


def test_rivals_have_the_mask_that_they_should(done, texts):
    folder, number = done[0], PLAN.rounds
    ticket = result(folder, "ticket", number)["masks"]
    found = {job.arm: start(PLAN, job, folder, texts) for job in jobs(PLAN, 0) if job.number == number}
    assert all(torch.equal(found["reinit"].masks[name], mask) for name, mask in ticket.items())
    assert all(int(found["random_mask"].masks[name].sum()) == int(mask.sum()) for name, mask in ticket.items())
    assert not any(torch.equal(found["random_mask"].masks[name], mask) for name, mask in ticket.items())
    fresh = dict(found["reinit"].model.named_parameters())
    assert not torch.equal(fresh["model.embed_tokens.weight"], result(folder, "dense", 0)["early"]["model.embed_tokens.weight"])
    trained = result(folder, "dense", 0)["weights"]
    for name, weight in prunable(found["one_shot"].model, dict(found["one_shot"].model.named_parameters())).items():
        assert torch.equal(weight, torch.where(found["one_shot"].masks[name], trained[f"{name}.weight"], 0))
    assert lottery_masks.sparsity(found["dense_long"].masks) == 0


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_largest_weights_stay(scope):
    draws = np.random.default_rng(0)
    weights = {name: torch.from_numpy(draws.normal(size=(8, 10)) * scale) for name, scale in (("a", 1.0), ("b", 5.0))}
    before = lottery_masks.largest(weights, lottery_masks.whole(weights), 0.5, scope)
    masks = lottery_masks.largest({name: weight.neg() for name, weight in weights.items()}, before, 0.25, scope)
    groups = [("a", "b")] if scope == "model" else [("a",), ("b",)]
    for group in groups:
        sizes = np.concatenate([weights[name].abs().numpy().ravel() for name in group])
        limit = np.sort(sizes)[::-1][len(sizes) // 4 - 1]
        for name in group:
            assert np.array_equal(masks[name].numpy(), weights[name].abs().numpy() >= limit)


def test_a_killed_run_goes_on_and_ends_with_the_same(done, tmp_path):
    folder, outcomes, _ = done

    def kill(training: str, _state: str) -> None:
        if training == "seed0-ticket-02":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(PLAN, tmp_path, kill)
    resumed = tmp_path / "lottery" / folder.name
    kept = {file.name: file.stat().st_mtime_ns for file in resumed.glob("*.pt")}
    assert 0 < len(kept) < len(jobs(PLAN, 0))
    said = {}
    assert run(PLAN, tmp_path, lambda training, state: said.setdefault(training, state)) == outcomes
    assert {name for name, state in said.items() if state == "cached"} == {name.removesuffix(".pt") for name in kept}
    assert all((resumed / name).stat().st_mtime_ns == time for name, time in kept.items())
    for name, weight in result(folder, "ticket", PLAN.rounds)["weights"].items():
        assert torch.equal(weight, result(resumed, "ticket", PLAN.rounds)["weights"][name])


def test_another_seed_keeps_the_first_and_the_report_has_its_spread(done, tmp_path):
    folder, outcomes, _ = done
    more = run(replace(PLAN, seeds=2), folder.parent.parent, silent)
    assert more[: len(outcomes)] == outcomes and len(more) == 2 * len(outcomes)
    plan = replace(PLAN, seeds=2)
    record = lottery_report.write(plan, more, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"lottery.json", "lottery.md", "lottery.png"} and first["lottery.png"].startswith(b"\x89PNG")
    assert json.loads(first["lottery.json"]) == json.loads(json.dumps(record))
    arms = record["levels"][-1]["arms"]
    assert tuple(arms) == ARMS
    perplexities = [np.exp(o.loss) for o in more if o.arm == "ticket" and o.number == PLAN.rounds]
    assert arms["ticket"]["perplexity"] == pytest.approx(np.mean(perplexities))
    assert (arms["ticket"]["lowest"], arms["ticket"]["highest"]) == pytest.approx((min(perplexities), max(perplexities)))
    rows = lottery_report.rows(record)
    assert len(rows) == PLAN.rounds + 1 and "±" in rows[-1][3] and rows[2][4:] == ("-",) * 4
    lottery_report.write(plan, more, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_validation_text_is_not_trained_on(texts):
    rows = {bytes(np.asarray(block)) for block in texts.train.blocks}
    assert not any(window.numpy().astype(np.uint16).tobytes() in rows for window in texts.validation)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": 1.0}, "--sparsity"),
        ({"sparsity": 0.0}, "--sparsity"),
        ({"rounds": 0}, "0 rounds"),
        ({"seeds": 0}, "--seeds"),
        ({"scope": "row"}, "--scope"),
        ({"rewind_step": 6}, "rewind step"),
        ({"compared": (4,)}, "compared"),
    ],
)
def test_plans_that_cannot_be_run(change, message):
    with pytest.raises(UserError, match=message):
        checked(replace(PLAN, **change))
