"""Every profile is valid; every wrong setting is refused by name; YAML cannot change a value."""

import contextlib
import copy
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dpag import settings as s
from dpag.ablation import SAME_RATE, variant
from dpag.config import SettingsError, merge
from dpag.cost import stand_in_policy
from dpag.files import root
from dpag.interplay import base_of
from dpag.policy import METHODS, PolicyConfig
from dpag.rows import is_variant
from dpag.tasks.base import TASKS
from dpag.train import TrainConfig, ema_decay, fit

PROFILES = ("smoke", "workstation", "interplay", "paper", "paper-core")
RUNS = [f"{p}-{d}" for p in ("laptop", *PROFILES) for d in ("scripted", "human")]


def tree(profile="laptop"):
    "The tree of a profile as it is read, before it is checked."
    return s.profile_tree(profile, root())


@pytest.mark.parametrize("run", RUNS)
def test_profiles_are_valid(run):
    settings = s.load(run)
    assert settings.run == run
    cells = {(t, m) for t, methods in settings.pipeline.items() for m in methods}
    for task, method in cells:
        assert settings.cell(task, method).policy.horizon >= 2


@pytest.mark.parametrize("run", ["interplay-human", "interplay-scripted", "workstation-scripted"])
def test_variants_that_are_compared_at_equal_steps_train_for_as_many(run):
    settings = s.load(run)
    study = settings.ablation
    tasks = settings.pipeline | ({study.task: dict.fromkeys(study.methods)} if study.methods else {})
    pairs = {}
    for task, methods in tasks.items():
        variants = [m for m in methods if is_variant(m) and not m.startswith("ab_dp_long")]
        for m in variants:
            assert variant(m)[0] != "other", f"{m} has no title"
            if base := SAME_RATE.get(m) or base_of(m, "ab_dp", variants):
                pairs[task, m] = [settings.cell(task, each).train.steps for each in (m, base)]
    assert pairs and {cell: steps for cell, steps in pairs.items() if steps[0] != steps[1]} == {}


def test_params_is_committed_as_the_laptop_profile():
    assert s.load().run == "laptop-scripted"


COLUMNS = list(s.read_tree(root() / "conf/profile/paper.yaml")["pipeline"])
SEVEN = ("lstm_gmm", "ibc", "bet", "flow_policy", "ada_flow", "dp", "dp_ag")
IMAGES = ("pusht_img", "dynamic_pusht_img")


@functools.cache
def paper():
    return s.load("paper-human")


def test_the_paper_profile_runs_every_method_in_every_column_of_the_tables():
    assert len(COLUMNS) == 13
    for task in COLUMNS:
        assert sorted(paper().pipeline[task]) == sorted(SEVEN)


@pytest.mark.parametrize("task", COLUMNS)
def test_dp_and_dp_ag_have_diffusion_policys_published_settings(task):
    wide = task in (*IMAGES, "kitchen")
    for method in ("dp", "dp_ag"):
        cell = paper().cell(task, method)
        p, train = cell.policy, cell.train
        assert (p.horizon, p.n_obs_steps, p.n_action_steps, p.action_frame) == (16, 2, 8, "absolute")
        assert p.net.kind == "unet"
        assert p.net.channels == ([512, 1024, 2048] if wide else [256, 512, 1024])
        assert (p.net.kernel_size, p.net.n_groups, p.net.step_dim) == (5, 8, 128 if task in IMAGES else 256)
        d = p.diffusion
        assert (d.prediction, d.sampler, d.n_train_steps, d.n_sample_steps) == ("epsilon", "ddpm", 100, 100)
        assert (d.schedule, d.clip) == ("squaredcos_cap_v2", 1.0)
        assert (train.lr, train.weight_decay, train.betas) == (1e-4, 1e-6, (0.95, 0.999))
        assert (train.warmup_steps, train.batch_size) == (500, 64 if task in IMAGES else 256)
        assert train.ema.model_dump() == {"inv_gamma": 1.0, "power": 0.75, "max_decay": 0.9999}
        assert cell.evaluate.n_episodes == 50 and len(cell.evaluate.curve) == 9


