"""A library that an installation lacks is named in one line, with what installs it."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs
from cocomix.data.left_out import Tally
from cocomix.data.opening import _unpacking
from cocomix.data.sources import _HubDataset
from cocomix.data.tables import read_arrow, read_parquet
from cocomix.distributed.ranks import import_deepspeed
from cocomix.inference.tasks import _Harness
from cocomix.report.figures import FigureEntry, draw
from cocomix.training.metrics import _open_tensorboard, _open_wandb


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("matplotlib", "report", lambda: draw(FigureEntry("name", "title", "caption", lambda: None))),
        ("torch.utils.tensorboard", "train", lambda: _open_tensorboard("folder", 0)),
        ("wandb", "wandb", lambda: _open_wandb("folder", "project", {})),
        ("deepspeed", "train", import_deepspeed),
        ("lm_eval", "eval", lambda: _Harness(SimpleNamespace())),
        ("pyarrow", "data", lambda: next(read_parquet(Path("a.parquet"), "text", Tally("a")))),
        ("pyarrow", "data", lambda: next(read_arrow(Path("a.arrow"), "text", Tally("a")))),
        ("pyarrow", "data", lambda: _unpacking(Path("a.txt.zst"), io.BytesIO(), "zstd")),
        ("datasets", "data", lambda: next(_HubDataset("hf:a", "a", "train", None, "text").documents())),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, module, extra, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CocomixError, match=rf"needs .*: pip install 'cocomix\[{extra}\]' \(.*{module}"):
        use()


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), needs("this", "a library", "it"):
        raise ZeroDivisionError
