"""robomimic's scenes and the kitchen: settings, reproducible by seed, both forms of an action, files that are
refused, machines without OpenGL."""

import gc
import hashlib
import os
import subprocess
import sys
import weakref

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from dpag.config import SettingsError, changed
from dpag.data import Demonstrations
from dpag.libraries import can_draw
from dpag.policy import Policy
from dpag.rollouts import Protocol, rollout
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.kitchen.env import REACH, KitchenEnv
from dpag.tasks.kitchen.task import KitchenConfig
from dpag.tasks.robomimic.control import advance
from dpag.tasks.robomimic.env import SCENES, RobomimicEnv
from dpag.tasks.robomimic.expert import SCRIPTS, run_script
from dpag.tasks.robomimic.files import N_HUMAN, episode_images, human_demonstrations, read_hdf5, write_hdf5
from dpag.tasks.robomimic.task import OPERATORS, OperatorConfig, RobomimicConfig, scripted_demonstrations

MIXED = ["better", "okay", "worse"]
# Title, max_steps, n_demos, crew, crop: the settings with which the committed results were made; Transport mh
# had 700 steps.
DEFAULTS = {
    "lift_ph": ("Lift ph", 400, 200, ["proficient"], 76),
    "lift_mh": ("Lift mh", 500, 300, MIXED, 76),
    "can_ph": ("Can ph", 400, 200, ["proficient"], 76),
    "can_mh": ("Can mh", 500, 300, MIXED, 76),
    "square_ph": ("Square ph", 400, 200, ["proficient"], 76),
    "square_mh": ("Square mh", 500, 300, MIXED, 76),
    "transport_ph": ("Transport ph", 700, 200, ["proficient"], 76),
    "transport_mh": ("Transport mh", 1100, 300, MIXED, 76),
    "tool_hang_ph": ("ToolHang ph", 700, 200, ["proficient"], 216),
}


def in_python(code: str, gl: str | None = None) -> str:
    """What `code` prints in a process of its own, without a screen; `gl` None leaves MUJOCO_GL unset."""
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY")}
    env |= {} if gl is None else {"MUJOCO_GL": gl}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_nine_tasks_have_the_settings_of_the_committed_results(name):
    title, max_steps, n_demos, crew, crop = DEFAULTS[name]
    entry, config = TASKS[name], TASKS[name].configure()
    assert (entry.title, entry.sources, entry.length_unit) == (title, ("scripted", "human"), "m")
    assert config == RobomimicConfig(
        max_steps=max_steps,
        n_demos=n_demos,
        demo_seed=100_000,
        crew=crew,
        observation="object",
        patience=max(1000, max_steps),
        policy={
            "encoder": {"features": "raw", "camera": {"crop": crop}},
            "diffusion": {"prediction": "sample"},
        },
        evaluate={"at_once": 10, "n_films": 1},
        methods={"lstm_gmm": {"min_std": 0.1}},
    )
    assert config.operators == {
        "proficient": OperatorConfig(speed=(0.009, 0.0125), noise=0.02, via=0, pause=0, retry=0),
        "better": OperatorConfig(speed=(0.009, 0.014), noise=0.05, via=0.01, pause=0, retry=0),
        "okay": OperatorConfig(speed=(0.006, 0.010), noise=0.1, via=0.03, pause=0.15, retry=0.1),
        "worse": OperatorConfig(speed=(0.004, 0.008), noise=0.2, via=0.05, pause=0.3, retry=0.35),
    }


def test_the_kitchen_has_the_settings_of_the_committed_results():
    entry, config = TASKS["kitchen"], TASKS["kitchen"].configure()
    assert (entry.title, entry.sources, entry.length_unit) == ("Kitchen", ("scripted", "human"), "m")
    assert config == KitchenConfig(
        max_steps=500,
        n_demos=150,
        demo_seed=100_000,
        expert={"speed": [0.03, 0.045], "gain": [1.4, 1.8], "noise": 0.05},
        policy={"encoder": {"features": "raw"}, "diffusion": {"prediction": "sample"}},
        evaluate={"n_films": 1},
    )


def test_the_kitchens_metrics_count_sub_tasks():
    rows = pd.DataFrame({"score": [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]})
    metrics = TASKS["kitchen"].metrics
    assert [(m.name, m.rate) for m in metrics] == [(f"t{k}", True) for k in (1, 2, 3, 4)]
    assert [int(m.of(rows).sum()) for m in metrics] == [5, 4, 3, 2]


