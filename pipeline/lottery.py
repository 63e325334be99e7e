"""Lottery tickets: iterative magnitude pruning with rewinding, beside what it has to be better than.

A dense network is trained; round after round the smallest weights of the trained network are removed, the others are set back
to what they were at an early step, and trained again (Frankle & Carbin 2019, arXiv:1803.03635; rewinding to an early step instead of
the first: Frankle et al. 2020, arXiv:1912.05671). At some rounds the ticket stands beside:
- reinit: the ticket's mask on newly drawn weights, trained from the first step;
- random_mask: the early weights under a random mask that leaves as many in every layer;
- one_shot: the dense network pruned once by magnitude, its weights kept, trained on until the total of steps is the ticket's;
- dense_long: the dense network trained on for as long, unpruned.
Every training yields its best weights on validation text; all are judged on text that nothing was chosen by. Each training's
result is a file, so a run that was killed goes on behind the last training that it finished.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models.errors import UserError
from models.families import linear_layers
from models.progress import track
from pipeline import lottery_masks
from pipeline.fingerprint import code_of, library_versions
from pipeline.lottery_training import (
    Masks,
    Small,
    Span,
    Texts,
    Training,
    mean_loss,
    new_model,
    put_weights,
    read_texts,
    token_hash,
    train_steps,
    weights_of,
)

ARMS = ("ticket", "reinit", "random_mask", "one_shot", "dense_long")
REINIT_SEED = 10_000  # added to a run's seed: weights that no other run of a few seeds draws


@dataclass(frozen=True)
class Plan:
    """What is run. ``sparsity`` of the linear layers is reached in ``rounds`` equal shares of what is left; ``compared``: rounds
    at which the other arms are trained too; ``steps`` of one training, from the first; ``rewind_step``: where tickets go back to."""

    sparsity: float = 0.9
    rounds: int = 10
    compared: tuple[int, ...] = (3, 6, 10)
    steps: int = 320
    rewind_step: int = 32
    seeds: int = 2
    scope: str = "model"
    small: Small = Small()

    def kept_share(self, number: int) -> float:
        """Of the linear layers' weights, after round ``number``."""
        return (1 - self.sparsity) ** (number / self.rounds)

    @property
    def retrain_steps(self) -> int:
        return self.steps - self.rewind_step


QUICK = Plan(rounds=4, compared=(2, 4), steps=80, rewind_step=8, seeds=1)


@dataclass(frozen=True)
class Job:
    """One training of one seed. ``total_steps``: all that was spent to get this network, the finding of its mask included."""

    arm: str  # dense or one of ARMS
    number: int  # the round
    seed: int
    span: Span
    total_steps: int

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.arm}-{self.number:02d}"


@dataclass(frozen=True)
class Outcome:
    """What a training gave: ``loss`` in nats per token of the held-out text; ``own_steps`` from this network's first step on."""

    arm: str
    number: int
    seed: int
    sparsity: float
    loss: float
    validation_loss: float
    own_steps: int
    total_steps: int


def checked(plan: Plan) -> Plan:
    """UserError for a plan that cannot be run."""
    if not 0 < plan.sparsity < 1:
        raise UserError(f"--sparsity {plan.sparsity}: give a share between 0 and 1, both excluded")
    if plan.rounds < 1 or plan.seeds < 1:
        raise UserError(f"--seeds {plan.seeds} and {plan.rounds} rounds: both must be 1 or more")
    if plan.scope not in ("layer", "model"):
        raise UserError(f"--scope {plan.scope}: write layer or model")
    if not 0 <= plan.rewind_step < plan.steps:
        raise UserError(f"the rewind step {plan.rewind_step} must lie in a training of {plan.steps} steps; set it lower")
    if not plan.compared or not set(plan.compared) <= set(range(1, plan.rounds + 1)):
        raise UserError(f"compared rounds {plan.compared} must be among 1 to {plan.rounds}; correct them")
    return plan


def jobs(plan: Plan, seed: int) -> list[Job]:
    """Every training of a seed in an order in which each finds what it needs."""
    whole, rewound = Span(0, plan.steps), Span(plan.rewind_step, plan.steps)
    found = [Job("dense", 0, seed, whole, plan.steps)]
    for number in range(1, plan.rounds + 1):
        total = plan.steps + number * plan.retrain_steps
        found.append(Job("ticket", number, seed, rewound, total))
        if number in plan.compared:
            longer = Span(0, number * plan.retrain_steps)
            found.append(Job("reinit", number, seed, whole, plan.steps))
            found.append(Job("random_mask", number, seed, rewound, plan.steps))
            found.append(Job("one_shot", number, seed, longer, total))
            found.append(Job("dense_long", number, seed, longer, total))
    return found


