"""Dense Transformer-XL checkpoints (Dai et al., the PyTorch program of kimiyoung) as neutral ones."""

import argparse

from megamoe.convert.from_reference import add_common_arguments, convert
from megamoe.convert.published import read_published
from megamoe.errors import CheckpointError

SUMMARY = (
    "Read the model.pt of the Transformer-XL PyTorch program, whole or as a state dict, without running what"
    " is in it. Adaptive softmax and projections are kept. Of its attentions, attn_type 0 exists here."
)
EXAMPLES = """\
  convert_checkpoint.py from-transformer-xl LM-TFM-enwik8/model.pt dense
  convert_checkpoint.py from-transformer-xl state.pt dense --set model.cutoffs=20000,40000,200000 \\
      model.pre_norm=true
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_common_arguments(parser, "the model, or its state dict")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    published = read_published(args.input)
    if experts := [name for name in published.tensors if ".experts." in name]:
        raise CheckpointError(f"file {str(args.input)!r}: holds {experts[0]}; convert it with from-reference")
    return convert(published, args)
