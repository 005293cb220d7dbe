"""The same run on more nodes: with as many streams for each rank, or with the same batch in all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megamoe.config.schema import RunConfig
from megamoe.errors import ConfigError
from megamoe.parallel.ds_config import layout_of, resolve_ds_config
from megamoe.plan.devices import Cluster
from megamoe.plan.estimate import Estimate
from megamoe.plan.inventory import inventory
from megamoe.plan.layouts import Search, best_layouts
from megamoe.plan.vocabulary import with_known_vocabulary

Kind = Literal["weak", "strong"]


@dataclass(frozen=True)
class Row:
    """The best layout on so many nodes.

    Attributes:
        kind: weak: streams grow with the nodes; strong: they do not.
        one: the layout.
        efficiency: tokens per second and node, over those of the first row of its kind.
    """

    kind: Kind
    one: Estimate
    efficiency: float


def scaling(
    run: RunConfig, ds: Mapping[str, Any], cluster: Cluster, nodes: Sequence[int], efficiency: float | None
) -> list[Row]:  # fmt: skip
    """Weak and strong scaling over `nodes`, each in the layout that is fastest there.

    The batch of the run belongs to `cluster`. Numbers of nodes on which nothing fits, or over whose ranks the
    batch does not divide, are left out.

    Raises:
        ConfigError: that is so for all of them.
    """
    run = with_known_vocabulary(run)
    known, rows = inventory(run), []
    for kind in ("weak", "strong"):
        base = 0.0
        for count in nodes:
            there = replace(cluster, nodes=count)
            grown, left = divmod(run.training.batch_size * count, cluster.nodes)
            batch = grown if kind == "weak" else run.training.batch_size
            if batch % there.ranks or (kind == "weak" and left):
                continue
            sized = replace(run, training=replace(run.training, batch_size=batch, micro_batch_size="auto"))
            resolved = resolve_ds_config(sized, ds, there.ranks, there.device.abilities)
            search = Search(sized, there, resolved, known, efficiency)
            best = best_layouts(search, layout_of(sized, resolved, there.ranks))
            if best:
                per_node = best[0].tokens_per_second / count
                base = base or per_node
                rows.append(Row(kind, best[0], per_node / base))
    if not rows:
        raise ConfigError(
            f"--scaling = {','.join(map(str, nodes))}: nothing fits, or training.batch_size ="
            f" {run.training.batch_size} does not divide; give other numbers of nodes"
        )
    return rows
