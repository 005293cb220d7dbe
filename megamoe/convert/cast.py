"""Exported models in another precision."""

import argparse
from pathlib import Path

from megamoe.checkpoint.exported import BAKED, ExportReader, is_export
from megamoe.convert.export import add_shard_size
from megamoe.convert.export_tensors import export_tensor
from megamoe.convert.exported import PRECISIONS, as_type, write_export
from megamoe.convert.model_tensors import model_tensors, require_tensors_of
from megamoe.convert.progress import progress
from megamoe.convert.tensors import LazyTensor, total_bytes
from megamoe.errors import CheckpointError

SUMMARY = (
    "Write an exported model with its weights in another type. Routers keep theirs. A neutral checkpoint has"
    " no type to change: it always holds fp32 masters and moments, which a run of any precision starts from."
)
EXAMPLES = """\
  convert_checkpoint.py cast exported exported-bf16 --dtype bf16
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", type=Path, metavar="IN", help="exported folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--dtype", choices=PRECISIONS, required=True, help="type of the weights")
    add_shard_size(parser)


def run(args: argparse.Namespace) -> int:
    """Convert."""
    if not is_export(args.input):
        raise CheckpointError(
            f"{str(args.input)!r}: is no exported model; write one with export --dtype {args.dtype}"
        )
    reader = ExportReader(args.input)
    reader.verify_files()
    tensors = as_type(tensors_of(reader), PRECISIONS[args.dtype])
    shown = progress(total_bytes(tensors), f"writing {args.output}")
    write_export(
        args.output, tensors, reader.config, reader.state, shard_size=args.shard_size, progress=shown
    )
    print(f"{args.output}: {total_bytes(tensors):,} bytes of tensors in {args.dtype}")
    return 0


def tensors_of(reader: ExportReader) -> list[LazyTensor]:
    """The tensors of an exported model, generated routers included.

    Raises:
        CheckpointError: they are not those of the model that its config describes.
    """
    expected = model_tensors(reader.config, reader.numel)
    reader.require_only(expected)
    baked = dict.fromkeys(filter(BAKED.fullmatch, reader.files), "buffer")
    kinds = baked | {name: tensor.kind for name, tensor in expected.items()}
    tensors = [export_tensor(reader, kind, name) for name, kind in kinds.items()]
    require_tensors_of(reader.config, [tensor for tensor in tensors if tensor.name in expected])
    return tensors
