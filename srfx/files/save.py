"""`save`: a minimized model into one file."""

from __future__ import annotations

import os

import torch
from torch import fx, nn

from srfx.errors import UnsavableError
from srfx.files.container import VERSION, write
from srfx.files.modules import ModuleWriter, tensors
from srfx.files.records import record_data
from srfx.files.tensors import TensorWriter
from srfx.record.attach import record_of


def save(small: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a minimized model into one file, weights and graph and record, for `srfx.load`.

    The file is a safetensors file: any reader of safetensors sees the weights under their names.  The graph, the plan
    and the rest are JSON inside it.  There is no pickle and no code in it.

    A file at ``path`` is replaced when the new one is complete, and not before.

    Args:
        small: a result of `srfx.minimize`, also after training; any other fx.GraphModule will do too.
        path: the file; by custom it ends in ``.srfx``.

    Raises:
        UnsavableError: the model holds something else than plain tensors and data, see docs/files.md.
        OSError: the file cannot be written.

    Example:
        >>> import srfx, tempfile
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> small = srfx.minimize(net, torch.randn(1, 4))
        >>> file = os.path.join(tempfile.mkdtemp(), "net.srfx")
        >>> save(small, file)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(srfx.load(file)(x), small(x))
        True

    Cost: one copy of one tensor at a time; two passes over the weights, for their checksums and to write them.
    """
    if not isinstance(small, fx.GraphModule):
        raise UnsavableError(
            f"expected a result of srfx.minimize (an fx.GraphModule), got {type(small).__name__}"
        )
    with torch.no_grad():
        bank = TensorWriter(tensors(small))
        module = ModuleWriter(bank)(small)
        record = record_of(small)
        document = {
            "version": VERSION,
            "torch": torch.__version__,
            "module": module,
            "record": None if record is None else record_data(record),
            "tensors": bank.table,
        }
        write(path, document, bank.stored.items())
