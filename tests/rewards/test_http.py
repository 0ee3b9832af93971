"""The reward server: a real process that scores, one that misbehaves, and one that is gone."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.errors import UserError
from harness.prompts import Prompt
from harness.randomness import Randomness
from harness.reward_sources import find_reward

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).parents[2] / "docs" / "reward-server.md"
PROMPTS = [Prompt("1", "a fox", {"object": "fox"}), Prompt("2", "ein Käuzchen"), Prompt("3", "", {"count": 2})]
MISBEHAVING = '''
"""Behaves as the path says; GET /seen gives the bodies of the requests so far, by path."""
import json, sys, time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SEEN = defaultdict(list)
GOOD = lambda asked: {"scores": [float(len(png)) for png in asked["images"]]}
ANSWERS = {
    "/good": lambda asked: (200, GOOD(asked)),
    "/flaky": lambda asked: (503, "busy") if len(SEEN["/flaky"]) < 3 else (200, GOOD(asked)),
    "/broken": lambda asked: (500, "out of memory"),
    "/forbidden": lambda asked: (403, "wrong key"),
    "/moved": lambda asked: (307, ""),
    "/null": lambda asked: (200, {"scores": [1, None, float("nan")]}),
    "/short": lambda asked: (200, {"scores": [1.0]}),
    "/words": lambda asked: (200, {"scores": ["good", "bad", "good"]}),
    "/true": lambda asked: (200, {"scores": [True, False, True]}),
    "/infinite": lambda asked: (200, {"scores": [1, float("inf"), 2]}),
    "/large": lambda asked: (200, {"scores": [1, 10**400, 2]}),
    "/double": lambda asked: (200, {"scores": [1, 1e300, 2]}),
    "/list": lambda asked: (200, [1, 2, 3]),
    "/html": lambda asked: (200, "<html>Welcome</html>"),
}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, content):
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, SEEN)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN[self.path].append(asked)
        if self.path == "/silent":
            time.sleep(3)
        elif self.path == "/hangup":
            self.connection.close()
        else:
            self.answer(*ANSWERS[self.path](asked))


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
'''


@contextmanager
def served(script: Path) -> Iterator[str]:
    """The script as a process of its own; its address, once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(script), str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended by itself"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the misbehaving server."""
    script = tmp_path_factory.mktemp("server") / "misbehaving.py"
    script.write_text(MISBEHAVING)
    with served(script) as address:
        yield address


@pytest.fixture
def images() -> Tensor:
    """Three pictures of 12x10 with values outside [0, 1]."""
    return 0.5 + 0.4 * Randomness(0).normal((3, 3, 12, 10), "pictures")


def score(url: str, images: Tensor, **settings: Any) -> Tensor:
    """Scores by the server at an address; failures are fast unless said otherwise."""
    given = ",".join(f"{key}={value}" for key, value in {"retries": 0, "timeout": 20, **settings}.items())
    return find_reward(f"http[url={url},{given}]", {}).build(CPU)(images, PROMPTS)


def seen(server: str, path: str) -> list[dict[str, list[Any]]]:
    """What was sent to a path so far."""
    with urllib.request.urlopen(f"{server}/seen") as answer:
        return json.load(answer).get(path, [])


def test_the_documents_server_scores(tmp_path: Path, images: Tensor) -> None:
    """The example of the document as it stands there: the brightness of the clamped 8-bit picture."""
    match = re.search(r"```python\n# reward_server\.py\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    (tmp_path / "reward_server.py").write_text(match[1], encoding="utf-8")
    with served(tmp_path / "reward_server.py") as url:
        scores = score(url, images)
        assert torch.equal(score(url, images, batch=2), scores)
    expected = ((images.clamp(0, 1) * 255).round() / 255).mean((1, 2, 3))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)
    with pytest.raises(UserError, match=r"no answer in 1 attempts of at most 20 s \(.*refused.*; is it running\?"):
        score(url, images)  # it is gone now


def test_what_is_sent(server: str, images: Tensor) -> None:
    """PNG in base64, texts and labels; pictures that are not finite are not sent; requests hold at most a batch."""
    images[1, 0, 0, 0] = float("nan")
    before = len(seen(server, "/good"))
    scores = score(f"{server}/good", images.requires_grad_(), batch=1)
    sent = seen(server, "/good")[before:]
    assert [request["prompts"] for request in sent] == [["a fox"], [""]]
    assert [request["metadata"] for request in sent] == [[{"object": "fox"}], [{"count": 2}]]
    assert all(request["images"][0].startswith("iVBORw0KGgo") for request in sent)
    assert scores.isfinite().tolist() == [True, False, True]
    assert scores[2] == len(sent[1]["images"][0])
    assert not scores.requires_grad
    assert score(f"{server}/good", torch.full_like(images, float("nan"))).isnan().all()
    assert len(seen(server, "/good")) == before + 2


def test_a_server_that_recovers_is_asked_again(server: str, images: Tensor) -> None:
    """Two answers of 503, then scores: three requests, the same each time."""
    assert score(f"{server}/flaky", images, retries=2).isfinite().all()
    sent = seen(server, "/flaky")
    assert len(sent) == 3
    assert sent[0] == sent[1] == sent[2]


def test_null_is_not_a_number(server: str, images: Tensor) -> None:
    """Null, or the NaN that Python's json writes."""
    assert score(f"{server}/null", images).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("path", "retries", "attempts", "message"),
    [
        ("/broken", 1, 2, "answered 500 in 2 attempts: out of memory"),
        ("/forbidden", 2, 1, "answered 403: wrong key"),
        ("/moved", 2, 1, "answered 307: "),
        ("/hangup", 1, 2, "gave no answer in 2 attempts"),
        ("/short", 1, 1, r"answered 1 scores for 3 pictures; expected \{.scores.: "),
        ("/words", 1, 1, "answered the score 'good', neither a number nor null"),
        ("/true", 1, 1, "answered the score True, neither"),
        ("/infinite", 1, 1, "answered the score inf, neither"),
        ("/large", 1, 1, "answered the score 1000.*, neither"),
        ("/double", 1, 1, r"answered the score 1e\+300, neither"),
        ("/list", 1, 1, "answered no object with a list of scores"),
        ("/html", 1, 1, "answered no JSON .* found: <html>Welcome"),
    ],
)
def test_servers_that_fail_are_explained(
    server: str, images: Tensor, path: str, retries: int, attempts: int, message: str
) -> None:
    """What was answered; only failures of the server and of the connection are tried again."""
    with pytest.raises(UserError, match=rf"the reward server {server}{path} {message}"):
        score(f"{server}{path}", images, retries=retries)
    assert len(seen(server, path)) == attempts


def test_a_server_that_is_silent_is_given_up(server: str, images: Tensor) -> None:
    """After the time-out of each attempt, long before it would have answered."""
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in 2 attempts of at most 0.2 s \(.*timed out"):
        score(f"{server}/silent", images, timeout=0.2, retries=1)
    assert time.monotonic() - begin < 2.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [("", "url"), ("[url=localhost:8000]", "write the whole address"), ("[url=http://a,timeout=0]", "timeout")],
)
def test_settings_are_checked_when_it_is_named(settings: str, message: str) -> None:
    """Before anything is spent; without an address there is no such reward."""
    with pytest.raises(UserError, match=message):
        find_reward(f"http{settings}", {})
