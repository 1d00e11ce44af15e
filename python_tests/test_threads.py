"""Threads that share one patched model, each with routes of its own, or with routes that hold in all."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import patched_model
from torch import Tensor
from transformers import TextIteratorStreamer

import flux_ext
from flux_ext.models.patching import last_routing

IDS = torch.arange(2, 42)[None]


def in_thread(work: Callable[[], Any]) -> Any:
    """What the work gives, or raises, in a thread of its own."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def routed(model: Any) -> list[int]:
    """The layers' routes of a forward in this thread."""
    with torch.no_grad():
        model(IDS)
    return last_routing(model).routes[0, :, 0].tolist()


FULL, SPARSE, MIXED, OWN = [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]


def own_routers() -> Any:
    """A model whose routers choose ``OWN``, which no block of these tests forces."""
    model = patched_model()
    for place, router in enumerate(flux_ext.get_routers(model).layers):
        with torch.no_grad():
            router.classifier[-1].bias.copy_(torch.tensor([0.0, 50.0] if place == 3 else [50.0, 0.0]))
    return model


def test_threads_share_one_model() -> None:
    model = patched_model()
    prompts = [torch.randint(2, 128, (1, 20 + 9 * i)) for i in range(4)]
    routes = ["full", "sparse", torch.tensor(MIXED), None]

    def generate(i: int) -> Tensor:
        kwargs: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
        if routes[i] is None:
            return model.generate(prompts[i], **kwargs)
        with flux_ext.routes(model, routes[i]):
            return model.generate(prompts[i], **kwargs)

    want = [generate(i) for i in range(4)]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            wrong.extend(i for _ in range(3) if not torch.equal(generate(i), want[i]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


class Numbers:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, tokens: Any, **kwargs: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)


def test_a_streamer_generates_under_routes_that_are_forced_everywhere() -> None:
    model = own_routers()
    prompt = torch.randint(2, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    kwargs: dict[str, Any] = {"input_ids": prompt, "max_new_tokens": 12, "do_sample": False}
    with flux_ext.routes(model, "sparse"):
        want = model.generate(**kwargs)[0].tolist()
    assert want != model.generate(**kwargs)[0].tolist()  # the routes are seen in the text
    streamer = TextIteratorStreamer(Numbers(), timeout=60)  # type: ignore[arg-type]
    with flux_ext.routes(model, "sparse", everywhere=True):
        threading.Thread(target=model.generate, kwargs={**kwargs, "streamer": streamer}).start()
        text = "".join(streamer)
    assert text == Numbers().decode(want)


def test_routes_forced_everywhere_leave_a_thread_its_own() -> None:
    model = own_routers()

    def own() -> list[int]:
        with flux_ext.routes(model, torch.tensor(MIXED)):
            return routed(model)

    with flux_ext.routes(model, "sparse", everywhere=True):
        assert routed(model) == in_thread(lambda: routed(model)) == SPARSE
        assert in_thread(own) == MIXED
        with flux_ext.routes(model, "full"):
            assert (routed(model), in_thread(lambda: routed(model))) == (FULL, SPARSE)
    assert routed(model) == in_thread(lambda: routed(model)) == OWN


def test_of_blocks_for_all_threads_the_newest_counts_until_it_is_left() -> None:
    model = own_routers()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with flux_ext.routes(model, torch.tensor(MIXED), everywhere=True):
            entered.set()
            leave.wait(60)

    with pytest.raises(KeyError), flux_ext.routes(model, "sparse", everywhere=True):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
        assert (routed(model), in_thread(lambda: routed(model))) == (SPARSE, MIXED)
        leave.set()
        thread.join()
        assert in_thread(lambda: routed(model)) == SPARSE
        raise KeyError  # an error leaves the block too
    assert in_thread(lambda: routed(model)) == OWN


def test_compiled_models_are_forced_everywhere_too() -> None:
    model = own_routers()
    compiled = torch.compile(model, backend="eager")

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(IDS, use_cache=False).logits

    own = logits(model)
    with flux_ext.routes(model, "full"):
        full = logits(model)
    assert not torch.allclose(own, full)
    torch.testing.assert_close(in_thread(lambda: logits(compiled)), own)
    with flux_ext.routes(model, "full", everywhere=True):
        torch.testing.assert_close(in_thread(lambda: logits(compiled)), full)
    torch.testing.assert_close(in_thread(lambda: logits(compiled)), own)


def test_copies_are_not_forced() -> None:
    model = own_routers()
    with flux_ext.routes(model, "sparse", everywhere=True):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert [in_thread(lambda c=c: routed(c)) for c in copies] == [OWN, OWN]


def test_routes_that_another_thread_has_forced_are_said_to_hold_there_only() -> None:
    model = own_routers()
    message = "in another thread.*everywhere=True"
    with flux_ext.routes(model, "sparse"), pytest.warns(UserWarning, match=message) as caught:
        assert in_thread(lambda: routed(model)) == in_thread(lambda: routed(model)) == OWN
    assert len(caught) == 1


def test_no_warning_where_nothing_is_misunderstood() -> None:
    model = own_routers()

    def own() -> list[int]:
        with flux_ext.routes(model, "full"):
            return routed(model)

    with torch.no_grad():
        begun = model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert in_thread(lambda: routed(model)) == OWN  # no block is open
        with flux_ext.routes(model, "sparse"):
            assert in_thread(own) == FULL  # it has a block of its own
            in_thread(lambda: model(IDS[:, -1:], past_key_values=begun.past_key_values))  # routed before
            with flux_ext.routes(model, "full", everywhere=True):
                assert in_thread(lambda: routed(model)) == FULL
        assert routed(own_routers()) == OWN  # another model's block
