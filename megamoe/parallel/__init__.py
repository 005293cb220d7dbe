"""The only room that knows DeepSpeed and torch.distributed."""

import os

import torch

# DeepSpeed reads these while it is imported. Without a GPU it would look for accelerators and warn.
# Nothing here is compiled by TorchDynamo, which costs each rank about two seconds to import.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Torch then remembers the last collectives of a rank, for the report on one that hangs.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
