"""Who is at fault when all ranks wait: decided from two readings of their signs of life."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from parallel.failure import RankError
from parallel.heartbeat import Beat, Heartbeat, diagnose, is_lost
from parallel.ranks import wait_for_all


def beats(*places: tuple[int, int, str], sent: int = 1) -> list[Beat]:
    return [Beat(step, number, section, 61.6, sent) for step, number, section in places]


class TestDiagnose:
    def test_behind(self) -> None:
        before = beats((17, 2, "update"), (17, 2, "update"), (17, 0, "data"))
        after = [beat._replace(sent=2) for beat in before]
        rank, message = diagnose(before, after, 30.0)
        assert rank == 2
        assert message == ("has been in section data of step 17 for 62 s; the others wait in section update of step 17")

    def test_a_step_behind(self) -> None:
        before = beats((18, 0, "data"), (17, 5, "save"), (18, 0, "data"))
        assert diagnose(before, [b._replace(sent=2) for b in before], 30.0)[0] == 1

    def test_more_than_one_behind(self) -> None:
        before = beats((3, 1, "update"), (3, 0, "data"), (3, 0, "data"), (3, 0, "data"))
        rank, message = diagnose(before, [b._replace(sent=2) for b in before], 30.0)
        assert rank == 1
        assert "like ranks 2 3" in message

    def test_silent(self) -> None:
        """The dead one counts, however far it had come."""
        before = beats((17, 0, "data"), (17, 2, "update"), (17, 2, "update"))
        after = [before[0]._replace(sent=2), before[1], before[2]._replace(sent=2)]
        rank, message = diagnose(before, after, 30.0)
        assert rank == 1
        assert message.startswith("gives no sign of life, it was last in section update of step 17")

    def test_nobody(self) -> None:
        before = beats((17, 2, "update"), (17, 2, "update"))
        rank, message = diagnose(before, [b._replace(sent=2) for b in before], 30.0)
        assert rank is None
        assert "the furthest back is in section update of step 17, the longest in a section 62 s" in message

    def test_slow_is_not_hanging(self) -> None:
        before = beats((17, 2, "update"), (17, 0, "data"))
        rank, message = diagnose(before, [b._replace(sent=2, age_s=2.0) for b in before], 30.0)
        assert rank is None
        assert "the furthest back is in section data of step 17" in message


class TestHeartbeat:
    def heartbeats(self) -> list[Heartbeat]:
        store = dist.HashStore()
        return [Heartbeat(store, rank, 2, 60.0) for rank in range(2)]

    def test_places(self) -> None:
        one, other = self.heartbeats()
        for step, section in ((1, "data"), (1, "update"), (2, "data"), (2, "update"), (2, "save")):
            one.beat(step, section)
        assert one.store is not None
        one._send(one.store)
        first, second = other.read(one.store)
        assert first[:3] == (2, 2, "save")
        assert second == Beat()

    def test_a_section_of_one_rank_does_not_shift_the_next_step(self) -> None:
        one, other = self.heartbeats()
        one.beat(1, "review")
        one.beat(1, "samples")
        other.beat(1, "review")
        for heartbeat in (one, other):
            heartbeat.beat(2, "data")
        assert (one._step, one._number) == (other._step, other._number)

    def test_own_errors_are_told_to_the_others(self) -> None:
        one, other = self.heartbeats()
        error = ValueError("no such clip")
        assert one.explain(error) is error
        told = other.explain(RuntimeError("[gloo] Connection closed by peer"))
        assert isinstance(told, RankError)
        assert str(told) == "rank 0: no such clip"
        second = ValueError("mine")
        assert other.explain(second) is second, "an own error stays what it is"
        assert one.verdict(one.store).message == "no such clip", "the first verdict holds"

    def test_one_rank_has_no_thread_without_a_deadline(self) -> None:
        heartbeat = Heartbeat(None, 0, 1, 1.0)
        heartbeat.start()
        heartbeat.beat(1, "data")
        assert not heartbeat._thread.is_alive()
        error = RuntimeError("gloo")
        assert heartbeat.explain(error) is error

    @pytest.mark.parametrize(
        ("error", "is_one"),
        [
            (
                RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
                True,
            ),
            (RuntimeError("Timed out waiting 4000ms for recv operation to complete"), True),
            (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), True),
            (ValueError("timed out"), False),
            (RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0"), False),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        ],
    )
    def test_errors_of_lost_ranks(self, error: BaseException, is_one: bool) -> None:
        assert is_lost(error) is is_one


def test_who_did_not_come() -> None:
    store = dist.HashStore()
    store.set("here/0", "")
    with pytest.raises(RankError, match=r"rank 2: has not begun after 0\.2 s; of 4 ranks these are missing: 2 3"):
        wait_for_all(store, 1, 4, 0.2)


def test_who_failed_on_the_way() -> None:
    """Nobody waits for a rank that has found no device."""
    store = dist.HashStore()
    Heartbeat(store, 3, 4, 60.0).explain(RankError(3, "is number 3 on its machine, which has 2 CUDA devices"))
    with pytest.raises(RankError, match="rank 3: is number 3 on its machine, which has 2 CUDA devices"):
        wait_for_all(store, 1, 4, 60.0)


def test_all_come() -> None:
    store = dist.HashStore()
    store.set("here/0", "")
    store.add("here", 1)
    wait_for_all(store, 1, 2, 0.2)
