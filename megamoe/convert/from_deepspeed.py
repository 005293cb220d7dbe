"""DeepSpeed's native MoE checkpoint files as a neutral checkpoint."""

import argparse
from dataclasses import replace
from pathlib import Path

from megamoe.convert.model_tensors import require_tensors_of
from megamoe.convert.native_reader import read_model
from megamoe.convert.native_tensors import neutral_tensors, read_config, read_optimizer, read_state
from megamoe.convert.neutral_writer import write_neutral
from megamoe.convert.progress import progress
from megamoe.convert.tensors import require_disjoint, total_bytes
from megamoe.errors import ConfigError

SUMMARY = (
    "Read what engine.save_checkpoint of DeepSpeed wrote for a model with native MoE layers: weights, and at"
    " ZeRO stage 0 to 2 the fp32 masters and Adam's moments of all ranks. Nothing in these pickles is run."
    " Every master must round to the weight that was saved beside it."
)
EXAMPLES = """\
  convert_checkpoint.py from-deepspeed saved converted
  convert_checkpoint.py from-deepspeed saved/global_step400 converted --config runs/moe/config.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", type=Path, metavar="IN", help="folder with `latest`, or that of one tag")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config of the run with its model.vocab_size (default: what to-deepspeed put in the files)",
    )
    parser.add_argument(
        "--ep-size", type=int, metavar="N", help="refuse files of another size (default: what they say)"
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="take the model's weights, and no optimizer states"
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    model = read_model(args.input)
    config, state = read_config(model, args.config), read_state(model)
    shards = None if args.weights_only else read_optimizer(model, args.ep_size)
    if args.ep_size is not None and shards is None:
        raise ConfigError(
            f"--ep-size = {args.ep_size}: is that of optimizer states, and none are read; leave it out"
        )
    step = shards.step if shards else 0
    tokens = state.tokens_seen or state.engine.global_samples * config.model.segment_len
    state = replace(state, tokens_seen=tokens, engine=replace(state.engine, optimizer_step=step))
    tensors = list(neutral_tensors(model, shards))
    require_tensors_of(config, [tensor for tensor in tensors if tensor.kind != "memory"])
    require_disjoint(tensors, sorted(model.folder.iterdir()))
    shown = progress(total_bytes(tensors), f"writing {args.output}")
    write_neutral(args.output, tensors, config, state, progress=shown)
    found = f"masters and moments of step {step}" if shards else "weights alone"
    experts = max(model.n_experts.values(), default=0)
    print(f"{args.output}: step {state.step}, {experts} experts, {found}")
    return 0
