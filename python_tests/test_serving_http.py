"""A server as a user starts it, ``vllm serve`` with one environment variable, and the stock OpenAI client.

Runs where vLLM is installed, as ``test_serving_vllm.py`` does.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/run tests serving in an environment of its own")

from openai import APIStatusError, OpenAI
from serving_engine import Oracle, make_model, make_routers, prompt

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve_vllm.py"
STARTS_WITHIN = 240  # seconds, on a machine with other work


class Server:
    """A server in processes of its own."""

    def __init__(self, model, routers, log):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        place = ["--host=127.0.0.1", f"--port={self.port}", "--served-model-name=tiny"]
        self.arguments = ["--dtype=float32", "--max-model-len=512", "--block-size=32", "--max-num-batched-tokens=2048"]
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.environment = {**os.environ, **own}
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *place, *self.arguments],
            env={**self.environment, "FLUX_EXT_ROUTERS": str(routers)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its group is ours to end, with the engine's process in it
        )

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()

    def wait(self):
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                self.get("/health")
                return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-3000:])

    def number(self, name):
        """A sum over one of vLLM's metrics."""
        return sum(float(x) for x in re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.MULTILINE))

    def settle(self):
        """Waits until no request runs and no page is in use."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.number("num_requests_running") == 0 and self.number("kv_cache_usage_perc") == 0:
                return
            time.sleep(0.2)
        raise TimeoutError(self.get("/metrics"))

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model")), make_routers(tmp_path_factory.mktemp("routers"))


def ask(client, x, tokens):
    body = {"return_token_ids": True}
    return client.completions.create(model="tiny", prompt=x, max_tokens=tokens, temperature=0, extra_body=body)


def test_a_server_answers_side_by_side_is_broken_off_and_killed_and_the_example_starts_another(folders, tmp_path):
    model, routers = folders
    server = Server(model, routers, tmp_path / "first.log")
    try:
        client = server.wait()
        prompts = [prompt(80 + i, n) for i, n in enumerate((150, 250, 40, 90, 199, 64))]
        with ThreadPoolExecutor(len(prompts)) as pool:
            choices = list(pool.map(lambda x: ask(client, x, 16).choices[0], prompts))
        answers, texts = [choice.token_ids for choice in choices], [choice.text for choice in choices]
        oracle = Oracle(model, routers)
        routes = set()
        for x, tokens in zip(prompts, answers, strict=True):
            oracle.prompt_len, oracle.dense_until = len(x), 0
            with torch.no_grad():
                logits = oracle.model(torch.tensor([x + tokens])).logits[0, len(x) - 1 : -1]
            assert logits.argmax(-1).tolist() == tokens
            routes.add(tuple(oracle.routes.values()))
        assert len(routes) > 1 and sum(map(len, answers)) > 60
        server.settle()

        stream = client.completions.create(
            model="tiny", prompt=prompts[1], max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()  # the client goes away
        server.settle()

        with pytest.raises(APIStatusError, match="512"):
            ask(client, prompt(0, 600), 1)
    finally:
        server.kill()
    example = [
        sys.executable,
        str(EXAMPLE),
        str(model),
        str(routers),
        *(" ".join(f"t{i}" for i in x) for x in prompts[:2]),
    ]
    options = [f"--option={option}" for option in server.arguments]
    done = subprocess.run(
        [*example, "--max-tokens", "16", "--port", str(server.port), *options],
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = [line.split(" -> ")[1] for line in done.stdout.splitlines() if " -> " in line]
    assert said == [repr(text) for text in texts[:2]]


def test_a_server_with_bad_routers_does_not_start(folders, tmp_path):
    server = Server(folders[0], folders[0], tmp_path / "log")
    try:
        assert server.process.wait(STARTS_WITHIN) != 0
    finally:
        server.kill()
    assert "has no flux_config.json: no routers are there; it holds" in server.log.read_text()