@pytest.mark.parametrize("task", COLUMNS)
def test_the_baselines_have_their_published_settings(task):
    image, kitchen = task in IMAGES, task == "kitchen"
    lstm, ibc, bet = (paper().cell(task, m) for m in ("lstm_gmm", "ibc", "bet"))
    m = lstm.method
    assert (m.min_std, m.hidden, m.layers, m.n_modes) == (1e-4, 1000 if image else 400, 2, 5)
    assert (lstm.train.weight_decay, lstm.train.betas) == (0.0, (0.9, 0.999))
    m = ibc.method
    assert (m.width, m.depth, m.n_negatives, m.n_candidates, m.n_rounds) == (1024, 4, 1024, 1024, 5)
    assert (m.spread, m.shrink, ibc.train.batch_size) == (0.03, 1.0, 128 if image else 256)
    m = bet.method
    assert (m.n_bins, m.layers, m.heads, m.width) == ((64, 6, 6, 120) if kitchen else (24, 4, 4, 72))
    assert (m.offset_weight, m.focal_gamma, bet.policy.horizon) == (1000.0, 2.0, 10 if kitchen else 3)
    assert (bet.train.weight_decay, bet.train.betas, bet.train.grad_clip) == (0.1, (0.9, 0.95), 1.0)
    for cell in (lstm, ibc, bet):  # there is no average of the weights
        assert [ema_decay(n, cell.train.ema) for n in (0, 1, 10_000)] == [0, 0, 0]
        assert cell.train.lr == 1e-4


def test_a_column_is_trained_for_as_many_steps_by_every_method_that_sees_as_many_windows():
    for task in COLUMNS:
        steps = {paper().cell(task, m).train.steps for m in SEVEN if not (m == "ibc" and task in IMAGES)}
        assert len(steps) == 1 and steps != {TrainConfig().steps}