def test_settings_change_one_operator_and_refuse_an_unknown_one():
    config = TASKS["can_mh"].configure({"operators": {"okay": {"noise": 0.0}}})
    assert config.operators["okay"] == OPERATORS["okay"].model_copy(update={"noise": 0.0})
    assert config.operators["worse"] == OPERATORS["worse"]
    with pytest.raises(SettingsError, match=r"tasks.can_mh: crew has \['best'\]; allowed are"):
        TASKS["can_mh"].configure({"crew": ["okay", "best"]})
    with pytest.raises(SettingsError, match="retry = 2.0"):
        TASKS["can_mh"].configure({"operators": {"okay": {"retry": 2.0}}})


@pytest.mark.parametrize("folder", ["robomimic", "kitchen"])
def test_a_task_is_registered_without_its_simulator(folder):
    "Importing the module brings nothing but this package beyond what the tasks' contract brings."
    code = f"""
import sys, dpag.tasks.base
before = set(sys.modules)
import dpag.tasks.{folder}.task
new = {{m.split(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(sorted(new), "mujoco" in sys.modules, "gymnasium" in sys.modules)
"""
    assert in_python(code) == "['dpag'] False False\n"


def test_shapes_are_those_of_the_environments():
    for name in DEFAULTS:
        for observation in ("object", "image") if name == "tool_hang_ph" else ("object",):
            task = get_task(name, TASKS[name].configure({"observation": observation}))
            spec = SCENES[name.rsplit("_", 1)[0]]
            assert task.shapes.action_dim == 10 * spec.n_arms
            images = [k for k, s in task.shapes.obs.items() if len(s) == 3]
            assert images == ([] if observation == "object" else list(spec.cameras))
    env = get_task("transport_ph").make_env()
    obs, _ = env.reset(seed=0)
    assert {k: v.shape for k, v in obs.items()} == get_task("transport_ph").shapes.obs


