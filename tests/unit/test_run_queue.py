"""What the inference thread takes from its queue, and when."""

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


def taken(queue: RunQueue) -> list[Ticket]:
    return queue.next_batch(wait=False)


async def next_batch(queue: RunQueue) -> list[Ticket]:
    return await asyncio.wait_for(asyncio.to_thread(queue.next_batch), LONG)


async def test_order_is_that_of_delivery_not_of_getting_ready() -> None:
    queue = RunQueue()
    first, second, third = (queue.put() for _ in range(3))
    ready(queue, third)
    ready(queue, second)
    assert taken(queue) == []
    ready(queue, first)
    assert [taken(queue), taken(queue), taken(queue)] == [[first], [second], [third]]


async def test_removed_ticket_holds_up_no_other() -> None:
    queue = RunQueue()
    first, second = queue.put(), ready(queue, queue.put())
    assert queue.remove(first)
    assert taken(queue) == [second]


async def test_ticket_that_was_taken_cannot_be_removed() -> None:
    queue = RunQueue()
    ticket = ready(queue, queue.put())
    assert taken(queue) == [ticket]
    assert not queue.remove(ticket)


async def test_removed_ticket_keeps_no_inputs() -> None:
    queue = RunQueue()
    ticket = ready(queue, queue.put())
    assert queue.remove(ticket)
    assert ticket.run is None
    assert taken(queue) == []


async def test_neighbours_with_one_key_are_one_batch_up_to_its_size() -> None:
    queue = RunQueue(max_batch=3)
    tickets = [ready(queue, queue.put(), "small") for _ in range(4)]
    assert [taken(queue), taken(queue)] == [tickets[:3], tickets[3:]]


async def test_one_that_does_not_fit_ends_a_batch_and_is_not_overtaken() -> None:
    queue = RunQueue(max_batch=4, window=LONG)
    tickets = [ready(queue, queue.put(), key) for key in "aba"]
    assert [taken(queue), taken(queue)] == [tickets[:1], tickets[1:2]]
    assert taken(queue) == [], "the last one waits for others of its kind"


async def test_without_a_key_each_runs_alone() -> None:
    queue = RunQueue(max_batch=4, window=LONG)
    tickets = [ready(queue, queue.put()) for _ in range(2)]
    assert [taken(queue), taken(queue)] == [tickets[:1], tickets[1:]]


async def test_one_that_is_not_ready_ends_a_batch() -> None:
    queue = RunQueue(max_batch=4)
    first, second, third = (queue.put() for _ in range(3))
    ready(queue, first, "a")
    ready(queue, third, "a")
    assert taken(queue) == [first]
    ready(queue, second, "a")
    assert taken(queue) == [second, third]


async def test_window_ends_the_wait_for_others() -> None:
    queue = RunQueue(max_batch=4, window=0.05)
    ticket = ready(queue, queue.put(), "a")
    assert taken(queue) == []
    assert await next_batch(queue) == [ticket]


async def test_time_in_the_queue_counts_as_the_window() -> None:
    queue = RunQueue(max_batch=2, window=0.02)
    ticket = ready(queue, queue.put(), "a")
    await asyncio.sleep(0.05)
    assert taken(queue) == [ticket]


async def test_batch_that_fills_up_does_not_wait_for_its_window() -> None:
    queue = RunQueue(max_batch=2, window=LONG)
    first, second = ready(queue, queue.put(), "a"), queue.put()
    waiting = asyncio.ensure_future(next_batch(queue))
    await asyncio.sleep(0)
    ready(queue, second, "a")
    assert await waiting == [first, second]


@pytest.mark.parametrize("change", ["ready", "removed", "closed"])
async def test_thread_that_waits_hears_of_each_change(change: str) -> None:
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
    wanted = {"ready": [blocking], "removed": [behind], "closed": []}
    assert await waiting == wanted[change]


async def test_closed_queue_gives_nothing() -> None:
    queue = RunQueue()
    ready(queue, queue.put())
    queue.close()
    assert queue.closed
    assert await next_batch(queue) == []


async def test_every_ticket_is_taken_or_removed_and_never_both() -> None:
    queue = RunQueue(max_batch=3)
    thread_has: list[Ticket] = []

    def take() -> None:
        while batch := queue.next_batch():
            thread_has.extend(batch)

    thread = threading.Thread(target=take)
    thread.start()
    tickets, removed = [], []
    for number in range(2_000):
        tickets.append(ready(queue, queue.put(), number % 2))
        if number % 3 == 0 and queue.remove(tickets[-1]):
            removed.append(tickets[-1])
    while len(thread_has) + len(removed) < len(tickets):  # noqa: ASYNC110 - a thread has no event
        await asyncio.sleep(0)
    queue.close()
    thread.join()
    kept = set(removed)
    assert thread_has == [ticket for ticket in tickets if ticket not in kept]
