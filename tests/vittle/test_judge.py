"""The judge and the endpoint behind it, against a local server that speaks the protocol."""

from __future__ import annotations

import threading

import pytest
from chat_server import Reply, serving

from vittle import UserError
from vittle.endpoint import TRIES, Endpoint
from vittle.judge import ATTEMPTS, judge, parse

QUESTION = ("What is it?", "A dog on a lawn.", "A brown dog.", "A cat.")
KEY = "sk-secret-1234567890"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 6\nBecause.", (8, 6)),
        ("7.5, 10", (7.5, 10)),
        ("\n 9/10 3/10 \nwords", (9, 3)),
        ("Assistant 1: 8, Assistant 2: 6", None),
        ("8 6 7", None),
        ("0 11", None),
        ("8", None),
        ("The first is better.\n8 6", None),
        ("", None),
    ],
)
def test_parse(reply: str, scores: tuple[float, float] | None) -> None:
    assert parse(reply) == scores


def test_both_orders_are_judged_and_averaged() -> None:
    def reply(message: str, times: int) -> Reply:
        first_is_reference = message.index(QUESTION[2]) < message.index(QUESTION[3])
        return "9 5\nas I read them" if first_is_reference else "6 7\nas I read them"

    with serving(reply) as server:
        verdict = judge(*QUESTION, Endpoint(server.url, "m").complete)
    assert (verdict.reference, verdict.model, verdict.failures) == (8, 5.5, 0)
    assert len(server.requests) == 2
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 1024)
    assert all(part in request["messages"][-1]["content"] for part in QUESTION)
    assert server.keys == {f"Bearer {KEY}"}


def test_replies_without_scores_are_asked_again_and_counted() -> None:
    with serving(lambda message, times: "8 6" if times == ATTEMPTS - 1 else "I like both.") as server:
        verdict = judge(*QUESTION, Endpoint(server.url, "m").complete)
        assert verdict.failures == 2 * (ATTEMPTS - 1)
        assert (verdict.reference, verdict.model) == (7, 7)
    with serving(lambda message, times: "I like both.") as server:
        verdict = judge(*QUESTION, Endpoint(server.url, "m").complete)
        assert (verdict.model, verdict.reference, verdict.failures) == (None, None, ATTEMPTS)
        assert verdict.reply == "I like both."


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(status: int) -> None:
    with serving(lambda message, times: "fine" if times == TRIES - 1 else status) as server:
        endpoint = Endpoint(server.url, "m")
        assert endpoint.complete("s", "u") == "fine"
        assert (endpoint.retries, len(server.requests)) == (TRIES - 1, TRIES)


@pytest.mark.parametrize(("status", "tries"), [(429, TRIES), (500, TRIES), (401, 1), (404, 1)])
def test_lasting_failures_stop_without_the_key(status: int, tries: int) -> None:
    with serving(lambda message, times: status) as server:
        with pytest.raises(UserError, match=f"answered {status} at try {tries} .*run the same command") as caught:
            Endpoint(server.url, "m").complete("s", "u")
        assert len(server.requests) == tries
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>busy</html>", b"{}", b'{"choices": []}', b"", b"null"])
def test_nonsense(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vittle.endpoint.FIRST_WAIT", 0.001)
    with serving(lambda message, times: body) as server:
        with pytest.raises(UserError, match=f"sent no chat completion in {TRIES} tries"):
            Endpoint(server.url, "m").complete("s", "u")
        assert len(server.requests) == TRIES


def test_an_endpoint_that_is_slow_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vittle.endpoint.TRIES", 2)
    release = threading.Event()
    with serving(lambda message, times: f"late {release.wait(5)}") as server:
        with pytest.raises(UserError, match="did not answer in time at try 2"):
            Endpoint(server.url, "m", timeout=0.1).complete("s", "u")
        release.set()
        gone = server.url
    with pytest.raises(UserError, match="cannot be reached after 2 tries"):
        Endpoint(gone, "m").complete("s", "u")