def run(plan: Plan, work: Path, tell: Callable[[str, str], None]) -> list[Outcome]:
    """Run what is missing under ``work`` and return every outcome. ``tell(training, state)`` is called as each one ends."""
    folder = work / "lottery" / key_of(checked(plan))
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [job for seed in range(plan.seeds) for job in jobs(plan, seed)]
    missing = [job for job in wanted if not file_of(folder, job).is_file()]
    for job in wanted:
        if job not in missing:
            tell(job.name, "cached")
    total = sum(job.span.steps for job in missing)
    for _ in track(all_steps(plan, missing, folder, tell), "lottery tickets", total=total):
        pass
    return [Outcome(**load(folder, job)["outcome"]) for job in wanted]


def key_of(plan: Plan) -> str:
    """What decides the results: the plan, the texts, our code, the libraries."""
    code, foreign = code_of("pipeline.lottery")
    parts = {**asdict(plan), "seeds": None}  # another seed leaves those that are there as they are
    known = [parts, token_hash(), code, library_versions(foreign), torch.get_num_threads()]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def all_steps(plan: Plan, missing: list[Job], folder: Path, tell: Callable[[str, str], None]) -> Iterator[None]:
    """Run the trainings one after another, one item per optimiser step."""
    texts: dict[int, Texts] = {}
    for job in missing:
        if job.seed not in texts:
            texts = {job.seed: read_texts(plan.small, folder, job.seed)}
        training = start(plan, job, folder, texts[job.seed])
        early = plan.rewind_step if job.arm == "dense" else None
        yield from train_steps(training, texts[job.seed], job.span, plan.small.batch_windows, early)
        outcome = judge(plan, job, training, texts[job.seed])
        save(folder, job, outcome, training)
        tell(job.name, f"sparsity {outcome.sparsity:.1%}, held-out loss {outcome.loss:.4f}")


def start(plan: Plan, job: Job, folder: Path, texts: Texts) -> Training:
    """The network of a job before its first step: weights and mask as the arm has them."""
    fresh = job.seed + (REINIT_SEED if job.arm == "reinit" else 0)
    model = new_model(plan.small, texts.vocab_size, fresh)
    if job.arm == "dense":
        return Training(model, lottery_masks.whole(prunable(model, weights_of(model))))
    dense = load(folder, Job("dense", 0, job.seed, Span(0, 0), 0))
    masks = masks_of(plan, job, folder, model, dense)
    weights = {"reinit": weights_of(model), "ticket": dense["early"], "random_mask": dense["early"]}.get(job.arm, dense["weights"])
    put_weights(model, weights, masks)
    return Training(model, masks)


def masks_of(plan: Plan, job: Job, folder: Path, model: torch.nn.Module, dense: dict) -> Masks:
    """The mask of an arm at a round."""
    whole = lottery_masks.whole(prunable(model, dense["weights"]))
    share = plan.kept_share(job.number)
    if job.arm == "dense_long":
        return whole
    if job.arm == "one_shot":
        return lottery_masks.largest(prunable(model, dense["weights"]), whole, share, plan.scope)
    if job.arm == "ticket":
        before = dense if job.number == 1 else load(folder, Job("ticket", job.number - 1, job.seed, job.span, 0))
        return lottery_masks.largest(prunable(model, before["weights"]), before["masks"], share, plan.scope)
    ticket = load(folder, Job("ticket", job.number, job.seed, job.span, 0))["masks"]
    return ticket if job.arm == "reinit" else lottery_masks.random_like(ticket, job.seed)


def prunable(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that masks are for, by layer name."""
    return {name: weights[f"{name}.weight"] for name in linear_layers(model)}


def judge(plan: Plan, job: Job, training: Training, texts: Texts) -> Outcome:
    """Measure the best weights of a training on the held-out text."""
    put_weights(training.model, training.best, training.masks)
    inherited = {"ticket": plan.rewind_step, "random_mask": plan.rewind_step, "one_shot": plan.steps, "dense_long": plan.steps}
    return Outcome(
        arm=job.arm,
        number=job.number,
        seed=job.seed,
        sparsity=lottery_masks.sparsity(training.masks),
        loss=mean_loss(training.model, texts.test, plan.small.batch_windows),
        validation_loss=training.validation_loss,
        own_steps=inherited.get(job.arm, 0) + training.steps,
        total_steps=job.total_steps,
    )


def file_of(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.pt"


def save(folder: Path, job: Job, outcome: Outcome, training: Training) -> None:
    """Keep a training's result whole or not at all; weights only where a later round reads them."""
    kept = {"outcome": asdict(outcome)}
    if job.arm in ("dense", "ticket"):
        kept |= {"weights": training.best, "masks": training.masks, "early": training.early}
    draft = file_of(folder, job).with_suffix(".draft")
    torch.save(kept, draft)
    draft.replace(file_of(folder, job))


def load(folder: Path, job: Job) -> dict:
    """A training's result. weights_only: nothing but tensors and plain values is ever unpickled."""
    return torch.load(file_of(folder, job), weights_only=True)
