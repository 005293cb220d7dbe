"""The whole of preflight: join, measure, judge, report."""

import hashlib
import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

import megamoe
from megamoe.config.schema import RunConfig
from megamoe.errors import ExitCode
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import layout_of, resolve_ds_config
from megamoe.parallel.launch import Launch, World, start
from megamoe.parallel.lost import is_lost_rank, lost_rank
from megamoe.training.environment import config_hash, describe_environment
from megamoe.training.preflight.disk import measure_disk
from megamoe.training.preflight.judge import Facts, Finding, gb, judge
from megamoe.training.preflight.measure import best_link, clock_ahead, collective_speeds
from megamoe.training.preflight.needs import Needs, needs_of
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import agree, load_checked_corpus, with_vocabulary


def preflight(
    run: RunConfig, ds: Mapping[str, Any], launch: Launch, *, timeout: float, max_skew: float, as_json: bool
) -> bool:
    """Measure, print from rank 0, and tell whether the run can start; every process calls this.

    Args:
        run: with a name.
        ds: DeepSpeed config, as for training.
        launch: who this process is.
        timeout: seconds after which the process ends with `ExitCode.LOST_RANK`, whatever it waits for.
        max_skew: seconds by which clocks may differ.
        as_json: print JSON instead of a table.

    Raises:
        LostRankError: another rank does not answer.
        MegaMoEError: the run could not start anywhere.
    """
    timer = threading.Timer(timeout, _give_up, (launch.rank, timeout))
    timer.daemon = True
    timer.start()
    resolved = resolve_ds_config(run, ds, launch.world_size, Device.detect())
    world = start(launch, timedelta(seconds=timeout))
    try:
        corpus = agree(world, lambda: load_checked_corpus(run))
        run = with_vocabulary(run, corpus)
        layout = layout_of(run, resolved, launch.world_size)
        needs = needs_of(run, layout)
        facts = world.gather_objects(_facts(run, world))
        speeds = collective_speeds(world, layout.ep_size)
    except RuntimeError as error:
        if is_lost_rank(error):
            raise lost_rank(error, world.rank, "in preflight") from error
        raise
    findings = judge(facts, needs, run.checkpoint.keep_last + 1, max_skew)
    if world.is_main:
        _report(needs, facts, speeds, findings, as_json)
    world.shutdown()
    timer.cancel()
    return not any(finding.stops for finding in findings)


def _facts(run: RunConfig, world: World) -> Facts:
    host = socket.gethostname()
    hosts = world.gather_objects(host)
    token = world.gather_objects(os.urandom(8).hex())[0]
    on_gpu = world.device.type == "cuda"
    return Facts(
        world.rank,
        host,
        _versions(run),
        torch.cuda.mem_get_info()[0] if on_gpu else _free_ram(),
        1 if on_gpu else hosts.count(host),
        best_link(world, hosts),
        clock_ahead(world),
        **measure_disk(world, RunFolder.of(run).checkpoints, token),
    )


def _versions(run: RunConfig) -> dict[str, str]:
    environment = describe_environment()
    code = hashlib.sha256()
    package = Path(megamoe.__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + path.read_bytes())
    packages = environment["packages"]
    return {
        "python": environment["python"],
        "torch": str(packages["torch"]),
        "deepspeed": str(packages["deepspeed"]),
        "megamoe": megamoe.__version__,
        "code": code.hexdigest()[:12],
        "config": config_hash(run.to_dict())[:12],
    }


def _free_ram() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _report(
    needs: Needs,
    facts: list[Facts],
    speeds: dict[str, dict[int, float]],
    findings: list[Finding],
    as_json: bool,
) -> None:
    seconds = {
        name: getattr(needs, name) / by_size[max(by_size)] for name, by_size in speeds.items() if by_size
    }
    if as_json:
        ranks, found = [asdict(fact) for fact in facts], [asdict(finding) for finding in findings]
        print(json.dumps({"needs": asdict(needs), "ranks": ranks, "bytes_per_second": speeds,
                          "seconds_per_step": seconds, "findings": found}, indent=2))  # fmt: skip
        return
    console = Console()
    table = Table("rank", "host", "free", "link MB/s", "clock ms", "write MB/s", "read MB/s", "disk free")
    for fact in facts:
        table.add_row(
            str(fact.rank), fact.host, gb(fact.memory_free), f"{fact.link / 1e6:.0f}",
            f"{fact.clock * 1000:+.1f}", f"{fact.disk_write / 1e6:.0f}", f"{fact.disk_read / 1e6:.0f}",
            gb(fact.disk_free),
        )  # fmt: skip
    console.print(table)
    for name, value in seconds.items():
        need = gb(getattr(needs, name))
        console.print(f"{name}: {need} per step, {value:.3f} s", highlight=False)
    console.print(f"memory: {gb(needs.memory)} per rank; checkpoint: {gb(needs.checkpoint)}", highlight=False)
    for finding in findings:
        label = "problem" if finding.stops else "warning"
        console.print(f"{label}: {finding.text}", highlight=False, soft_wrap=True, markup=False)


def _give_up(rank: int, timeout: float) -> NoReturn:
    print(f"megamoe: error: rank {rank}: preflight took more than {timeout:g} s", flush=True)
    os._exit(ExitCode.LOST_RANK)
