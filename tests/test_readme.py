"""What the README shows in Python works, in an empty folder."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.timeout(600)
def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(snippets) == 2
    namespace = {}
    for snippet in snippets:
        exec(snippet.replace("TrainConfig(steps=500)", "TrainConfig(steps=3)"), namespace)
    assert (tmp_path / "my_policy").is_dir() and len(namespace["actions"]) == 1
