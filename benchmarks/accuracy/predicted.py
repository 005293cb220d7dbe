"""Measured figures beside those of the plan."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

import torch

from benchmarks.accuracy.cases import Case
from benchmarks.accuracy.live import Account
from benchmarks.accuracy.parameters import Counts
from benchmarks.accuracy.peak import Peak
from benchmarks.accuracy.rows import ACTIVATIONS, FLOPS, HELD, PARAMETERS, SENT, Row
from benchmarks.accuracy.states import BACKWARD, FORWARD, UPDATE
from benchmarks.accuracy.traffic import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL
from megamoe.config import RunConfig
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import Layout
from megamoe.plan.devices import Accelerator, Cluster
from megamoe.plan.estimate import Estimate, estimate
from megamoe.plan.workload import experts_per_token

THIS_CPU = Accelerator(
    name="cpu", kind="cpu", memory=16e9, peak={torch.float32: 1e11, torch.bfloat16: 1e11}, bandwidth=1e10,
    fast=1e9, slow=1e9, efficiency=1.0, abilities=Device("cpu", bf16=True, fp16=False),
)  # fmt: skip
"""Its speed is of no account here."""

UNEVEN = ("compete", "gshard", "switch")
"""Policies of which a plan notes that steps differ: all experts compete in some, or choices are left out."""


def plan_of(case: Case) -> Estimate:
    """What the plan says of a run on ranks of this machine."""
    return estimate(case.run(), case.layout(), Cluster(1, case.ranks, THIS_CPU), ds=case.ds_config())


def parameter_rows(built: Sequence[tuple[str, str, RunConfig, Counts]]) -> Iterator[Row]:
    """One row for each policy that agrees in all presets, and one for each count that does not."""
    sums: dict[str, list[int]] = {}
    for policy, preset, run, counts in built:
        layout = Layout(1, 1, run.training.batch_size, 1, 1, torch.float32)
        plan = estimate(run, layout, Cluster(1, 1, THIS_CPU)).parameters
        predicted = {"all": plan.total, "frozen": plan.frozen, "in experts": plan.experts}
        wrong = {name for name, count in counts.items() if predicted[name] != count}
        yield from (Row(PARAMETERS, f"{policy}, {preset}", n, counts[n], predicted[n]) for n in wrong)
        if not wrong:
            sums.setdefault(policy, []).append(counts["all"])
    for policy, totals in sums.items():
        yield Row(PARAMETERS, f"{policy}, {len(totals)} presets", "all", sum(totals), sum(totals))


def account_rows(case: Case, accounts: Sequence[Account]) -> Iterator[Row]:
    """What ranks hold, send and compute: of memory the rank with the most, of the rest their mean."""
    plan = plan_of(case)
    for row in (*_held(case, accounts, plan), *_sent(case, accounts, plan)):
        if row.measured or row.predicted:
            yield row
    if case.dtype == "fp32":  # in 16 bits experts compute rows of padding on a CPU
        moe, measured = case.run().moe, mean(account.flops for account in accounts)
        promised = moe.router.name not in UNEVEN and experts_per_token(moe, moe.top_k)[1]
        yield Row(FLOPS, case.name, "FLOPs", measured, plan.flops.per_step, promised)


def _held(case: Case, accounts: Sequence[Account], plan: Estimate) -> Iterator[Row]:
    memory, accumulation = plan.memory, plan.layout.accumulation

    def row(
        quantity: str, count: Callable[[Account], int], predicted: float | None = None, promised: bool = True
    ) -> Row:
        return Row(HELD, case.name, quantity, max(map(count, accounts)), predicted, promised)

    yield row("weights", lambda account: account.states.weights, memory.weights)
    yield row("gradients", lambda account: account.gradients, memory.gradients)
    yield row("optimizer states", lambda account: account.states.optimizer, memory.optimizer)
    yield row("frozen", lambda account: account.states.frozen, memory.frozen)
    # The plan counts one micro-batch's more, which is there while it is made.
    xl_memory = memory.xl_memory * accumulation / (accumulation + 1)
    yield row("memory of the model", lambda account: account.memory, xl_memory)
    together = memory.gradients + memory.buckets
    yield row("gradients and buckets", lambda account: account.reducing, together, promised=False)
    yield row("gradients while Adam works", lambda account: account.updating)


def _sent(case: Case, accounts: Sequence[Account], plan: Estimate) -> Iterator[Row]:
    traffic = plan.traffic

    def row(quantity: str, phases: Sequence[str], collective: str, predicted: float | None = None) -> Row:
        sent = mean(sum(account.sent.get((phase, collective), 0) for phase in phases) for account in accounts)
        return Row(SENT, case.name, quantity, sent, predicted)

    reduced = traffic.all_reduce.total + traffic.reduce_scatter.total
    yield row("tokens to experts and back", (FORWARD, BACKWARD), ALL_TO_ALL, traffic.all_to_all.total)
    yield row("gradients", (BACKWARD,), ALL_REDUCE, reduced)
    yield row("weights", (UPDATE,), ALL_GATHER, traffic.all_gather.total)
    yield row("tokens, forward", (FORWARD,), ALL_TO_ALL)
    yield row("tokens, backward", (BACKWARD,), ALL_TO_ALL)
    yield row("statistics of routing", (FORWARD,), ALL_REDUCE)
    yield row("norms and flags", (UPDATE,), ALL_REDUCE)


def peak_rows(case: Case, peak: Peak, saved: int) -> Iterator[Row]:
    """Activations of a run, with the memory that a micro-batch makes; `saved` is what autograd keeps."""
    name, plan = _name_of_peak(case), plan_of(case)
    made = plan.memory.xl_memory / (plan.layout.accumulation + 1)
    yield Row(ACTIVATIONS, name, "most", peak.peak, plan.memory.activations + made)
    yield Row(ACTIVATIONS, name, "when the backward pass begins", peak.kept)
    if not case.run().training.activation_checkpointing:  # autograd is not told what that keeps
        yield Row(ACTIVATIONS, name, "kept by autograd", saved)


def _name_of_peak(case: Case) -> str:
    training = case.run().training
    again = ", activations computed again" if training.activation_checkpointing else ""
    return f"{case.shape.name}, {case.dtype}{again}"
