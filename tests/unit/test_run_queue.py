"""The run queue: the order, the batches and the batch window."""

import asyncio
import threading

import pytest

from consumer.inference.run_queue import RunQueue, Ticket
from generation_contracts import TextToImageRequest
from tests.support.model_runs import run_request

LONG = 3_600.0  # seconds


def ready(queue: RunQueue, ticket: Ticket, key: object = None) -> Ticket:
    queue.mark_ready(ticket, run_request(TextToImageRequest(prompt="a")), key)
    return ticket


def take_batch(queue: RunQueue) -> list[Ticket]:
    return queue.next_batch(wait=False)


async def next_batch(queue: RunQueue) -> list[Ticket]:
    return await asyncio.wait_for(asyncio.to_thread(queue.next_batch), LONG)


async def test_order_is_that_of_delivery_not_of_readiness() -> None:
    queue = RunQueue()
    first, second, third = (queue.put() for _ in range(3))
    ready(queue, third)
    ready(queue, second)
    assert take_batch(queue) == []
    ready(queue, first)
    assert [take_batch(queue), take_batch(queue), take_batch(queue)] == [[first], [second], [third]]


async def test_removed_ticket_does_not_block_the_next_ticket() -> None:
    queue = RunQueue()
    first, second = queue.put(), ready(queue, queue.put())
    assert queue.remove(first)
    assert take_batch(queue) == [second]


async def test_taken_ticket_cannot_be_removed() -> None:
    queue = RunQueue()
    ticket = ready(queue, queue.put())
    assert take_batch(queue) == [ticket]
    assert not queue.remove(ticket)


async def test_removed_ticket_keeps_no_inputs() -> None:
    queue = RunQueue()
    ticket = ready(queue, queue.put())
    assert queue.remove(ticket)
    assert ticket.run is None
    assert take_batch(queue) == []


async def test_consecutive_tickets_with_one_key_form_a_batch_up_to_the_limit() -> None:
    queue = RunQueue(max_batch=3)
    tickets = [ready(queue, queue.put(), "small") for _ in range(4)]
    assert [take_batch(queue), take_batch(queue)] == [tickets[:3], tickets[3:]]


async def test_ticket_with_another_key_ends_a_batch_and_is_not_overtaken() -> None:
    queue = RunQueue(max_batch=4, window=LONG)
    tickets = [ready(queue, queue.put(), key) for key in "aba"]
    assert [take_batch(queue), take_batch(queue)] == [tickets[:1], tickets[1:2]]
    assert take_batch(queue) == [], "the last ticket waits for tickets with its key"


async def test_ticket_without_a_key_runs_alone() -> None:
    queue = RunQueue(max_batch=4, window=LONG)
    tickets = [ready(queue, queue.put()) for _ in range(2)]
    assert [take_batch(queue), take_batch(queue)] == [tickets[:1], tickets[1:]]


async def test_ticket_that_is_not_ready_ends_a_batch() -> None:
    queue = RunQueue(max_batch=4)
    first, second, third = (queue.put() for _ in range(3))
    ready(queue, first, "a")
    ready(queue, third, "a")
    assert take_batch(queue) == [first]
    ready(queue, second, "a")
    assert take_batch(queue) == [second, third]


async def test_batch_starts_at_the_end_of_its_window() -> None:
    queue = RunQueue(max_batch=4, window=0.05)
    ticket = ready(queue, queue.put(), "a")
    assert take_batch(queue) == []
    assert await next_batch(queue) == [ticket]


async def test_time_in_the_queue_counts_as_the_window() -> None:
    queue = RunQueue(max_batch=2, window=0.02)
    ticket = ready(queue, queue.put(), "a")
    await asyncio.sleep(0.05)
    assert take_batch(queue) == [ticket]


async def test_full_batch_does_not_wait_for_its_window() -> None:
    queue = RunQueue(max_batch=2, window=LONG)
    first, second = ready(queue, queue.put(), "a"), queue.put()
    waiting = asyncio.ensure_future(next_batch(queue))
    await asyncio.sleep(0)
    ready(queue, second, "a")
    assert await waiting == [first, second]


@pytest.mark.parametrize("change", ["ready", "removed", "closed"])
async def test_waiting_thread_is_notified_of_each_change(change: str) -> None:
    queue = RunQueue()
    blocking, behind = queue.put(), ready(queue, queue.put())
    waiting = asyncio.ensure_future(next_batch(queue))
    assert not waiting.done()
    match change:
        case "ready":
            ready(queue, blocking)
        case "removed":
            queue.remove(blocking)
        case _:
            queue.close()
    expected = {"ready": [blocking], "removed": [behind], "closed": []}
    assert await waiting == expected[change]


async def test_closed_queue_returns_no_batch() -> None:
    queue = RunQueue()
    ready(queue, queue.put())
    queue.close()
    assert queue.closed
    assert await next_batch(queue) == []


async def test_every_ticket_is_either_taken_or_removed() -> None:
    queue = RunQueue(max_batch=3)
    received: list[Ticket] = []

    def take() -> None:
        while batch := queue.next_batch():
            received.extend(batch)

    thread = threading.Thread(target=take)
    thread.start()
    tickets, removed = [], []
    for number in range(2_000):
        tickets.append(ready(queue, queue.put(), number % 2))
        if number % 3 == 0 and queue.remove(tickets[-1]):
            removed.append(tickets[-1])
    while len(received) + len(removed) < len(tickets):  # noqa: ASYNC110 - a thread has no event
        await asyncio.sleep(0)
    queue.close()
    thread.join()
    removed_set = set(removed)
    assert received == [ticket for ticket in tickets if ticket not in removed_set]
