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
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/run tests serving in an environment of its own")

import httpx
from openai import APIConnectionError, APIStatusError, OpenAI
from serving_engine import LAYERS, PAGE, Oracle, make_model, make_routers, prompt

LONGEST = 512  # tokens of a request; the pool of pages holds one such, everything full
OPTIONS = [
    "--dtype=float32",
    f"--max-model-len={LONGEST}",
    f"--block-size={PAGE}",
    f"--num-gpu-blocks-override={LAYERS * LONGEST // PAGE + 1}",  # and the page that is no request's
    "--max-num-batched-tokens=2048",
]
ENVIRONMENT = {  # as it was when pytest started: engines in this process change theirs
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads bound to cores wait for whatever else runs there
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
EXAMPLE = Path(__file__).parent.parent / "examples" / "serve_vllm.py"
STARTS_WITHIN = 240  # seconds, on a machine with other work


class Server:
    """A server in processes of its own."""

    def __init__(self, model, routers, folder):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.log = folder / "log"
        command = [Path(sys.executable).with_name("vllm"), "serve", str(model), "--served-model-name=tiny"]
        self.process = subprocess.Popen(
            [*command, "--host=127.0.0.1", f"--port={self.port}", *OPTIONS],
            env={**ENVIRONMENT, "FLUX_EXT_ROUTERS": str(routers)},
            cwd=folder,
            stdout=self.log.open("w"),
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


def stream(client, x):
    """As long an answer as there is room for."""
    more = {"ignore_eos": True}
    return client.completions.create(
        model="tiny", prompt=x, max_tokens=LONGEST - len(x), temperature=0, stream=True, extra_body=more
    )


def ask_until_broken_off(client, x, answered):
    """One answer after another, so that one is under way whenever the server is killed; then what the client raised."""
    try:
        while True:
            for _ in stream(client, x):
                answered.set()
    except Exception as error:
        return error


def test_a_server_answers_side_by_side_is_broken_off_and_killed_and_the_example_starts_another(folders, tmp_path):
    model, routers = folders
    server = Server(model, routers, tmp_path)
    try:
        client = server.wait()
        assert f"Serving with the routers in {routers}." in server.log.read_text()
        prompts = [prompt(80 + i, n) for i, n in enumerate((150, 250, 40, 90, 199, 64))]
        with ThreadPoolExecutor(len(prompts)) as pool:  # more than the pool holds: some wait or are computed anew
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

        broken_off = stream(client, prompts[1])
        next(iter(broken_off))
        broken_off.close()  # the client goes away
        server.settle()

        with pytest.raises(APIStatusError, match=str(LONGEST)):
            ask(client, prompt(0, LONGEST + 100), 1)  # longer than all pages hold
        as_long_as_all_pages = prompt(0, LONGEST - 8)
        assert ask(client, as_long_as_all_pages, 8).usage.prompt_tokens == LONGEST - 8

        answered = threading.Event()
        with ThreadPoolExecutor(4) as pool:  # the pool of pages holds one answer: at any time one is under way
            errors = [pool.submit(ask_until_broken_off, client, prompt(i, 8), answered) for i in range(4)]
            answered.wait(STARTS_WITHIN)
            server.kill()
        assert answered.is_set()
        assert all(isinstance(error.result(), (APIConnectionError, httpx.HTTPError)) for error in errors)
    finally:
        server.kill()

    texts_of = [" ".join(f"t{i}" for i in x) for x in prompts[:2]]
    command = [sys.executable, str(EXAMPLE), str(model), str(routers), *texts_of, "--max-tokens", "16"]
    done = subprocess.run(
        [*command, "--port", str(server.port), *(f"--option={option}" for option in OPTIONS)],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=STARTS_WITHIN + 60,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = [line.split(" -> ")[1] for line in done.stdout.splitlines() if " -> " in line]
    assert said == [repr(text) for text in texts[:2]]


def test_a_server_with_bad_routers_does_not_start(folders, tmp_path):
    server = Server(folders[0], folders[0], tmp_path)
    try:
        assert server.process.wait(STARTS_WITHIN) != 0
    finally:
        server.kill()
    assert "has no flux_config.json: no routers are there; it holds" in server.log.read_text()