def state_hash(env, seed, steps=200):
    "A hash over every state of `steps` random small actions."
    env.reset(seed=seed)
    rng, h = np.random.default_rng(0), hashlib.sha256()
    for _ in range(steps):
        if isinstance(env, KitchenEnv):
            env.step(rng.uniform(-0.5, 0.5, 9))
        else:
            env.step_delta(rng.uniform(-0.5, 0.5, 7 * env.n_arms))
        h.update(env.data.qpos.tobytes())
        h.update(env.data.qvel.tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("make", [*SCENES, "kitchen"])
def test_one_seed_is_one_trajectory(make):
    a, b = (KitchenEnv() if make == "kitchen" else RobomimicEnv(make) for _ in range(2))
    b.reset(seed=5)  # what came before does not matter
    first = state_hash(a, 3)
    assert state_hash(b, 3) == first
    assert state_hash(a, 4, 10) != state_hash(b, 3, 10)


def robosuite_step(env, action, delta):
    "robosuite's own step, which asks for every position twice."
    for robot in env.sim_env.robots:
        robot.controller.use_delta = delta
    env.sim_env.step(action)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("scene", ["lift", "can", "square", "transport"])
def test_the_control_is_robosuites_to_the_bit(scene, delta):
    ours, theirs, rng = RobomimicEnv(scene), RobomimicEnv(scene), np.random.default_rng(0)
    for env in (ours, theirs):
        env.reset(seed=3)
    for i in range(200):
        action = rng.uniform(-1, 1, (ours.n_arms, 7)) * rng.uniform(0, 1.2)
        if not delta:  # a pose near the hand, kept for ten steps
            poses = [ours.hand(arm) for arm in range(ours.n_arms)]
            place = np.array([[*pos, *Rotation.from_matrix(R).as_rotvec(), 0] for pos, R in poses])
            held = place + 0.2 * action if i % 10 == 0 else held
            action = held
        advance(ours.sim_env, ours.arms, action.ravel(), delta=delta)
        robosuite_step(theirs, action.ravel(), delta)
        for name in ("qpos", "qvel", "ctrl"):
            assert np.array_equal(getattr(ours.data, name), getattr(theirs.data, name)), (i, name)
    assert np.array_equal(ours.goal, theirs.goal)


def test_a_reset_gives_the_models_memory_back():
    env = RobomimicEnv("lift")
    env.reset(seed=0)
    old = [weakref.ref(env.model), weakref.ref(env.data)]
    gc.disable()  # nothing may wait for the collection of garbage
    try:
        env.reset(seed=1)
        assert [r() for r in old] == [None, None]
    finally:
        gc.enable()


def test_a_kitchen_target_is_approached_as_fast_as_it_can_be():
    env, ends = KitchenEnv(), []
    for far in (1.0, 2.0):
        env.reset(seed=1)
        env.step(env.joints + far * REACH)
        ends.append(env.data.qpos.copy())
    assert np.array_equal(*ends)


@pytest.mark.parametrize("scene", ["lift", "can", "square"])
def test_what_was_recorded_leads_to_success_in_both_forms(scene):
    env = RobomimicEnv(scene)
    episode, ok = run_script(env, SCRIPTS[scene], OPERATORS["proficient"], seed=700001, max_steps=1000)
    assert ok
    for step, key in ((env.step, "action"), (env.step_delta, "action_delta")):
        env.reset(seed=700001)
        done = [step(a)[-1]["is_success"] for a in episode[key].astype(np.float32)]
        assert done[-1], f"{scene}: {key} does not replay"


def test_scripted_episodes_do_not_depend_on_the_number_of_workers():
    few = RobomimicConfig(n_demos=3)
    one, two = (scripted_demonstrations("lift", few, workers=n) for n in (1, 2))
    assert one.data_hash() == two.data_hash() and one.meta == two.meta


def test_an_interrupted_generation_goes_on(tmp_path):
    task = get_task("lift_ph", RobomimicConfig(n_demos=2))
    first = task.demonstrations("scripted", parts=tmp_path)
    kept = sorted(tmp_path.rglob("*.npz"))
    made = {p: p.stat().st_mtime_ns for p in kept}
    kept[0].unlink()
    again = task.demonstrations("scripted", parts=tmp_path)
    assert again.data_hash() == first.data_hash()
    assert [p.stat().st_mtime_ns != t for p, t in made.items()] == [True, False]


@pytest.fixture(scope="module")
def hdf5(tmp_path_factory):
    episode, _ = run_script(
        RobomimicEnv("lift"), SCRIPTS["lift"], OPERATORS["better"], seed=700002, max_steps=1000
    )
    demos = Demonstrations(episode, np.array([len(episode["action"])]), {"operators": {"better": [0]}})
    path = tmp_path_factory.mktemp("hdf5") / "low_dim_v141.hdf5"
    write_hdf5(path, demos, "lift")
    return path, demos


def test_a_round_trip_through_robomimics_file(hdf5):
    path, demos = hdf5
    back = read_hdf5(path, "lift")
    for k in ("object", "gripper_qpos", "hold", "action", "action_delta", "sim_state"):
        np.testing.assert_allclose(back.arrays[k], demos.arrays[k], atol=1e-6)
    assert back.meta["operators"]["better"] == [0]


@pytest.mark.parametrize("content, said", [(b"", "OSError"), (b"<html>", "signature"), (None, "truncated")])
def test_a_damaged_file_is_refused_by_name(tmp_path, monkeypatch, hdf5, content, said):
    path = tmp_path / "robomimic/lift/ph/low_dim_v141.hdf5"
    path.parent.mkdir(parents=True)
    path.write_bytes(hdf5[0].read_bytes()[:20000] if content is None else content)
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"(?s)low_dim_v141.hdf5: not robomimic's low_dim file of lift.*{said}"
    ):
        get_task("lift_ph").demonstrations("human")
    assert path.exists()  # a user's own file is not ours to remove


def test_a_damaged_download_is_removed(tmp_path, monkeypatch):
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    path = tmp_path / "robomimic/lift/ph/low_dim_v141.hdf5"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>")
    monkeypatch.setattr("dpag.tasks.robomimic.files.fetch", lambda name, url, folder: folder / name)
    with pytest.raises(ValueError, match="not robomimic's"):
        human_demonstrations("lift", "ph", tmp_path)
    assert not path.exists()


def test_a_file_of_another_scene_is_refused(hdf5):
    with pytest.raises(ValueError, match="of Lift, expected PickPlaceCan"):
        read_hdf5(hdf5[0], "can")


