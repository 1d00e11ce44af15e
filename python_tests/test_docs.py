"""What the documents say can be run is run; what they point to is there."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = [
    (path.name, i, code)
    for path in DOCUMENTS
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("name", "index", "code"), EXAMPLES, ids=[f"{n}-{i}" for n, i, _ in EXAMPLES])
def test_python_examples_run(name, index, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{name}, example {index}", "exec"), {})


def test_the_readme_has_an_example():
    assert any(name == "README.md" for name, _, _ in EXAMPLES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_command_line_in_the_readme_exists(capsys):
    from flux_ext.cli import commands

    for command in sorted(set(re.findall(r"^    flux-ext (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))):
        with pytest.raises(SystemExit) as stop:
            commands.main([command, "--help"])
        assert stop.value.code == 0
        options = set(
            re.findall(rf"^    flux-ext {command} (.*?)(?:#|$)", (ROOT / "README.md").read_text(), re.MULTILINE)
        )
        text = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", " ".join(options)):
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_are_there(path):
    """By their path, or by the end of it."""
    if path.name in ("kernels_diary.md",) or path.parent.name == "decisions":  # what was then
        return
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a checkout")
    ends = {"/".join(name.split("/")[i:]) for name in files for i in range(name.count("/") + 1)}
    for name in re.findall(r"`([\w./]+\.(?:py|h|cpp|cu|toml|txt|sh))`", path.read_text()):
        assert name in ends, name
