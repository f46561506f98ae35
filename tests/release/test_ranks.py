"""The exit status of a Pod of several says how its ranks ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from valr_ops.release import ranks

WORDS = ["--nnodes=2", "--node-rank=0", "--shutdown-timeout=60", "-m", "valr_ops", "run", "stage1_sft"]


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def torchrun(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def run(arguments: Any) -> None:
        assert (arguments.training_script, arguments.training_script_args) == ("valr_ops", ["run", "stage1_sft"])
        if error is not None:
            raise error

    monkeypatch.setattr(ranks.torchrun, "run", run)


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        ({0: 42}, 42, ""),
        ({3: 75}, 75, ""),
        ({0: 75, 1: 42}, 42, ""),
        ({0: 1, 1: -9}, 137, "valr: rank 1 was killed by SIGKILL\n"),
        ({0: -11}, 139, "valr: rank 0 was killed by SIGSEGV\n"),
    ],
)
def test_the_rank_whose_end_explains_the_others_gives_the_status(
    ended: dict[int, int], status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in ended.items()}
    torchrun(monkeypatch, ChildFailedError("valr_ops", failures))
    assert ranks.main(WORDS) == status
    assert capsys.readouterr().err == said


def test_ranks_that_end_well_or_were_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun(monkeypatch, None)
    assert ranks.main(WORDS) == 0
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 75, "before the Pods have met, torchrun does not listen"
    torchrun(monkeypatch, SignalException("told to stop", signal.SIGTERM))
    assert ranks.main(WORDS) == 75
