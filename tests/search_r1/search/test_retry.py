"""The rule of waiting, and what a search may spend."""

import httpx
import pytest

from search_r1.search.client.attempts import Attempts
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.client.errors import OutOfTime, ServerBusy, Unreachable
from search_r1.search.engines.web import MAX_WAIT_S, reset_of
from search_r1.search.retry import backoff, seconds_to_wait


@pytest.mark.parametrize(("failures", "longest"), [(1, 0.5), (2, 1.0), (5, 8.0)])
def test_the_wait_doubles_with_every_failure_and_differs_from_caller_to_caller(failures, longest):
    waits = [backoff(0.5, failures) for _ in range(200)]
    assert all(longest / 2 <= wait <= longest for wait in waits)
    assert len(set(waits)) > 100 and max(waits) - min(waits) > longest / 4


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("0", 0), ("7", 7), (" 7 ", 7), ("", None), ("-1", None), ("soon", None), ("²", None)],
)
def test_only_a_whole_number_of_seconds_is_read(header, seconds):
    assert seconds_to_wait(header) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3", "X-RateLimit-Reset": "1, 1419704"}, 3),
        ({"X-RateLimit-Reset": "1, 1419704"}, 1),
        ({"Retry-After": "86400"}, MAX_WAIT_S),
        ({}, None),
    ],
)
def test_what_a_provider_of_web_search_asks_for(headers, seconds):
    assert reset_of(httpx.Response(429, headers=headers)) == seconds


def attempts(**limits):
    return Attempts(RetrieverConfig(**limits))


def test_failures_use_up_attempts_and_time():
    error = Unreachable("gone")
    few = attempts(max_retries=1, timeout_s=10)
    few.failed(1.0, error)
    with pytest.raises(Unreachable, match=r"2 times.*gone"):
        few.failed(1.0, error)
    slow = attempts(max_retries=9, timeout_s=10)
    slow.failed(6.0, error)
    assert slow.pause_after_failure(1.0) == 1.0 and slow.left_s == 3.0
    assert slow.pause_after_failure(5.0) == 3.0, "no pause is longer than what is left"
    with pytest.raises(OutOfTime, match=r"10 s.*2 attempts.*gone"):
        slow.failed(0.5, error)


def test_a_busy_server_uses_up_patience_alone():
    error = ServerBusy("full", 3.0)
    search = attempts(max_retries=1, timeout_s=10, busy_timeout_s=20)
    search.failed(9.0, error)
    search.found_busy(1.0, error)
    assert (search.failures, search.left_s, search.patience_s) == (0, 10, 19)
    assert search.pause_while_busy(3.0) == 3.0 and search.patience_s == 16
    with pytest.raises(ServerBusy, match=r"20 s.*full"):
        search.found_busy(16.0, error)
