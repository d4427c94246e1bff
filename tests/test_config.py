"""Every profile composes; every wrong setting is refused by name."""
import pytest
import yaml

from dpag import config

PROFILES = ["smoke", "laptop", "workstation", "paper"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("demos", ["scripted", "human"])
def test_profiles_compose(profile, demos):
    s = config.validate(config.compose(profile, demos))
    assert s.run == [f"{profile}-{demos}"]


def test_params_is_the_laptop_profile():
    "What is committed is the default; a hand edit is for experiments."
    assert yaml.safe_load((config.root() / "params.yaml").read_text()) == config.compose("laptop", "scripted")


def test_paper_profile_is_the_papers():
    p = config.validate(config.compose("paper", "human")).policy
    assert (p.net.kind, p.diffusion.prediction, p.action_frame, p.diffusion.n_train_steps, p.diffusion.sampler) == ("unet", "epsilon", "absolute", 100, "ddpm")


CASES = [
    ({"train.learning_rate": 1e-3}, ["train.learning_rate", "Extra inputs"]),
    ({"train.lr": -1.0}, ["train.lr = -1.0", "greater than 0"]),
    ({"train.batch_size": 1}, ["train.batch_size = 1", "greater than or equal to 2"]),
    ({"policy.horizon": 8}, ["policy", "n_action_steps + n_obs_steps - 1 = 9"]),
    ({"policy.action_frame": "polar"}, ["policy.action_frame = 'polar'", "'absolute' or 'relative'"]),
    ({"policy.horizon": 18, "policy.net": {"kind": "unet", "channels": [16, 32, 64], "kernel_size": 5, "n_groups": 8, "step_dim": 16}}, ["horizon = 18", "divisible by 4"]),
    ({"policy.net": {"kind": "unet", "channels": [12], "kernel_size": 5, "n_groups": 8, "step_dim": 16}}, ["[12]", "divisible by net.n_groups = 8"]),
    ({"policy.net.kind": "transformer"}, ["policy.net", "'mlp'"]),
    ({"policy.diffusion.n_sample_steps": 101}, ["n_sample_steps = 101", "at most n_train_steps = 100"]),
    ({"policy.diffusion.target_temperature": 0.4}, ["target_temperature = 0.4", "epsilon"]),
    ({"methods.dp_ag.guidance.vjp": "normalized"}, ["methods.dp_ag.guidance.vjp = 'normalized'", "'unit' or 'raw'"]),
    ({"pusht.demo_seed": 100}, ["pusht.demo_seed = 100", "not tested on states"]),
    ({"pipeline.pusht_kp.methods": {"dp": [0], "dpag": [0]}}, ["pipeline.pusht_kp.methods", "dpag", "'dp', 'dp_ag'"]),
    ({"tasks.pusht_img.methods": {"bet": {"trian": {"lr": 1.0}}}}, ["tasks.pusht_img.methods.bet has ['trian']", "'policy'", "'train'"]),
    ({"tasks.can_ph.methods": {"lstm_gmm": {"min_std": -1.0}}}, ["tasks.can_ph.methods.lstm_gmm.min_std", "-1.0", "greater than 0"]),
    ({"evaluate.acting": {"ada_flow": {"coarse": {"eta": -1}}}}, ["evaluate.acting.ada_flow.coarse.eta", "-1", "greater than 0"]),
    ({"evaluate.acting": {"dp": {"fast": {"etta": 1}}}}, ["evaluate.acting.dp.fast.etta", "not permitted"]),
    ({"evaluate.acting": {"ada_flo": {}}}, ["evaluate.acting names the methods ['ada_flo']", "ada_flow"]),
    ({"tasks.pusht_img.evaluate": {"acting": {"ada_flo": {}}}}, ["tasks.pusht_img.evaluate.acting names the methods ['ada_flo']"]),
    ({"tasks.pusht_img.train": {"lr": -1}}, ["train.lr of any method on pusht_img = -1", "greater than 0"]),
    ({"tasks.pusht_img.policy": {"encoder": {"camera": {"backbone": "vit"}}}}, ["policy.encoder.camera.backbone of any method on pusht_img = 'vit'", "'small' or 'resnet18'"]),
    ({"tasks.pusht_img.learning": {}}, ["tasks.pusht_img.learning", "Extra inputs"]),
    ({"methods.bet.policy": {"horizon": 2}}, ["horizon = 2", "bet on pusht_kp"]),
    ({"methods.bet.kind": "gpt"}, ["methods.bet", "gpt"]),
    ({"ablation.methods": ["ab_nothing"]}, ["ablation.methods", "ab_nothing"]),
    ({"tasks.pusht_img.methods": {"bert": {}}}, ["tasks.pusht_img.methods", "bert"]),
    ({"pusht.ball.speed": [200, 100]}, ["speed", "[lowest, highest]"]),
    ({"kitchen.expert.gain": [2, 1]}, ["kitchen.expert.gain", "[lowest, highest]"]),
    ({"run": ["laptop-human"]}, ["run", "laptop-scripted"]),
]


@pytest.mark.parametrize("changes,words", CASES, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(CASES)])
def test_wrong_settings_are_refused_by_name(changes, words):
    tree = config.compose("laptop", "scripted")
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node = tree
        for p in path: node = node[p]
        node[last] = value
    with pytest.raises(config.SettingsError) as e: config.validate(tree)
    for w in words: assert w in str(e.value)


