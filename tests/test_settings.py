"""Every profile is valid; every wrong setting is refused by name; YAML cannot change a value."""

import contextlib
import copy
import math
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dpag import settings as s
from dpag.config import SettingsError, merge
from dpag.files import root
from dpag.policy import METHODS, PolicyConfig
from dpag.tasks.base import TASKS
from dpag.train import TrainConfig

RUNS = [f"{p}-{d}" for p in ("smoke", "laptop", "workstation", "paper") for d in ("scripted", "human")]


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


def test_params_is_committed_as_the_laptop_profile():
    assert s.load().run == "laptop-scripted"


def test_paper_profile_is_the_papers():
    for task in ("pusht_kp", "can_ph"):
        p = s.load("paper-human").cell(task, "dp").policy
        assert (p.net.kind, p.diffusion.prediction, p.action_frame) == ("unet", "epsilon", "absolute")
        assert (p.diffusion.n_train_steps, p.diffusion.sampler) == (100, "ddpm")


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
    *(f"conf/profile/{p}.yaml" for p in ("smoke", "workstation", "paper")),
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
