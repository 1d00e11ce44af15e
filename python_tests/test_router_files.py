"""Routers beside models and adapters, interrupted saves, format versions, and repositories on a Hub."""

import copy
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from models import SMALL, patched_model, scramble, tiny
from safetensors.torch import load_file, save_file
from test_routers_hub import check_same, published

import flux_ext
from flux_ext import FluxConfig, FluxRouters, get_routers
from flux_ext.routers import files as router_files
from flux_ext.routers.files import CONFIG_FILE, WEIGHTS_FILE, check_output
from flux_ext.routers.modules import HeadRouter, LayerRouter

OURS = {CONFIG_FILE, WEIGHTS_FILE}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def small_routers(scale: float = 0.4) -> FluxRouters:
    routers = FluxRouters(FluxConfig(**SMALL, num_layers=4, head_dim=16, num_kv_heads=2, model_type="llama"))
    scramble(routers, scale)
    return routers


def same(a: FluxRouters, b: FluxRouters) -> bool:
    return a.config == b.config and all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def save_unversioned(routers: FluxRouters, folder: Path) -> None:
    """As routers were saved before they had file names of their own."""
    from dataclasses import asdict

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(routers.config)))
    save_file(routers.state_dict(), folder / "model.safetensors")


# --- Beside a model or an adapter


