"""`clipworks serve`: it answers, and ends on SIGTERM without losing what it has accepted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from tests.serve.client import Client

from clipworks.cli import app
from clipworks.cli.serve import read_token
from clipworks.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Callable[..., Any]) -> str:
    from clipworks.core.tokenizer import ClipTokenizer

    return str(tiny_clip(tokenizer=ClipTokenizer()).save(tmp_path_factory.mktemp("model") / "tiny"))


def test_it_answers_logs_lines_of_json_and_finishes_what_it_accepted_on_sigterm(model: str) -> None:
    command = [sys.executable, "-m", "clipworks", "serve", "--model", model, "--port", "0", "--json"]
    # Inputs wait for company so long that the signal comes while they do.
    command += ["--wait", "1500"]
    environment = {**os.environ, "CLIPWORKS_TOKEN": "sesame"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        while "}" not in said:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        ready = json.loads(said)
        port = int(re.findall(r":(\d+)$", ready["url"])[0])
        assert (ready["model"], ready["token"]) == (model, True)
        client = Client(port)
        assert client.get("/models").status == 401
        found: list[int] = []

        def ask() -> None:
            body = {"input": "a cat"}
            found.append(client.post("/v1/embeddings", body, authorization="Bearer sesame").status)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while (
            "clipworks_inputs_held 4.0"
            not in client.get("/metrics", authorization="Bearer sesame").body.decode()
        ):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        _, log = process.communicate(timeout=30)
    assert found == [200] * 4
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["status"] for line in lines if line.get("path") == "/v1/embeddings"] == [200] * 4
    assert "sesame" not in log


def test_a_token_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLIPWORKS_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("CLIPWORKS_TOKEN", " other ")
    assert read_token(None) == "other"
    (tmp_path / "token").write_text("sesame\n")
    assert read_token(tmp_path / "token") == "sesame"
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_token(tmp_path / "empty")
    with pytest.raises(DataError, match="no token there"):
        read_token(tmp_path / "missing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--index", "nowhere"], "no index there"),
        (["--model", "nothing/like-this.pt"], "nothing/like-this.pt"),
        (["--port", "70000"], "--port"),
        (["--host", "203.0.113.7", "--port", "0"], "203.0.113.7"),
        (["--max-megabytes", "0"], "body"),
    ],
)
def test_bad_input_is_one_line(model: str, arguments: list[str], said: str) -> None:
    given = arguments if "--model" in arguments or "--index" in arguments else [*arguments, "--model", model]
    done = CliRunner().invoke(app, ["serve", *given])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output