def narrow(cell: s.CellSettings) -> s.CellSettings:
    "The cell with nets an eighth as wide, in place of up to 256 million weights."
    policy, method = cell.policy, cell.method
    net = policy.net.model_copy(update={"channels": [c // 8 for c in policy.net.channels]})
    widths = {"hidden", "width"} & set(type(method).model_fields) if method.kind != "bet" else set()
    method = method.model_copy(update={w: getattr(method, w) // 8 for w in widths})
    return cell.model_copy(update={"policy": policy.model_copy(update={"net": net}), "method": method})


@pytest.mark.parametrize("method", SEVEN)
@pytest.mark.parametrize("task", COLUMNS)
def test_every_cell_of_the_paper_makes_a_training_step(task, method):
    "At full size on Push-T's keypoints; elsewhere the nets are narrow, but for BET's and the ResNet."
    cell = paper().cell(task, method)
    policy, dataset = stand_in_policy(cell if task == "pusht_kp" else narrow(cell))
    before = [p.detach().clone() for p in policy.parameters()]
    train = cell.train.model_copy(update={"steps": 1, "batch_size": 2, "warmup_steps": 0, "device": "cpu"})
    log = fit(policy, dataset, train)
    assert math.isfinite(log.loss[0])
    moved = sum(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    assert moved > len(before) / 2


def test_the_core_of_the_paper_differs_in_little():
    core = s.load("paper-core-human")
    assert len(core.pipeline) == 6
    for task, methods in core.pipeline.items():
        assert methods == {"dp": [0, 1, 2], "dp_ag": [0, 1, 2]}
        for method in methods:
            a, b = paper().cell(task, method), core.cell(task, method)
            assert b.method == a.method and b.policy.diffusion == a.policy.diffusion
            assert b.train.model_copy(update={"steps": a.train.steps, "precision": "float32"}) == a.train
            assert b.policy == a.policy or task == "kitchen"


UNET = {"kind": "unet", "channels": [16, 32, 64], "kernel_size": 5, "n_groups": 8, "step_dim": 16}
CASES = [
    ({"train.learning_rate": 1e-3}, ["train", "learning_rate", "Extra inputs"]),
    ({"train.lr": -1.0}, ["train", "lr = -1.0", "greater than 0"]),
    ({"train.batch_size": 1}, ["batch_size = 1", "greater than or equal to 2"]),
    ({"policy.horizon": 8}, ["policy", "n_action_steps + n_obs_steps - 1 = 9"]),
    ({"policy.action_frame": "polar"}, ["action_frame = 'polar'", "'absolute' or 'relative'"]),
    ({"policy.horizon": 18, "policy.net": UNET}, ["horizon = 18", "divisible by 4"]),
    ({"policy.net": {**UNET, "channels": [12]}}, ["[12]", "divisible by net.n_groups = 8"]),
    ({"policy.net.kind": "transformer"}, ["net", "'mlp'"]),
    (
        {"sampling.tasks": {"pusht_kp": 20000}},
        ["sampling.first_seed", "70000", "evaluate.first_seed = 60000"],
    ),
    ({"sampling.tasks": {"pusht": 20}}, ["task = 'pusht'", "allowed are"]),
    ({"policy.diffusion.n_sample_steps": 101}, ["n_sample_steps = 101", "at most n_train_steps = 100"]),
    ({"policy.diffusion.target_temperature": 0.4}, ["target_temperature = 0.4", "epsilon"]),
    (
        {"methods.dp_ag.guidance.vjp": "normalized"},
        ["methods.dp_ag.guidance.vjp = 'normalized'", "'unit' or 'raw'"],
    ),
    ({"methods.dp_ag.guidance.evolve": False}, ["methods.dp_ag.guidance.evolve = False", "'never'"]),
    ({"tasks.pusht_kp.demo_seed": 100}, ["tasks.pusht_kp.demo_seed = 100", "not tested on states"]),
    ({"pipeline.pusht_kp": {"dp": [0], "dpag": [0]}}, ["pipeline.pusht_kp", "dpag", "'dp', 'dp_ag'"]),
    ({"pipeline.pusht": {"dp": [0]}}, ["task = 'pusht'", "pusht_kp"]),
    ({"pipeline.pusht_kp": {"dp": ["0"], "ibc": [-1]}}, ["pipeline.pusht_kp.ibc.0 = -1"]),
    (
        {"tasks.pusht_img.methods": {"bet": {"trian": {"lr": 1.0}}}},
        ["tasks.pusht_img.methods.bet has ['trian']"],
    ),
    (
        {"tasks.can_ph.methods": {"lstm_gmm": {"min_std": -1.0}}},
        ["lstm_gmm.min_std", "-1.0", "greater than 0"],
    ),
    (
        {"evaluate.acting": {"ada_flow": {"coarse": {"eta": -1}}}},
        ["evaluate.acting.ada_flow.coarse.eta", "-1"],
    ),
    ({"evaluate.acting": {"dp": {"fast": {"etta": 1}}}}, ["evaluate.acting.dp.fast.etta", "not permitted"]),
    ({"evaluate.acting": {"ada_flo": {}}}, ["evaluate.acting names the methods ['ada_flo']", "ada_flow"]),
    (
        {"tasks.pusht_img.evaluate": {"acting": {"ada_flo": {}}}},
        ["tasks.pusht_img.evaluate.acting", "['ada_flo']"],
    ),
    (
        {"tasks.pusht_img.train": {"lr": -1}},
        ["train of any method on pusht_img", "lr = -1", "greater than 0"],
    ),
    (
        {"tasks.pusht_img.policy": {"encoder": {"camera": {"backbone": "vit"}}}},
        ["policy of any method on pusht_img", "camera.backbone = 'vit'", "'small' or 'resnet18'"],
    ),
    ({"tasks.pusht_img.learning": {}}, ["tasks.pusht_img.learning", "Extra inputs"]),
    ({"methods.bet.policy": {"horizon": 2}}, ["horizon = 2", "bet on pusht_kp"]),
    ({"methods.gpt": {"kind": "gpt"}}, ["method = 'gpt'", "allowed are"]),
    ({"methods.a": {"of": "b"}, "methods.b": {"of": "a"}}, ["of = ", "a circle"]),
    ({"ablation.methods": ["ab_nothing"]}, ["ablation.methods", "ab_nothing"]),
    ({"tasks.pusht_img.methods": {"bert": {}}}, ["tasks.pusht_img.methods", "bert"]),
    ({"tasks.dynamic_pusht_kp": {"ball": {"speed": [200, 100]}}}, ["ball.speed", "[lowest, highest]"]),
    ({"tasks.kitchen.expert": {"gain": [2, 1]}}, ["tasks.kitchen.expert.gain", "[lowest, highest]"]),
    ({"robot.limits": {"speed": 0.5}}, ["robot.limits", "speed = 0.5", "looser"]),
    ({"trian": {}}, ["trian", "Extra inputs"]),
    ({"by_demos.robots": {}}, ["by_demos.robots = 'robots'", "allowed are", "human"]),
    ({"by_demos.human": {"profile": "mine"}}, ["by_demos.human has ['profile']", "same for every source"]),
    ({"by_demos.human": 7}, ["by_demos.human = 7", "valid dictionary"]),
]


@pytest.mark.parametrize(
    "changes,words", CASES, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(CASES)]
)
def test_wrong_settings_are_refused_by_name(changes, words):
    with pytest.raises(SettingsError) as e:
        s.validate(with_changes(changes, tree()))
    for w in words:
        assert w in str(e.value)


@pytest.mark.parametrize(
    "run,word",
    [("huge-scripted", "laptop"), ("laptop-robot", "human"), ("laptop", "is needed, as laptop-scripted")],
)
def test_unknown_profile_and_source(run, word):
    with pytest.raises(SettingsError, match=word):
        s.load(run)


@pytest.mark.parametrize("task", ["pusht_kp", "ur5_peg", "kitchen"])
def test_an_unknown_source_of_demonstrations_is_refused_by_every_task(task):
    entry = TASKS[task]
    made = entry.make(task, entry.configure())
    assert set(made.sources) == set(entry.sources)
    with pytest.raises(SettingsError, match=f"{task} has {', '.join(made.sources)}"):
        made.demonstrations("dreamt")


def test_a_tasks_own_settings_are_merged_and_stay_its_own():
    laptop = s.load("laptop-scripted")
    img, kp = laptop.cell("pusht_img", "dp"), laptop.cell("pusht_kp", "dp")
    assert img.policy.encoder.features == "raw" and kp.policy.encoder.features == "planar"
    assert img.train.batch_size == 64 and img.train.ema == kp.train.ema


def test_a_method_is_laid_over_the_task_and_the_tasks_word_on_it_over_both():
    laptop = s.load("laptop-scripted")
    assert laptop.cell("can_ph", "lstm_gmm").method.min_std == 0.1
    assert laptop.cell("pusht_kp", "lstm_gmm").method.min_std == METHODS["lstm_gmm"].config().min_std == 1e-4
    bet, on_images = laptop.cell("pusht_kp", "bet"), laptop.cell("pusht_img", "bet")
    assert (bet.policy.horizon, bet.policy.n_obs_steps, bet.train.weight_decay) == (3, 3, 0.1)
    assert laptop.cell("pusht_kp", "dp").policy.horizon == 16
    assert (on_images.train.batch_size, on_images.policy.encoder.features, on_images.policy.horizon) == (
        48,
        "raw",
        3,
    )


def test_the_kitchens_limit_is_the_usual_one_with_human_demonstrations():
    for run in RUNS:
        assert s.load(run).task("kitchen").max_steps == (280 if run.endswith("human") else 500)


def test_what_is_said_of_a_source_holds_for_it_alone():
    wanted = with_changes({"by_demos.human": {"train": {"lr": 0.5}}}, tree())
    assert s.validate(wanted).cell("pusht_kp", "dp").train.lr == 2e-3
    assert s.validate({**wanted, "demos": "human"}).cell("pusht_kp", "dp").train.lr == 0.5


def project(tmp_path, **files) -> Path:
    "A folder with the project's params.yaml and conf/common.yaml, and profiles of these texts."
    (tmp_path / "conf/profile").mkdir(parents=True)
    for name in ("params.yaml", "conf/common.yaml"):
        (tmp_path / name).write_text((root() / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name, text in files.items():
        (tmp_path / f"conf/profile/{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_profile_inherits_from_the_one_that_it_is_like_all_but_what_is_run(tmp_path):
    small = "train: {lr: 0.5, steps: 7}\npipeline: {pusht_kp: {dp: [0]}}\nablation: {methods: [ab_dp]}"
    own = "profile: own\nlike: small\ntrain: {lr: 0.25}"
    settings = s.load("own-scripted", project(tmp_path, small=small, own=own))
    assert settings.run == "own-scripted" and settings.pipeline == {} and settings.ablation.methods == []
    assert (settings.train["lr"], settings.train["steps"]) == (0.25, 7)


@pytest.mark.parametrize(
    "files,words",
    [
        ({"own": "like: own"}, "own.yaml: like = 'own': a circle"),
        ({"own": "like: other", "other": "like: own"}, "other.yaml: like = 'own': a circle"),
        ({"own": "like: huge"}, "profile = 'huge': allowed are laptop, own"),
        ({"own": "like: [1]"}, "profile = [1]: allowed are"),
    ],
)
def test_a_profile_like_no_other_is_refused(files, words, tmp_path):
    with pytest.raises(SettingsError, match=re.escape(words)):
        s.load("own-scripted", project(tmp_path, **files))


def test_a_variant_inherits_what_it_does_not_say():
    settings = s.load("workstation-scripted")
    cold, full = settings.cell("pusht_kp", "ab_dp_cold"), settings.method("ab_gamma_10")
    diffusion = cold.policy.diffusion
    assert (diffusion.prediction, diffusion.sampler, diffusion.target_temperature) == ("epsilon", "ddpm", 0.4)
    assert cold.method.kind == "dp" and cold.policy.net.width == 256
    gamma = settings.method("dp_ag").guidance.model_copy(update={"gamma": 10.0})
    assert full.guidance == gamma


YAMLS = [
    "params.yaml",
    "conf/common.yaml",
    *(f"conf/profile/{p}.yaml" for p in PROFILES),
]


@pytest.mark.parametrize("file", YAMLS)
def test_every_value_survives_yaml_1_1_and_1_2(file, tmp_path):
    "DVC writes files back in YAML 1.2; they are read in 1.1. `off`, `1e-6` and the like would change."
    text = (root() / file).read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    for version in ((1, 1), (1, 2)):
        ruamel = YAML(typ="rt")
        ruamel.version = version
        again = tmp_path / "again.yaml"
        with open(again, "w", encoding="utf-8") as f:
            ruamel.dump(ruamel.load(text), f)
        written = again.read_text(encoding="utf-8")
        assert yaml.safe_load(written) == before
        assert YAML(typ="safe").load(written) == before


def words_of(schema) -> set[str]:
    "Every word that a JSON schema allows somewhere in it."
    if isinstance(schema, list):
        return set().union(*map(words_of, schema))
    if not isinstance(schema, dict):
        return set()
    own = [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
    return {w for w in own if isinstance(w, str)}.union(*map(words_of, schema.values()))


def test_no_allowed_word_is_a_truth_value_to_yaml():
    "What a setting may be, written plainly, must be read as that word: `off` and `no` would not be."
    entries = [*map(METHODS.__getitem__, METHODS.names()), *map(TASKS.__getitem__, TASKS.names())]
    configs = [*(e.config for e in entries), PolicyConfig, TrainConfig, s.Settings]
    words = set().union(*(words_of(c.model_json_schema()) for c in configs))
    assert {"never", "every", "raw", "ddim"} <= words
    assert {w for w in words if yaml.safe_load(w) != w} == set()


@pytest.mark.parametrize(
    "text,word",
    [
        ("train: {steps: 1, steps: 2}", "steps stands twice"),
        ("- a\n- b", "a mapping of sections is needed"),
        ("train: [", "params.yaml: "),
        ("profile: paper", "this file is the profile laptop"),
    ],
)
def test_a_broken_file_is_refused_in_a_sentence(text, word, tmp_path):
    (tmp_path / "conf/profile").mkdir(parents=True)
    (tmp_path / "conf/common.yaml").write_text("{}", encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=word):
        s.load("laptop-scripted", tmp_path)


def test_the_labs_arm_is_the_same_in_every_profile(tmp_path):
    (tmp_path / "conf").symlink_to(root() / "conf")
    mine = merge(
        yaml.safe_load((root() / "params.yaml").read_text(encoding="utf-8")),
        {"robot": {"address": "10.0.0.7"}},
    )
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    for run in ("laptop-scripted", "smoke-scripted"):
        settings = s.load(run, tmp_path)
        assert settings.robot.address == settings.task("ur5_peg").robot.address == "10.0.0.7"


def test_settings_are_read_without_a_simulator():
    "Many processes need settings; none of them should wait for a simulator."
    heavy = [
        "mujoco",
        "robosuite",
        "gym_pusht",
        "pygame",
        "gymnasium_robotics",
        "robomimic",
        "sklearn",
        "matplotlib",
    ]
    program = (
        f"import sys, dpag.settings; dpag.settings.load(); print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_run_by_hand_under_changed_settings_has_a_name_of_its_own(monkeypatch):
    assert s.own_run("laptop-scripted").run == "laptop-scripted"
    monkeypatch.setattr(s, "changed_by_hand", lambda: False)
    assert s.own_run(None).run == "laptop-scripted"
    monkeypatch.setattr(s, "changed_by_hand", lambda: True)
    own = s.own_run(None).run
    assert own.startswith("laptop+") and own.endswith("-scripted")
    assert s.load(own).own == own.removeprefix("laptop+").removesuffix("-scripted")


DOUBTFUL = [
    # text, truth values and numbers that are none
    ({"train.steps": "1000"}, "valid integer"),
    ({"train.steps": True}, "valid integer"),
    ({"train.steps": 100.0}, "valid integer"),
    ({"train.lr": "0.001"}, "valid number"),
    ({"train.lr": math.nan}, "finite"),
    ({"train.grad_clip": math.inf}, "finite"),
    ({"pipeline.pusht_kp": {"dp": ["-1"]}}, "valid integer"),
    ({"evaluate.first_seed": None}, "valid integer"),
    ({"methods.dp_ag.guidance.vjp_detach": "no"}, "valid boolean"),
    # slips of a finger
    ({"train.lr": 1e9}, "less than or equal to 1"),
    ({"train.batch_size": 10**9}, "65536"),
    ({"train.steps": 10**12}, "100000000"),
    ({"train.threads": 0}, "greater than 0"),
    ({"train.ema.max_decay": 1.0}, "less than 1"),
    ({"policy.encoder.latent_dim": 10**8}, "16384"),
    ({"policy.encoder.hidden": []}, "at least 1"),
    ({"policy.net.depth": 10**6}, "64"),
    ({"policy.net.step_dim": 31}, "multiple of 2"),
    ({"policy.net": {**UNET, "kernel_size": 4}}, "odd"),
    ({"policy.diffusion.clip": 1e-6}, "greater than or equal to 0.5"),
    ({"methods.dp_ag.guidance.gamma": 1e9}, "1000"),
    ({"methods.dp_ag.guidance.temperature": 1e-9}, "0.01"),
    ({"tasks.pusht_kp.n_demos": 0}, "greater than 0"),
    ({"tasks.pusht_kp.demo_seed": 2**40}, "2147483648"),
    ({"evaluate.n_episodes": 10**9}, "1000000"),
    ({"evaluate.workers": 10**6}, "1024"),
    # the same twice, and nothing at all
    ({"pipeline.pusht_kp": {"dp": [0, 0]}}, "named once"),
    ({"pipeline.pusht_kp": {"dp": []}}, "at least 1"),
    ({"ablation.train_seeds": [1, 1]}, "named once"),
    ({"evaluate.curve": [0.5, 0.5]}, "named once"),
    ({"sampling.steps": [2, 2]}, "named once"),
    ({"sampling.steps": [2, 1000]}, "at most 100, n_train_steps"),
    # names that would leave their folder, or be read as something else
    ({"own": "../../etc"}, "pattern"),
    ({"own": "a+b"}, "pattern"),
    ({"methods": {"dp/fast": {"of": "dp"}}}, "pattern"),
    ({"methods": {"dp, fast": {"of": "dp"}}}, "pattern"),
    ({"evaluate.acting": {"dp": {"../fast": {}}}}, "pattern"),
    # things of another kind
    ({"train": None}, "valid dictionary"),
    ({"train": [1]}, "valid dictionary"),
    ({"methods.dp": {"of": 3}}, "the name of an entry"),
    ({"methods.dp_ag.policy": 7}, "valid dictionary"),
    ({"tasks.pusht_kp.methods": {"dp": {"policy": 7}}}, "a mapping is needed"),
    ({"tasks": {7: {}}}, "valid string"),
]


def with_changes(changes, base) -> dict:
    "A copy of the tree `base` with some values replaced, each by its dotted name."
    changed = copy.deepcopy(base)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node = changed
        for p in path:
            node = node.setdefault(p, {})
        node[last] = value
    return changed


@pytest.mark.parametrize(
    "changes,words", DOUBTFUL, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(DOUBTFUL)]
)
def test_a_doubtful_value_is_refused(changes, words, tried):
    with tried.refused("settings", SettingsError, match=re.escape(words)):
        s.validate(with_changes(changes, tree()))


SLIPS = [
    ({"train.lr": 0.5}, "train.lr = 0.5"),
    ({"train.warmup_steps": 10**6}, "all of its"),
    ({"tasks.pusht_kp.n_demos": 20_000}, "n_demos = 20000"),
    ({"evaluate": {"n_episodes": 20_000}}, "n_episodes = 20000"),
]


@pytest.mark.parametrize("changes,words", SLIPS, ids=[next(iter(c)) for c, _ in SLIPS])
def test_a_value_that_looks_like_a_slip_is_named(changes, words):
    few = {**tree(), "pipeline": {"pusht_kp": {"dp": [0]}}, "sampling": {}}
    assert s.doubts(s.validate(few)) == []
    (doubt,) = s.doubts(s.validate(with_changes(changes, few)))
    assert words in doubt and "pusht_kp" in doubt


@pytest.mark.parametrize(
    "text,word",
    [
        (
            f"a: &a [{'1,' * 99}]\n"
            + "".join(f"{c}: &{c} [{f'*{b},' * 99}]\n" for b, c in ("ab", "bc", "cd")),
            "aliases",
        ),
        ("train: &a {steps: *a}", "aliases"),
        ("train: &a [*a]", "aliases"),
        ("[" * 5000, "nested too deeply"),
        ("train: {steps: !!python/object/apply:os.system [ls]}", "could not determine a constructor"),
        ("train: {steps: " + "9" * 5000 + "}", "limit"),
        ("\x00", "special characters"),
    ],
    ids=["multiplied", "in itself", "list in itself", "deep", "object", "digits", "control character"],
)
def test_a_file_that_would_take_all_memory_or_run_code_is_refused(text, word, tmp_path, tried):
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with tried.refused("settings", SettingsError, match=word):
        s.read_tree(path)


def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("{a: 1e-4, b: -2E3, c: 1.5e+2, d: 1e4x, e: e4}", encoding="utf-8")
    assert s.read_tree(path) == {"a": 1e-4, "b": -2000.0, "c": 150.0, "d": "1e4x", "e": "e4"}


def paths_of(node, path=()):
    "The path of every value of a tree."
    yield path
    if isinstance(node, dict):
        for k, v in node.items():
            yield from paths_of(v, (*path, k))


ODD = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 7, 10**6, 10**30, 0.0, -0.5, 1e-300, 1e300, math.nan, math.inf, True, None]
    ),
    st.sampled_from(["", "dp", "a/b", "0", "1e-3", "ddim", "mlp", "every", "\x00", "🙂"]),
    st.sampled_from(
        [[], [0], [[]], {}, {"a": 1}, {"kind": "unet"}, {"kind": []}, {1: 2}, [None], {"of": "dp"}]
    ),
)


def test_no_tree_of_settings_ends_in_a_traceback(tried):
    whole = tree()
    few = {
        **whole,
        "tasks": {t: whole["tasks"].get(t, {"n_demos": 20}) for t in ("pusht_kp", "pusht_img", "ur5_peg")},
    }
    few |= {"pipeline": {"pusht_kp": {"dp": [0], "dp_ag": [0]}}, "ablation": {}, "methods": {}}
    few["robot"] = s.RobotConfig().model_dump()
    few["methods"]["dp_ag"] = whole["methods"]["dp_ag"]
    full = {**few, "policy": PolicyConfig().model_dump(), "train": TrainConfig().model_dump()}
    where = [p for p in paths_of(full) if p]

    @given(st.lists(st.tuples(st.sampled_from(where), ODD), min_size=1, max_size=2))
    @hypothesis_settings(max_examples=150, deadline=None, derandomize=True, database=None)
    def attempt(changes):
        wrong = copy.deepcopy(full)
        for (*path, last), value in changes:
            node = wrong
            for p in path:
                node = node[p] if isinstance(node, dict) and p in node else {}
            if isinstance(node, dict):
                node[last] = value
        with tried.survived("settings"), contextlib.suppress(SettingsError):
            s.doubts(s.validate(wrong))

    attempt()


def test_a_batch_larger_than_the_data_is_warned_of(dataset):
    from dpag.train import warn_of_few_windows

    with pytest.warns(UserWarning, match=f"batch_size = 5000 of {len(dataset)} windows"):
        warn_of_few_windows(dataset, TrainConfig(batch_size=5000))