def test_a_patched_model_and_its_routers_share_a_folder(tmp_path: Path) -> None:
    model = patched_model()
    ids = torch.randint(2, 128, (2, 50))
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == OURS | {"config.json", "generation_config.json", "model.safetensors"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not flux_ext.is_patched(plain) and not any("flux" in name for name in plain.state_dict())
    assert same(FluxRouters.from_pretrained(tmp_path), get_routers(model))
    flux_ext.patch(plain, routers=tmp_path)
    assert torch.equal(plain.generate(ids, max_new_tokens=8, do_sample=False), want)
    flux_ext.unpatch(plain)
    assert "save_pretrained" not in vars(plain)


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_saving_routers_leaves_what_else_a_folder_holds(tmp_path: Path, what: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    if what == "adapter":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    routers = small_routers()
    check_output(tmp_path)
    for _ in range(2):  # the second time over their own files
        routers.save_pretrained(tmp_path)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= OURS | {"README.md"} and ("README.md" in after) == ("README.md" in before)
    assert same(FluxRouters.from_pretrained(tmp_path), routers)


def test_a_model_is_not_routers(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no flux_config.json: no routers are there; it holds a model \(LlamaForC"):
        FluxRouters.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="and a PEFT adapter"):
        FluxRouters.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [b"", b'{"layers": 3}', b"[]"])
def test_files_of_something_else_under_our_names(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for save in (check_output, small_routers().save_pretrained, patched_model().save_pretrained):
        with pytest.raises(ValueError, match=f"{name} was not written by flux_ext and would be replaced"):
            save(tmp_path)
    assert files(tmp_path) == {name: content}


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for save in (check_output, small_routers().save_pretrained, patched_model().save_pretrained):
            with pytest.raises(ValueError, match="is a file"):
                save(folder)
    assert (tmp_path / "file").read_text() == "text"


def test_what_a_training_would_replace(tmp_path: Path) -> None:
    check_output(tmp_path / "missing")
    check_output(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    small_routers().save_pretrained(tmp_path / "checkpoint-7")
    save_unversioned(small_routers(), tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "notes").write_text("")
    begun = tmp_path / "checkpoint-6"  # of a training that was killed while it saved
    begun.mkdir()
    for name in (".flux_routers.safetensors.1a2b3c4d.tmp", "rng_state_1.pth", "objective-1.safetensors"):
        (begun / name).write_bytes(b"")
    check_output(tmp_path)
    patched_model().save_pretrained(tmp_path / "checkpoint-8")
    with pytest.raises(ValueError, match=r"checkpoint-8 is no checkpoint of routers \(it holds a model"):
        check_output(tmp_path)
    other = tmp_path / "other"
    tiny().save_pretrained(other)
    check_output(other, also=["training_args.bin"])
    (other / "training_args.bin").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"training_args.bin would be replaced, and the folder holds a model"):
        check_output(other, also=["training_args.bin"])
    ours = tmp_path / "ours"
    small_routers().save_pretrained(ours)
    (ours / "training_args.bin").write_bytes(b"ours")
    check_output(ours, also=["training_args.bin"])


def test_only_the_main_process_saves_routers(tmp_path: Path) -> None:
    patched_model().save_pretrained(tmp_path, is_main_process=False)
    assert not OURS & set(files(tmp_path))


# --- Interrupted saves


def test_a_save_that_fails_keeps_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = small_routers(), small_routers(0.8)
    old.save_pretrained(tmp_path)
    before = files(tmp_path)

    def full_disk(tensors: Any, file: Path, metadata: Any = None) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(router_files, "save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_a_save_that_ends_between_two_files_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_routers().save_pretrained(tmp_path)
    new, replace, replaced = small_routers(0.8), os.replace, []

    def interrupted(source: Any, target: Any) -> None:
        if replaced:
            raise KeyboardInterrupt
        replaced.append(target)
        replace(source, target)

    with monkeypatch.context() as m:
        m.setattr(router_files.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    assert set(files(tmp_path)) == OURS | {"README.md"}
    with pytest.raises(ValueError, match="were not saved together"):
        FluxRouters.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert same(FluxRouters.from_pretrained(tmp_path), new)


@pytest.mark.parametrize("metadata", [None, "kept", "of the other"])
@pytest.mark.parametrize("config_file", ["kept", "without an id"])
def test_weights_that_were_replaced_are_found(tmp_path: Path, metadata: str | None, config_file: str) -> None:
    """The ids say which tensors were saved: they are compared with those that are there, not only with each other."""
    small_routers().save_pretrained(tmp_path)
    other = small_routers(0.8)
    other.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    ids = {"kept": config["weights_id"], "of the other": router_files.digest(other.state_dict())}
    new = None if metadata is None else {"format": "pt", "weights_id": ids[metadata]}
    save_file(other.state_dict(), tmp_path / WEIGHTS_FILE, metadata=new)
    if config_file == "without an id":
        del config["weights_id"]
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        if metadata is None:  # as saved before there were ids
            assert same(FluxRouters.from_pretrained(tmp_path), other)
            return
    model = tiny()
    with pytest.raises(ValueError, match="weights_id") as error:
        flux_ext.patch(model, routers=tmp_path)
    assert not flux_ext.is_patched(model)
    message = str(error.value)
    wrong = ids["kept"] if metadata == "kept" or config_file == "kept" else None
    assert str(tmp_path / WEIGHTS_FILE) in message and ids["of the other"] in message and repr(wrong) in message
    assert ("was changed after it was saved" in message) == (metadata == "kept")
    assert ("were not saved together" in message) == (metadata != "kept")


def test_the_digest_of_saved_weights_stays_what_it_is() -> None:
    """Saved routers carry it: with another digest they would all be refused."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(1)}
    assert router_files.digest(tensors) == "a59fa8362a006e21a64fc84155444485"
    assert router_files.digest({**tensors, "c": torch.zeros(1, 1)}) != router_files.digest(tensors)


def test_the_digest_of_earlier_versions_counts_too(tmp_path: Path) -> None:
    """It was of the file that safetensors made."""
    routers = small_routers()
    routers.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS_FILE), json.loads((tmp_path / CONFIG_FILE).read_text())
    earlier = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()[:32]
    assert earlier != config["weights_id"]
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt", "weights_id": earlier})
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "weights_id": earlier}))
    assert same(FluxRouters.from_pretrained(tmp_path), routers)
    changed = {name: x + 1 for name, x in tensors.items()}
    save_file(changed, tmp_path / WEIGHTS_FILE, metadata={"format": "pt", "weights_id": earlier})
    with pytest.raises(ValueError, match="was changed after it was saved"):
        FluxRouters.from_pretrained(tmp_path)


def test_replaced_layers_cannot_be_saved(tmp_path: Path) -> None:
    routers = small_routers()
    wrapped = copy.deepcopy(routers)
    wrapped.layers[1].encoder[0] = torch.nn.Sequential(wrapped.layers[1].encoder[0])
    with pytest.raises(ValueError, match=r"were replaced \(layers.1.encoder.0.0.bias for one\)"):
        wrapped.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="not in memory"):
        routers.to("meta").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Versions and fields


def test_routers_without_a_version_still_load(tmp_path: Path) -> None:
    routers = small_routers()
    save_unversioned(routers, tmp_path)
    assert same(FluxRouters.from_pretrained(tmp_path), routers)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["route_on"]  # a field that came later has its default
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(FluxRouters.from_pretrained(tmp_path), routers)
    newer = small_routers(0.8)
    newer.save_pretrained(tmp_path)
    assert same(FluxRouters.from_pretrained(tmp_path), newer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 3, "flux_ext_version": "3.1"}, "format_version 3, above 2: use flux_ext 3.1 or newer"),
        ({"shape": "round", "flux_ext_version": "3.1"}, r"unknown fields \(shape\): use flux_ext 3.1 or newer"),
        ({"format_version": "1"}, "format_version must be an integer, got '1'"),
        ({"window": "16"}, "window must be an integer, got '16'"),
        ({"window": float("nan")}, "window must be an integer, got nan"),
        ({"sink": [4]}, r"sink must be an integer, got \[4\]"),
        ({"pool_size": True}, "pool_size must be an integer, got True"),
        ({"head_dim": "16"}, "head_dim must be an integer, got '16'"),
        ({"head_dim": None}, "head_dim must be given"),
        ({"num_kv_heads": 2.0}, "num_kv_heads must be an integer, got 2.0"),
        ({"model_type": 3}, "model_type must be a string or None, got 3"),
        ({"layers_to_route": "0123"}, "layers_to_route must be a list of integers or None, got '0123'"),
        ({"layers_to_route": [0.0, 1.0]}, "layers_to_route must be a list of integers"),
        ({"layers_to_route": 3}, "layers_to_route must be a list of integers"),
        ({"granularity": ["layer"]}, "granularity must be one of"),
        (None, "must hold a JSON object, got list"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any] | None, message: str) -> None:
    small_routers().save_pretrained(tmp_path)
    file = tmp_path / CONFIG_FILE
    file.write_text(json.dumps([] if changes is None else {**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as error:
        FluxRouters.from_pretrained(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sink_size": "128"}, "sink_size must be an integer, got '128'"),
        ({"local_window_size": float("nan")}, "local_window_size must be an integer, got nan"),
        ({"pool_size": [100]}, r"pool_size must be an integer, got \[100\]"),
        ({"triangle_n_last": 64.0}, "triangle_n_last must be an integer, got 64.0"),
        ({"num_key_value_heads": "2"}, "num_kv_heads must be an integer, got '2'"),
        ({"num_hidden_layers": 1}, "layers_to_route has layer 1, the model 1 layers"),
        ({"pool_size": 0}, "pool_size must be >= 1, got 0"),
    ],
    ids=str,
)
def test_published_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_file(published(LayerRouter, 2, 16), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["PawLlamaForCausalLM"], **changes}))
    with pytest.raises(ValueError, match=message) as error:
        FluxRouters.from_pretrained(tmp_path)
    assert "config.json" in str(error.value)


# --- On a Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub whose repository "a/b" is a folder; ``hub.asked`` are the names of files that were served."""

    hub = SimpleNamespace(folder=tmp_path / "repository", asked=[], options={}, offline=False)
    hub.folder.mkdir()

    def download(repo_id: str, filename: str, *, subfolder: str | None = None, **options: Any) -> str:
        assert repo_id == "a/b"
        hub.options = options
        file = hub.folder / (subfolder or "") / filename
        if file.is_file():
            hub.asked.append(filename)
            return str(file)
        if hub.offline:
            raise LocalEntryNotFoundError("not cached, and the Hub cannot be reached")
        raise EntryNotFoundError(f"404: {filename}")

    assert router_files.hf_hub_download is hf_hub_download
    monkeypatch.setattr(router_files, "hf_hub_download", download)
    return hub


OPTIONS = {
    "revision": "v2",
    "cache_dir": "somewhere",
    "token": "secret",
    "local_files_only": True,
    "force_download": True,
}


@pytest.mark.parametrize("subfolder", [None, "routers"])
@pytest.mark.parametrize("form", ["own", "beside a model", "unversioned"])
def test_routers_on_a_hub(hub: Any, form: str, subfolder: str | None) -> None:
    routers = small_routers()
    folder = hub.folder / (subfolder or "")
    if form == "beside a model":
        tiny().save_pretrained(folder)
    if form == "unversioned":
        save_unversioned(routers, folder)
    else:
        routers.save_pretrained(folder)
    assert same(FluxRouters.from_pretrained("a/b", subfolder=subfolder, **OPTIONS), routers)
    assert hub.options == OPTIONS
    assert hub.asked == (["config.json", "model.safetensors"] if form == "unversioned" else [CONFIG_FILE, WEIGHTS_FILE])
    if subfolder is None:
        patched = get_routers(flux_ext.patch(tiny(), routers="a/b"))
        assert all(map(torch.equal, patched.parameters(), routers.parameters()))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("subfolder", [None, "checkpoint"])
@pytest.mark.parametrize("kind", [LayerRouter, HeadRouter])
def test_a_published_checkpoint_on_a_hub(hub: Any, sharded: bool, subfolder: str | None, kind: type) -> None:
    tensors = published(kind, 3, 16)
    folder = hub.folder / (subfolder or "")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["PawLlamaForCausalLM"]}))
    wanted = ["config.json", "config.json", "model.safetensors"]
    if sharded:
        shard = {key: f"model-{2 * ('cls_' in key) + ('layers.2' in key)}.safetensors" for key in tensors}
        for name in set(shard.values()):
            save_file({key: value for key, value in tensors.items() if shard[key] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))
        # Four shards, of which two hold routers.
        wanted[2:] = ["model.safetensors.index.json", "model-2.safetensors", "model-3.safetensors"]
    else:
        save_file(tensors, folder / "model.safetensors")
    routers = FluxRouters.from_pretrained("a/b", subfolder=subfolder, **OPTIONS)
    check_same(routers, tensors)
    assert hub.asked == wanted and hub.options == OPTIONS
    check_same(FluxRouters.load_published("a/b", subfolder=subfolder), tensors)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../secret"}}], ids=str
)
def test_an_index_that_makes_no_sense(hub: Any, index: Any) -> None:
    (hub.folder / "config.json").write_text(json.dumps({"toggle_type": "streaming"}))
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must have a weight_map"):
        FluxRouters.from_pretrained("a/b")


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_without_routers(hub: Any, offline: bool) -> None:
    hub.offline = offline
    with pytest.raises(ValueError, match="a/b has no flux_config.json") as error:
        FluxRouters.from_pretrained("a/b")
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError) == offline
    (hub.folder / "config.json").write_text(json.dumps({"architectures": ["PawLlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="a/b has no model.safetensors"):
        FluxRouters.from_pretrained("a/b")


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("held", [set(), {"config.json", "model.safetensors", "README.md"}])
def test_pushing_leaves_what_a_repository_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: set[str], through: str
) -> None:
    import flux_ext.routers.collection as module

    pushed: dict[str, Any] = {}

    class FakeApi:
        def __init__(self, token: Any = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def file_exists(self, repo_id: str, name: str, revision: Any = None) -> bool:
            assert repo_id == "me/model"
            return name in held

        def upload_folder(self, folder_path: Path, **kwargs: Any) -> str:
            pushed.update(kwargs, files=set(files(Path(folder_path))))
            return "commit"

    monkeypatch.setattr(module, "HfApi", FakeApi)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    if through == "push_to_hub":
        assert small_routers().push_to_hub("model", ignore_patterns="*.txt") == "commit"
    else:
        where = tmp_path / "model"
        assert small_routers().save_pretrained(where, push_to_hub=True, ignore_patterns=["*.txt"]) == "commit"
    assert pushed["repo_id"] == "me/model" and pushed["files"] == OURS | {"README.md"}
    if held:
        assert pushed["ignore_patterns"] == ["*.txt", "README.md"]
    else:
        assert pushed["ignore_patterns"] in ("*.txt", ["*.txt"])


def test_a_patched_model_is_pushed_with_its_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = patched_model(), []
    monkeypatch.setattr(model, "push_to_hub", lambda *args, **kwargs: calls.append((args, kwargs)))
    model.save_pretrained(tmp_path / "name", push_to_hub=True, private=True, token="secret")
    assert calls == [(("name",), {"token": "secret", "private": True})]
    assert set(files(tmp_path / "name")) >= OURS | {"model.safetensors"}


@pytest.mark.parametrize("name", ["me/a-model", "/data/a-model", None])
def test_the_card_says_what_the_routers_are_for(tmp_path: Path, name: str | None) -> None:
    routers = small_routers()
    routers.config.base_model_name_or_path = name
    routers.save_pretrained(tmp_path, model_card_kwargs={"training": "On *everything*."})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == (name if name == "me/a-model" else None)  # the Hub refuses paths
    assert card.data.library_name == "flux-ext" and "sparse-attention" in card.data.tags
    assert f"# Routers of {name or 'MODEL'}\n" in card.text and card.text.rstrip().endswith("\nOn *everything*.")
    assert f"({sum(p.numel() for p in routers.parameters()):,} parameters)" in card.text
    assert "More Information Needed" not in card.text and "Hub using the" not in card.text
    for field in ("granularity", "pattern", "sink", "window"):
        assert f"| `{field}` | {getattr(routers.config, field)} |" in card.text
    assert "None" not in card.text
    untold = small_routers().generate_model_card()
    assert "Nothing is recorded about how these routers were trained." in untold.text