def test_images_are_drawn_from_the_states_and_models_of_robomimics_file(tmp_path, monkeypatch, hdf5):
    if not can_draw():
        pytest.skip("needs OpenGL")
    (path := tmp_path / "robomimic/lift/ph/low_dim_v141.hdf5").parent.mkdir(parents=True)
    path.write_bytes(hdf5[0].read_bytes())
    env = RobomimicEnv("lift", "image")
    env.reset(seed=700002)
    first = env.images
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    monkeypatch.setitem(N_HUMAN, "ph", 1)
    task = get_task("lift_ph", changed(TASKS["lift_ph"].configure(), {"observation": "image"}))
    with pytest.raises(ValueError, match="demo_0 has no model_file"):
        task.demonstrations("human")
    with h5py.File(path, "a") as f:
        f["data/demo_0"].attrs["model_file"] = env.sim_env.sim.model.get_xml()
    demos = task.demonstrations("human")
    n = len(hdf5[1].arrays["action"])
    assert {k: demos.arrays[k].shape for k in task.shapes.obs} == {
        k: (n, *shape) for k, shape in task.shapes.obs.items()
    }
    for camera, image in first.items():
        drawn = demos.arrays[camera].astype(int)
        assert np.abs(drawn[0] - image).mean() < 1 < np.abs(drawn[-1] - image).mean()
    assert "object" not in demos.arrays
    with pytest.raises(ValueError, match="a state has 5 numbers"):
        episode_images(env.sim_env.sim.model.get_xml(), np.zeros((1, 5)), "lift")


class Down(Policy):
    "Moves every hand down from where it is, a little at random."

    def act(self, obs, generator):
        hold = obs["hold"][:, -1:].expand(-1, 4, -1).clone()
        hold[..., 2] -= 0.01 + 0.01 * torch.rand(hold.shape[:2], generator=generator)
        return hold


def test_waves_in_processes_give_the_same_rows():
    make_env, protocol = get_task("lift_ph").make_env, Protocol(max_steps=6, n_obs_steps=2)
    one, two = (rollout(Down(), make_env, range(3), protocol, at_once=2, workers=n)[0] for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize(
    "gl, first",
    [("disabled", ""), ("", "l.DRAW_ONE = 'raise OSError'"), ("glfw", ""), (None, "import mujoco")],
)
def test_without_opengl_the_low_dimensional_tasks_run(gl, first):
    """Told so; found out (a probe that fails stands for a machine that has none); told of a kind that
    does not draw here; asked after MuJoCo chose by itself."""
    in_python(
        f"""
import dpag.libraries as l
{first}
from dpag.tasks.base import get_task
import numpy as np

for name in ("square_ph", "kitchen"):
    env = get_task(name).make_env()
    obs, _ = env.reset(seed=0)
    env.step(obs["hold"] if "hold" in obs else np.zeros(9))
    assert env.render().std() < 60 and env.render().mean() > 150, name
from dpag.tasks.robomimic.env import RobomimicEnv
try:
    RobomimicEnv("lift", "image")
    raise SystemExit("images without OpenGL")
except RuntimeError as e:
    assert "libosmesa6" in str(e)
""",
        gl,
    )


def test_a_dead_renderer_does_not_take_the_context_away():
    "It is dropped, and garbage becomes due, just after another renderer's context was made current."
    in_python(
        """
import gc
import dpag.libraries as l

if not l.can_draw():
    raise SystemExit(0)
import mujoco

model = mujoco.MjModel.from_xml_string("<mujoco/>")


class Dead:
    pass


dead = Dead()
dead.itself, dead.renderer = dead, l.make_renderer(model, 32)
dead.renderer.update_scene(mujoco.MjData(model))
l.draw(dead.renderer)
current = mujoco.gl_context.GLContext.make_current


def make_current(self):
    global dead
    current(self)
    dead = None
    gc.set_threshold(1, 1, 1)
    due = [[] for _ in range(100)]


mujoco.gl_context.GLContext.make_current = make_current
l.make_renderer(model, 32)
"""
    )


@pytest.mark.parametrize("drawn", ["", "raise OSError"])
def test_a_forked_process_does_not_draw_after_its_parent(drawn):
    "It would wait for ever; where the parent could not draw, the child knows that it cannot either."
    in_python(
        f"""
import os
import dpag.libraries as l

l.DRAW_ONE = {drawn!r}
assert l.can_draw() == {not drawn}
child = os.fork()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    said = str(l.can_draw())
except RuntimeError as e:
    said = str(e)
os._exit(not ({"forked" if not drawn else "False"!r} in said))
""",
        "egl",
    )


def test_a_renderer_that_nobody_closed_leaves_without_a_complaint():
    code = """
import dpag.libraries as l

if l.can_draw():
    mujoco = l.load_mujoco()
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    kept = l.make_renderer(model, 8)
    kept.update_scene(mujoco.MjData(model))
    l.draw(kept)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
