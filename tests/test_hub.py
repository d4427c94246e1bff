"""A checkpoint as a model of the Hugging Face Hub: its card, and the way there and back. Nothing here uses a
network: the hub is a folder."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

hub = pytest.importorskip("huggingface_hub")

from dpag.config import generator
from dpag.data import Shapes
from dpag.files import CARD, SUMS, DamagedError, read_text, root, write_text
from dpag.hub import FILES, write_card
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import ActionGuidedPolicy, DPAGConfig
from dpag.policy import ChunkPolicy, MLPConfig, PolicyConfig, build_policy, load_policy, save_policy

EVALUATION = root() / "results/eval/laptop-scripted/pusht_kp/dp_ag/s0"
SMALL = PolicyConfig(net=MLPConfig(width=16, depth=2))
SHAPES = Shapes({"agent_pos": (2,), "image": (96, 96, 3)}, 2)
OBS = {"agent_pos": torch.ones(1, 2, 2), "image": torch.full((1, 2, 96, 96, 3), 7, dtype=torch.uint8)}


@pytest.fixture(scope="module")
def policy():
    return build_policy(DPAGConfig(), SMALL, SHAPES).eval()


def same(a, b) -> bool:
    return torch.equal(a.act(OBS, generator("a")), b.act(OBS, generator("a")))


def published() -> dict:
    return json.loads(read_text(EVALUATION / "run.json"))


@pytest.fixture
def checkpoint(policy, tmp_path):
    "A checkpoint that says that it is the one of EVALUATION."
    run = published()
    save_policy(tmp_path / "checkpoint", policy, {**run, "license": "mit"})
    return tmp_path / "checkpoint"


# The card


def test_a_checkpoint_has_a_card_that_the_hub_reads(policy, tmp_path):
    save_policy(tmp_path / "c", policy)
    data = hub.ModelCard.load(tmp_path / "c" / CARD).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("dpag", "unknown", "robotics")
    assert "dp_ag" in data.tags and data.eval_results is None
    assert {p.name for p in (tmp_path / "c").iterdir()} == set(FILES)


def test_the_card_has_the_score_of_the_evaluation_with_its_interval(checkpoint):
    write_card(checkpoint, EVALUATION)
    card = hub.ModelCard.load(checkpoint / CARD)
    metrics = json.loads(read_text(EVALUATION / "metrics.json"))
    found = {e.metric_type: (e.metric_value, e.dataset_name) for e in card.data.eval_results}
    assert found == {k: (v["mean"], "pusht_kp") for k, v in metrics.items()}
    n = len(read_text(EVALUATION / "episodes.csv").splitlines()) - 1
    low, high = (f"{metrics['score'][k]:.3f}" for k in ("low", "high"))
    assert f"{low} to {high}" in card.text and f"Means of {n} episodes" in card.text
    for what in (published()["data_hash"], "laptop", "license | mit", "[96, 96, 3]", "from_pretrained"):
        assert what in card.text
    assert same(load_policy(checkpoint)[0], load_policy(checkpoint)[0])


def test_the_score_of_another_training_or_a_damaged_one_is_refused(checkpoint, tmp_path):
    before = read_text(checkpoint / CARD)
    with pytest.raises(ValueError, match=r"s1: seed = 1, the checkpoint has 0"):
        write_card(checkpoint, root() / "results/eval/laptop-scripted/pusht_kp/dp_ag/s1")
    with pytest.raises(FileNotFoundError, match=r"no evaluation at .*it has no run.json"):
        write_card(checkpoint, tmp_path)
    shutil.copytree(EVALUATION, tmp_path / "e")
    write_text(tmp_path / "e/metrics.json", read_text(EVALUATION / "metrics.json").replace("0.9", "0.99"))
    with pytest.raises(DamagedError, match=r"metrics.json is damaged"):
        write_card(checkpoint, tmp_path / "e")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        write_card(tmp_path / "e")
    assert read_text(checkpoint / CARD) == before


ODD = {
    "task": 'a: "b"\n---\n# c | d',
    "license": "---\nlicense: mit",
    "data": "päth | `x`\n| y |",
    "seed": 1.5,
}


def test_nothing_that_info_says_breaks_the_card(policy, tmp_path):
    save_policy(tmp_path / "c", policy, {**ODD, "units": {"a": 1}, "list": [1], "none": None})
    card = hub.ModelCard.load(tmp_path / "c" / CARD)
    assert card.data.license == ODD["license"] and card.data.library_name == "dpag"
    rows = [line for line in card.text.splitlines() if line.startswith("| data")]
    assert card.text.splitlines()[1] == '# dp_ag on a: "b" --- # c | d'
    assert rows == ["| data | päth \\| `x` \\| y \\| |"]
    assert load_policy(tmp_path / "c")[1]["info"]["task"] == ODD["task"]


def test_a_card_may_be_edited_and_no_other_file(checkpoint):
    write_text(checkpoint / CARD, "I like it.")
    load_policy(checkpoint)
    (checkpoint / CARD).unlink()
    write_text(checkpoint / ".cache/huggingface/CACHEDIR.TAG", "What the hub's library leaves.")
    load_policy(checkpoint)
    write_text(checkpoint / "more.md", "I like it.")
    with pytest.raises(DamagedError, match="more.md has no checksum"):
        load_policy(checkpoint)
    assert CARD not in read_text(checkpoint / SUMS)


# There and back


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    "A hub that is a folder; a snapshot is links to blobs, as in the hub's cache."
    seen = SimpleNamespace(folder=tmp_path / "cloud", made=[], fetched=[])

    class Api:
        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            seen.made.append((name, private))
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            shutil.copytree(folder_path, seen.folder / repo_id, dirs_exist_ok=True)
            assert {p.name for p in (seen.folder / repo_id).iterdir()} == set(allow_patterns)
            write_text(seen.folder / repo_id / ".gitattributes", "*.safetensors filter=lfs\n")
            return SimpleNamespace(commit_url=f"hub:{repo_id}/commit/1")

    def snapshot(name, revision, allow_patterns):
        seen.fetched.append((name, revision))
        cache = tmp_path / "cache" / name.replace("/", "--")
        cache.mkdir(parents=True, exist_ok=True)
        for f in (f for f in allow_patterns if (seen.folder / name / f).exists()):
            os.symlink(seen.folder / name / f, cache / f)
        return str(cache)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return seen


def test_a_policy_goes_to_the_hub_and_comes_back(policy, cloud):
    assert policy.push_to_hub("me/mine", {"license": "mit"}, private=True) == "hub:me/mine/commit/1"
    write_text(cloud.folder / "me/mine" / CARD, "Edited there.")
    write_text(cloud.folder / "me/mine/film.txt", "Added there.")
    again = ChunkPolicy.from_pretrained("me/mine", revision="v1")
    assert same(policy, again) and not again.training
    assert cloud.made == [("me/mine", True)] and cloud.fetched == [("me/mine", "v1")]


def test_what_comes_damaged_from_the_hub_is_refused(policy, cloud):
    policy.push_to_hub("me/mine")
    weights = cloud.folder / "me/mine/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match=r"model.safetensors is damaged"):
        ChunkPolicy.from_pretrained("me/mine")


def test_a_folder_is_loaded_as_it_is_and_another_method_is_refused(policy, tmp_path, cloud, monkeypatch):
    policy.save_pretrained(tmp_path / "c", {"step": 3})
    assert same(policy, ActionGuidedPolicy.from_pretrained(tmp_path / "c")) and cloud.fetched == []
    monkeypatch.chdir(tmp_path / "c")
    assert same(policy, load_policy(".")[0])
    build_policy(DPConfig(), SMALL, SHAPES).save_pretrained(tmp_path / "dp")
    with pytest.raises(ValueError, match="is of the method dp, which is no ActionGuidedPolicy"):
        ActionGuidedPolicy.from_pretrained(tmp_path / "dp")


@pytest.mark.parametrize(
    "name", ["", "typo", "runs/x/checkpoint", "../mine", "me/../mine", "me/mi ne", "https://a/b"]
)
def test_what_is_no_folder_and_no_repository_is_refused_without_a_network(name, cloud):
    with pytest.raises(FileNotFoundError, match="owner/name"):
        ChunkPolicy.from_pretrained(name)
    assert cloud.fetched == []


ALONE = """
import socket, sys
sys.modules["huggingface_hub"] = None  # not installed
socket.socket.connect = lambda *a: sys.exit("a network was asked for")
from dpag.policy import ChunkPolicy, load_policy, save_policy
policy = ChunkPolicy.from_pretrained(sys.argv[1])
policy.save_pretrained(sys.argv[1] + "2")
load_policy(sys.argv[1] + "2")
try:
    ChunkPolicy.from_pretrained("me/mine")
except ImportError as e:
    print(e)
"""


def test_without_the_hubs_library_only_the_hub_is_missing(checkpoint):
    call = [sys.executable, "-c", ALONE, str(checkpoint)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'dpag[hub]'" in done.stdout
