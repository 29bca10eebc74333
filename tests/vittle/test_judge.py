"""The judge and the endpoint behind it, against a local server that speaks the protocol."""

from __future__ import annotations

import json
import threading
import time

import pytest
from chat_server import Reply, serving

from vittle import UserError
from vittle.endpoint import AT_ONCE, TRIES, Endpoint
from vittle.judge import AGAIN, ATTEMPTS, judge, parse

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
        ("-1 5", None),
        ("**8 6**", (8, 6)),
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
    def reply(message: str, times: int) -> Reply:
        return "8 6" if message.endswith(AGAIN) and times == ATTEMPTS - 2 else "I like both."

    with serving(reply) as server:
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


@pytest.mark.parametrize("length", [0, 150, 185, 195])
def test_the_key_is_told_nowhere(length: int) -> None:
    body = json.dumps({"error": {"message": f"{'x' * length} no, {KEY}, not now"}}).encode()
    refused = pytest.raises(UserError, match="answered 401 at try 1")
    with serving(lambda message, times: (401, body)) as server, refused as caught:
        Endpoint(server.url.replace("//", "//me:password@"), "m").complete("s", "u")
    assert not any(secret in str(caught.value) for secret in (KEY[:6], "password"))


@pytest.mark.parametrize("found", ["", "sk-abc\n"])
def test_keys_that_are_empty_or_end_in_a_line(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", found)
    with serving(lambda message, times: 404) as server:
        with pytest.raises(UserError, match="answered 404") as caught:
            Endpoint(server.url, "none").complete("s", "u")
        assert server.keys == {f"Bearer {found.strip() or 'none'}"}
    assert found or "***" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-é", "sk abc", "sk\u200b"])
def test_keys_that_are_none(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a space or a character that is no ASCII") as caught:
        Endpoint("http://localhost", "m")
    assert key not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match="url is 'localhost:8000'; must be such as"):
        Endpoint("localhost:8000", "m")


NULL = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}).encode()


@pytest.mark.parametrize("refusal", [400, 422, NULL])
def test_what_is_turned_down_counts_as_not_judged(refusal: Reply) -> None:
    with serving(lambda message, times: refusal) as server:
        verdict = judge(*QUESTION, Endpoint(server.url, "m").complete)
        assert len(server.requests) == 1
    assert (verdict.model, verdict.reference, verdict.failures) == (None, None, 1)
    assert "answered" in verdict.reply or "gave no answer" in verdict.reply
    assert KEY not in verdict.reply


def test_a_failure_keeps_what_ends_and_begins_no_more() -> None:
    def reply(message: str, times: int) -> Reply:
        time.sleep(0.3 if message == "5" else 0.1)
        return 401 if message == "5" else message

    with serving(reply) as server:
        endpoint, found = Endpoint(server.url, "m"), []
        with pytest.raises(UserError, match="answered 401"):
            for item, result in endpoint.each(lambda item: endpoint.complete("s", item), map(str, range(60))):
                assert item == result
                found.append(item)
        asked = len(server.requests)
        assert AT_ONCE < asked < 48 and len(found) == asked - 1  # all that was paid for but the failure
        time.sleep(0.3)
        assert len(server.requests) == asked
        with pytest.raises(UserError, match="is not asked any more"):
            endpoint.complete("s", "u")


def test_nobody_waits_for_the_rest() -> None:
    with serving(lambda message, times: f"{time.sleep(0.01 if message == '0' else 2)}") as server:
        endpoint = Endpoint(server.url, "m")
        results = endpoint.each(lambda item: endpoint.complete("s", item), map(str, range(60)))
        next(results)
        begin = time.monotonic()
        results.close()
        assert time.monotonic() - begin < 1
        time.sleep(2.5)
        assert len(server.requests) <= AT_ONCE + 1


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
    monkeypatch.setattr("vittle.endpoint.FIRST_WAIT", 0.001)
    release = threading.Event()
    with serving(lambda message, times: f"late {release.wait(5)}") as server:
        with pytest.raises(UserError, match="did not answer in time at try 2"):
            Endpoint(server.url, "m", timeout=0.1).complete("s", "u")
        release.set()
        gone = server.url
    with pytest.raises(UserError, match="cannot be reached after 2 tries"):
        Endpoint(gone, "m").complete("s", "u")
