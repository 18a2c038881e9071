"""Stopping: the first signal asks, the second kills."""

from __future__ import annotations

import asyncio

import pytest

from services.core.lifecycle import Stop, background_task, cancellable, run_until_stopped


async def test_the_first_reason_is_kept() -> None:
    """What follows from a failure must not hide it."""
    stop = Stop()
    stop.request("disk", failed=True)
    stop.request("SIGTERM")
    await stop.wait()
    assert (stop.reason, stop.requested, stop.exit_code) == ("disk", True, 1)


async def test_nothing_is_requested_at_first() -> None:
    """The exit code of a process that was never asked is 0."""
    stop = Stop()
    assert (stop.requested, stop.exit_code) == (False, 0)


async def test_work_that_ends_by_itself_gives_its_result() -> None:
    """Its errors, too."""

    async def work() -> int:
        return 7

    async def failing() -> None:
        raise ValueError("no")

    assert 7 == await run_until_stopped(work(), Stop())
    with pytest.raises(ValueError, match="no"):
        await run_until_stopped(failing(), Stop())


async def test_a_stop_cancels_work_and_waits_for_its_end() -> None:
    """What it does to clean up is done when this returns."""
    stop, cleaned = Stop(), []

    async def work() -> None:
        try:
            stop.request("SIGTERM")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    await run_until_stopped(work(), stop)
    assert [True] == cleaned


async def test_an_error_while_work_is_being_cancelled_is_not_lost() -> None:
    """A batch that could not be finished, for instance."""
    stop = Stop()

    async def work() -> None:
        try:
            stop.request("SIGTERM")
            await asyncio.Event().wait()
        finally:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await run_until_stopped(work(), stop)


async def answered_by(answer: asyncio.Future[str]) -> str:
    """Wait as nats-py's requests do."""
    return await asyncio.wait_for(answer, 60)


async def test_a_cancellation_counts_that_comes_together_with_the_answer() -> None:
    """wait_for alone returns the answer on Python 3.11, and a process that was asked to stop goes on."""
    answer = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(cancellable(answered_by(answer)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    answer.set_result("here")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_cancellation_counts_that_comes_together_with_an_error() -> None:
    """The error would be taken for the broker's, and the request repeated."""
    answer = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(cancellable(answered_by(answer)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    answer.set_exception(OSError("gone"))
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_request_in_the_clean_up_of_a_cancelled_task_is_answered() -> None:
    """Only a cancellation during the work counts, not the one that the clean-up is for."""
    answer = asyncio.get_running_loop().create_future()
    answer.set_result("released")
    outcome = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            outcome.append(await cancellable(answered_by(answer)))

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert outcome == ["released"]


async def test_a_deadline_strikes_that_comes_together_with_the_answer() -> None:
    """asyncio.timeout works by a cancellation too."""
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    async def work() -> None:
        async with asyncio.timeout(60) as deadline:
            loop.call_soon(deadline.reschedule, loop.time() - 1)
            loop.call_soon(lambda: loop.call_soon(answer.set_result, "late"))
            await cancellable(answered_by(answer))

    with pytest.raises(TimeoutError):
        await work()


@pytest.mark.parametrize("fails", [False, True])
async def test_what_runs_beside_has_ended_when_the_block_has(fails: bool) -> None:
    """Whatever happened in the block, and with its own farewell."""
    said: list[str] = []

    async def work() -> None:
        try:
            said.append("begun")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            said.append("ended")

    async def block() -> None:
        async with background_task(work(), "work"):
            await asyncio.sleep(0)
            assert ["begun"] == said
            if fails:
                raise LookupError

    if fails:
        with pytest.raises(LookupError):
            await block()
    else:
        await block()
    assert ["begun", "ended"] == said


async def test_what_breaks_beside_ends_the_block() -> None:
    """A service must not go on for days without a part of it; what broke is told."""

    async def work() -> None:
        raise LookupError("broken") from ValueError("why")

    with pytest.raises(LookupError, match="broken") as caught:
        async with asyncio.timeout(5), background_task(work(), "work"):
            await asyncio.Event().wait()
    assert isinstance(caught.value.__cause__, ValueError)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
