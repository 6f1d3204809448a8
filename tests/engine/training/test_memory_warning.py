from types import SimpleNamespace

import torch

from cocomix.core.config import Config
from cocomix.distributed.ranks import Ranks
from cocomix.training.memory_warning import warn_of_memory


def test_the_first_rank_says_what_there_is_to_say_of_its_gpus(monkeypatch, capsys):
    seen = []

    def warning(config, *rest):
        seen.append(rest)
        return "does not fit" if len(seen) == 1 else None

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**30))
    gpu = torch.device("cuda")
    warn_of_memory(warning, Config(), 300, Ranks(0, 2, gpu))
    assert capsys.readouterr().err == "warning: does not fit\n" and seen == [(300, 2, 2**30)]
    warn_of_memory(warning, Config(), 300, Ranks(0, 2, gpu))
    assert capsys.readouterr().err == "" and len(seen) == 2
    for ranks in (Ranks(1, 2, gpu), Ranks(0, 2, torch.device("cpu"))):
        warn_of_memory(warning, Config(), 300, ranks)
    warn_of_memory(None, Config(), 300, Ranks(0, 2, gpu))
    assert len(seen) == 2
