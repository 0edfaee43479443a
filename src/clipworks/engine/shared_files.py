"""Tensors that processes share out, on disk: each process writes its own part, any number of them reads.

Torch's distributed checkpoints do the work, in safetensors files: their own format holds a pickled index,
which could run code when it is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from clipworks.errors import CheckpointError


def write_shared(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write sharded tensors of any shape; every process calls it and writes one file, flushed to disk."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_shared(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors of any shape, whole or sharded, from `write_shared`'s files; every process calls it.

    Raises:
        CheckpointError: if one is missing or has another shape there.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not tensors:
        return
    alone = not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: meant so
        try:
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
        except CheckpointException as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"{folder}: is of another model ({reason})") from error
