"""The picture of the chat page: taken of a server that runs, small, and never of an error."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from docs import screenshot
from tests.support.chat_page import find_chromium
from tests.support.fake_chat_server import FakeChatServer, Reply, error_reply


@pytest.fixture(autouse=True)
def needs_chromium() -> None:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
    if find_chromium() is None:
        pytest.skip("no chromium here: apt-get install chromium")


def take(server: FakeChatServer, output: Path, *questions: str) -> Result:
    named = [part for question in questions for part in ("--question", question)]
    return CliRunner().invoke(screenshot.main, [server.url, *named, "--output", str(output)])


def test_picture_is_taken_after_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "chat.png"
    with FakeChatServer() as server:
        server.replies += [Reply(["Paris"]), Reply(["Rome"])]
        result = take(server, path, "Capital of France?", "Capital of Italy?")
        asked = [body["messages"] for body in server.bodies]
    assert result.exit_code == 0, result.output
    assert [[message["content"] for message in messages] for messages in asked] == [
        ["Capital of France?"],
        ["Capital of Italy?"],
    ]
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) <= screenshot.MAX_BYTES


@pytest.mark.slow
def test_error_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "chat.png"
    with FakeChatServer() as server:
        server.replies.append(error_reply(503, "The server is stopping."))
        result = take(server, path, "Hi")
    assert result.exit_code == 1 and "The server is stopping." in result.output
    assert not path.exists()
