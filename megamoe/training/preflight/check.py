"""The whole of preflight: meet, compare, measure, judge, report."""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megamoe.config.schema import RunConfig
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import layout_of, offloads_optimizer, resolve_ds_config
from megamoe.parallel.launch import Launch, World
from megamoe.training.heartbeat import Heartbeat, Watch
from megamoe.training.preflight.disk import existing, measure_disk
from megamoe.training.preflight.facts import Facts, versions
from megamoe.training.preflight.judge import judge, judge_versions, seconds_of
from megamoe.training.preflight.measure import arithmetic_speed, best_link, clock_ahead, collective_speeds
from megamoe.training.preflight.memory import free_gpu_memory, free_host_memory
from megamoe.training.preflight.needs import needs_of
from megamoe.training.preflight.report import Report, print_json, print_report
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import agree, joined, load_checked_corpus, with_vocabulary


def preflight(
    run: RunConfig, ds: Mapping[str, Any], launch: Launch, *, timeout: float, max_skew: float, as_json: bool
) -> int:
    """Measure, print from rank 0, and tell whether the run can start; every process calls this.

    Args:
        run: with a name.
        ds: DeepSpeed config, as for training.
        launch: who this process is.
        timeout: seconds that the ranks may need to meet, and for any one measurement. A rank that
            holds up the others for longer is named, and all end with exit code 76.
        max_skew: seconds by which clocks may differ.
        as_json: print JSON instead of tables.

    Returns:
        The exit code: 0, or 1 if there is a problem.

    Raises:
        LostRankError: another rank does not answer.
        MegaMoEError: the run could not start anywhere.
    """
    resolved = resolve_ds_config(run, ds, launch.world_size, Device.detect())
    patience = run.training.hang_timeout
    run = replace(run, training=replace(run.training, hang_timeout=timeout))
    with joined(launch, timeout, at_least=timedelta()) as world:
        report = _examine(run, resolved, world, patience, max_skew)
        if world.is_main:
            (print_json if as_json else print_report)(report)
    return int(any(finding.stops for finding in report.findings))


def _examine(
    run: RunConfig, resolved: Mapping[str, Any], world: World, patience: float, max_skew: float
) -> Report:
    host = socket.gethostname()
    places = [f"rank {rank} on {name}" for rank, name in enumerate(world.gather_objects(host))]
    found = judge_versions(dict(zip(places, world.gather_objects(versions(run, resolved)), strict=True)))
    if found:  # with other code or config, ranks would wait for each other in what follows
        return Report(findings=found)
    corpus = agree(world, lambda: load_checked_corpus(run))
    run = with_vocabulary(run, corpus)
    layout = layout_of(run, resolved, world.world_size)
    needs = needs_of(run, layout, offloads=offloads_optimizer(resolved))
    token = world.gather_objects(os.urandom(8).hex())[0]
    checkpoints = RunFolder.of(run).checkpoints
    heartbeat = Heartbeat()
    with _watched(heartbeat, run, world, existing(checkpoints) / f".preflight-{token}"):
        heartbeat.beat("disk", 0)
        disk = measure_disk(world, checkpoints, token)
        heartbeat.beat("arithmetic", 0)
        flops = arithmetic_speed(world, layout.dtype)
        heartbeat.beat("links", 0)
        hosts = world.gather_objects(host)
        link = best_link(world, hosts)
        heartbeat.beat("clocks", 0)
        clock = clock_ahead(world)
        heartbeat.beat("collectives", 0)
        speeds = collective_speeds(world, layout.ep_size)
        heartbeat.beat("summary", 0)
        mine = Facts(
            world.rank, host, free_host_memory(), hosts.count(host), free_gpu_memory(world.device),
            flops=flops, link=link, clock=clock, **disk,
        )  # fmt: skip
        facts = world.gather_objects(mine)
    seconds = seconds_of(facts, needs, speeds)
    kept = run.checkpoint.keep_last + 1
    found = judge(facts, needs, seconds, kept=kept, patience=patience, max_skew=max_skew)
    return Report(found, needs, facts, speeds, seconds)


@contextmanager
def _watched(heartbeat: Heartbeat, run: RunConfig, world: World, folder: Path) -> Iterator[None]:
    """Name the rank that holds up the others; its files stay then, and only then."""
    watch = Watch(heartbeat, run, world, folder, option="--timeout")
    watch.start()
    try:
        yield
    finally:
        watch.stop(keep_sign=False)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