@pytest.mark.parametrize("profile,demos,word", [("huge", "scripted", "laptop"), ("laptop", "robot", "human")])
def test_unknown_profile_and_source(profile, demos, word):
    with pytest.raises(config.SettingsError, match=word): config.compose(profile, demos)


def test_hand_edits_survive_select(tmp_path, monkeypatch):
    tree = config.compose("laptop", "scripted")
    tree["methods"]["dp_ag"]["guidance"]["gamma"] = 7.5
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "settings.ini").touch()
    (tmp_path / "conf").symlink_to(config.root() / "conf")
    monkeypatch.setattr(config, "root", lambda: tmp_path)
    assert config.select("laptop", "scripted") == [f"methods.dp_ag.guidance.gamma: 7.5 (conf/: {config.compose('laptop', 'scripted')['methods']['dp_ag']['guidance']['gamma']})"]
    assert config.load(tmp_path / "params.yaml").methods["dp_ag"].guidance.gamma == 7.5
    config.select("smoke", "scripted")
    assert config.load(tmp_path / "params.yaml").profile == "smoke"


def test_a_tasks_own_settings_are_merged_and_stay_its_own():
    s = config.validate(config.compose("laptop", "scripted"))
    img = s.for_cell("pusht_img")
    assert img.policy.encoder.features == "raw" and s.policy.encoder.features == "planar" and s.for_cell("pusht_kp").policy == s.policy
    assert img.train.batch_size == 64 and img.train.ema == s.train.ema


def test_a_method_is_laid_over_the_task_and_the_tasks_word_on_it_over_both():
    s = config.validate(config.compose("laptop", "scripted"))
    assert s.for_cell("can_ph", "lstm_gmm").methods["lstm_gmm"].min_std == 0.02 != s.for_cell("pusht_kp", "lstm_gmm").methods["lstm_gmm"].min_std == s.methods["lstm_gmm"].min_std
    bet, on_pictures = s.for_cell("pusht_kp", "bet"), s.for_cell("pusht_img", "bet")
    assert (bet.policy.horizon, bet.policy.n_obs_steps, bet.train.weight_decay) == (3, 3, 0.1) and s.for_cell("pusht_kp", "dp").policy.horizon == 16
    assert on_pictures.train.batch_size == 48 and on_pictures.policy.encoder.features == "raw" and on_pictures.policy.horizon == 3


def test_a_variant_inherits_what_it_does_not_say():
    tree = config.compose("laptop", "scripted")
    cold, full = tree["methods"]["ab_dp_cold"], tree["methods"]["ab_gamma_10"]
    assert cold["policy"]["diffusion"] == {"prediction": "epsilon", "sampler": "ddpm", "n_sample_steps": 100, "target_temperature": 0.4} and cold["kind"] == "dp"
    assert full["guidance"] == {**tree["methods"]["dp_ag"]["guidance"], "gamma": 10.0} and "of" not in full


def test_an_edit_of_the_pipeline_reaches_its_cells(tmp_path, monkeypatch):
    tree = config.compose("laptop", "scripted")
    tree["pipeline"]["pusht_kp"]["methods"]["dp"] = [5]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "settings.ini").touch()
    (tmp_path / "conf").symlink_to(config.root() / "conf")
    monkeypatch.setattr(config, "root", lambda: tmp_path)
    config.select("laptop", "scripted")
    cells = config.load(tmp_path / "params.yaml").cells
    assert "laptop-scripted-pusht_kp-dp-s5" in cells and "laptop-scripted-pusht_kp-dp-s0" not in cells


def test_columns_without_such_demonstrations_are_not_run():
    s = config.validate(config.compose("workstation", "human"))
    assert {c.task for c in s.cells.values()} >= {"pusht_kp", "pusht_img", "can_mh", "kitchen"}
    assert "dynamic_pusht_img" not in {c.task for c in s.cells.values()}
