"""What the documents say can be run is run; what they point to is there."""

import ast
import functools
import importlib
import inspect
import re
import shlex
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
IN_ORDER = [ROOT / "docs" / "quickstart.md"]
"""Pages whose examples build on each other."""
EXAMPLES = [
    (path.name, i, code)
    for path in DOCUMENTS
    if path not in IN_ORDER
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("name", "index", "code"), EXAMPLES, ids=[f"{n}-{i}" for n, i, _ in EXAMPLES])
def test_python_examples_run(name, index, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{name}, example {index}", "exec"), {})


@pytest.mark.parametrize("page", IN_ORDER, ids=lambda p: p.name)
def test_examples_that_build_on_each_other_run(page, tmp_path, monkeypatch, capsys):
    """Python and commands, in order; the lines of a block of text are printed by the code before it."""
    from flux_ext.cli import commands

    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "sh", "text"}
    for i, (language, block) in enumerate(blocks):
        if language == "python":
            exec(compile(block, f"{page.name}, block {i}", "exec"), names)
        elif language == "sh":
            for line in block.splitlines():
                command, *arguments = shlex.split(line)
                assert (command, commands.main(arguments)) == ("flux-ext", 0), line
        else:
            lines = iter(printed.splitlines())  # which are searched on from where the last one was found
            assert [line for line in block.splitlines() if line not in lines] == []
            continue
        printed = capsys.readouterr().out


def test_the_readme_has_an_example():
    assert any(name == "README.md" for name, _, _ in EXAMPLES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_that_are_shown_exist(path, capsys):
    """Each with its options."""
    from flux_ext.cli import commands

    shown = re.findall(r"^(?:    )?flux-ext ([a-z][\w-]*)(.*?)(?:#|$)", path.read_text(), re.MULTILINE)
    for command in sorted({command for command, _ in shown}):
        with pytest.raises(SystemExit) as stop:
            commands.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", " ".join(options for name, options in shown if name == command)):
            assert option in text, f"flux-ext {command} has no {option}"


@functools.cache
def sources() -> str:
    """What raises messages, as one text in which string literals that follow each other are joined."""
    roots = [*(ROOT / "flux_ext").rglob("*.py"), *(ROOT / "csrc").rglob("*.[hc]*")]
    roots += [ROOT / "setup.py", *(ROOT / "cmake").iterdir(), *(ROOT / "third_party").rglob("*.cmake")]
    text = "\n".join(path.read_text() for path in sorted(roots))
    return re.sub(r"""(["'])\s+f?["']""", "", text)


TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = [m for m in re.findall(r"(?<=\*\*`)[^`\n]+(?=`)", TROUBLE) if not re.fullmatch(r"\w+=\w+", m)]  # no options


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_that_are_explained_are_raised(message):
    """Every message quoted in docs/troubleshooting.md is in the sources, `...` standing for names and values."""
    parts = [re.escape(part.strip()) for part in message.split("...")]
    assert re.search(".{0,120}?".join(parts), sources(), re.DOTALL)


def test_there_are_messages():
    assert len(MESSAGES) > 50


# The others say what was there when they were written.
PRESENT = [p for p in DOCUMENTS if p.name != "kernels_diary.md" and p.parent.name != "decisions"]


@pytest.mark.parametrize("path", PRESENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_are_there(path):
    """By their path, or by the end of it."""
    folders = ("benchmarks", "cmake", "cpp_tests", "csrc", "examples", "flux_ext", "python_tests", "tools")
    files = [*ROOT.glob("*.*"), *(path for name in folders for path in (ROOT / name).rglob("*.*"))]
    names = [path.relative_to(ROOT).parts for path in files]
    ends = {"/".join(parts[i:]) for parts in names for i in range(len(parts))}
    for name in re.findall(r"`([\w./]+\.(?:py|h|cpp|cu|toml|txt|sh))`", path.read_text()):
        assert name in ends, name


@pytest.mark.parametrize("page", ["kernels.md", "schedule.md", "patterns.md"])
def test_names_of_the_core_and_the_kernels_are_there(page):
    """What stands in backticks and is no plain word."""
    text = sources()
    names = re.findall(r"`(k[A-Z]\w*|\w+_\w+|[A-Z]\w+[a-z][A-Z]\w+)`", (ROOT / "docs" / page).read_text())
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


PUBLIC = [
    "flux_ext",
    "flux_ext.training",
    "flux_ext.evaluation",
    "flux_ext.evaluation.runner",
    "flux_ext.models",
    "flux_ext.routers",
    "flux_ext.examples",
    "flux_ext.operators",
]


def public_things():
    """Public names, and the public methods that our classes do not have from transformers or torch."""
    for module in map(importlib.import_module, PUBLIC):
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__ and n[0] != "_"]
        for name in getattr(module, "__all__", own):
            thing = getattr(module, name)
            if not inspect.isclass(thing) and not inspect.isfunction(thing):
                continue  # a constant, explained by the string below it
            yield f"{module.__name__}.{name}", thing
            if inspect.isclass(thing):
                foreign = {
                    n for base in thing.__mro__ if not base.__module__.startswith("flux_ext") for n in vars(base)
                }
                for method in sorted(set(vars(thing)) - foreign):
                    if method[0] != "_" and (
                        callable(getattr(thing, method)) or isinstance(vars(thing)[method], property)
                    ):
                        yield f"{module.__name__}.{name}.{method}", getattr(thing, method)


def documentation(thing) -> str:
    """The docstring; a class's with those of its fields and its own bases."""
    if not inspect.isclass(thing):
        return inspect.getdoc(thing) or ""
    texts = []
    for cls in thing.__mro__:
        if cls.__module__.startswith("flux_ext"):
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
            fields = [
                a.target.id for a, b in pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
            ]
            texts += [cls.__doc__ or "", *fields]
    return "\n".join(texts)


THINGS = dict(public_things())


@pytest.mark.parametrize("name", THINGS)
def test_public_names_are_documented(name):
    """Each has a docstring that names every parameter, or refers to where they are explained."""
    thing = THINGS[name]
    text = documentation(thing)
    assert text
    if callable(thing) and not re.search(r"(as for\s+|^):", text):
        parameters = inspect.signature(thing).parameters.values()
        named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name not in ("self", "kwargs")]
        assert [n for n in named if not re.search(rf"\b{n}\b", text)] == []
