"""robomimic's scenes and the kitchen: reproducible by seed, both forms of an action, files that are refused, machines without OpenGL."""
import hashlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from dpag.data import Demonstrations
from dpag.rollout import rollout
from dpag.tasks.base import get_task
from dpag.tasks.kitchen.env import Kitchen
from dpag.tasks.robomimic import tasks as robomimic
from dpag.tasks.robomimic.env import SCENES, Robomimic
from dpag.tasks.robomimic.expert import SCRIPTS, run_script
from dpag.tasks.robomimic.files import read_hdf5, write_hdf5


def state_hash(env, seed, steps=200):
    "A hash over every state of `steps` random small actions."
    env.reset(seed=seed)
    rng, h = np.random.default_rng(0), hashlib.sha256()
    for _ in range(steps):
        if isinstance(env, Kitchen): env.step(rng.uniform(-.5, .5, 9))
        else: env.step_delta(rng.uniform(-.5, .5, 7 * env.kind.n_arms))
        h.update(env.data.qpos.tobytes()); h.update(env.data.qvel.tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("make", [*SCENES, "kitchen"])
def test_one_seed_is_one_trajectory(make):
    a, b = (Kitchen() if make == "kitchen" else Robomimic(make) for _ in range(2))
    b.reset(seed=5)                                             # what came before does not matter
    first = state_hash(a, 3)
    assert state_hash(b, 3) == first
    assert state_hash(a, 4, 10) != state_hash(b, 3, 10)


@pytest.mark.parametrize("scene", ["lift", "can", "square"])
def test_what_was_recorded_leads_to_success_in_both_forms(scene, settings):
    s, env = settings.robomimic, Robomimic(scene)
    episode, ok = run_script(env, SCRIPTS[scene], s.operators["proficient"], seed=700001, max_steps=s.patience)
    assert ok
    for step, key in ((env.step, "action"), (env.step_delta, "action_delta")):
        env.reset(seed=700001)
        done = [step(a)[-1]["is_success"] for a in episode[key].astype(np.float32)]
        assert done[-1], f"{scene}: {key} does not replay"


def test_scripted_episodes_do_not_depend_on_the_number_of_workers(settings):
    few = settings.robomimic.model_copy(update={"n_demos": 3})
    one, two = (robomimic.scripted_demonstrations("lift", few, workers=n) for n in (1, 2))
    assert one.data_hash() == two.data_hash() and one.meta == two.meta


@pytest.fixture(scope="module")
def hdf5(tmp_path_factory):
    env = Robomimic("lift")
    from dpag.config import load
    s = load().robomimic
    episode, _ = run_script(env, SCRIPTS["lift"], s.operators["better"], seed=700002, max_steps=s.patience)
    demos = Demonstrations(episode, np.array([len(episode["action"])]), {"operators": {"better": [0]}})
    path = tmp_path_factory.mktemp("hdf5") / "low_dim_v141.hdf5"
    write_hdf5(path, demos, "lift")
    return path, demos


def test_a_round_trip_through_robomimics_file(hdf5):
    path, demos = hdf5
    back = read_hdf5(path, "lift")
    for k in ("object", "gripper_qpos", "hold", "action", "action_delta", "sim_state"): np.testing.assert_allclose(back.arrays[k], demos.arrays[k], atol=1e-6)
    assert back.meta["operators"]["better"] == [0]


@pytest.mark.parametrize("content, said", [(b"", "OSError"), (b"<html>", "signature"), (None, "truncated")])
def test_a_damaged_file_is_refused_by_name(tmp_path, monkeypatch, hdf5, content, said):
    path = tmp_path / "robomimic/lift/ph/low_dim_v141.hdf5"; path.parent.mkdir(parents=True)
    path.write_bytes(hdf5[0].read_bytes()[:20000] if content is None else content)
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(ValueError, match=f"(?s)low_dim_v141.hdf5: not robomimic's low_dim file of lift.*{said}"): robomimic.human_demonstrations("lift", "ph")
    assert path.exists()                                        # a user's own file is not ours to remove


def test_a_file_of_another_scene_is_refused(hdf5):
    with pytest.raises(ValueError, match="of Lift, expected PickPlaceCan"): read_hdf5(hdf5[0], "can")


class Down:
    "Moves every hand down from where it is, a little at random."
    def act(self, obs, generator):
        hold = obs["hold"][:, -1:].expand(-1, 4, -1).clone()
        hold[..., 2] -= 0.01 + 0.01 * torch.rand(hold.shape[:2], generator=generator)
        return hold


def test_waves_in_processes_give_the_same_rows(settings):
    make = get_task("lift_ph", settings).make_env
    kw = dict(seeds=range(3), max_steps=6, n_obs_steps=2, at_once=2)
    one, two = (rollout(Down(), make, workers=n, **kw)[0] for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)


def in_python(code, gl):
    "Run in a process of its own, without a screen; `gl` None leaves MUJOCO_GL unset."
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY")} | ({} if gl is None else {"MUJOCO_GL": gl})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("gl, first", [("disabled", ""), ("", "l.DRAW_ONE = 'raise OSError'"), ("glfw", ""), (None, "import mujoco")])
def test_without_opengl_the_low_dimensional_tasks_run(gl, first):
    "Told so; found out (a probe that fails stands for a machine that has none); told of a kind that does not draw here; asked after MuJoCo chose by itself."
    in_python(f"""
import dpag.libraries as l
{first}
from dpag.config import load
from dpag.tasks.base import get_task
import numpy as np
for name in ("square_ph", "kitchen"):
    task = get_task(name, load()); env = task.make_env(); obs, _ = env.reset(seed=0)
    env.step(obs["hold"] if "hold" in obs else np.zeros(9))
    assert env.render().std() < 60 and env.render().mean() > 150, name
from dpag.tasks.robomimic.env import Robomimic
try: Robomimic("lift", "image"); raise SystemExit("pictures without OpenGL")
except RuntimeError as e: assert "libosmesa6" in str(e)
""", gl)


def test_a_dead_renderer_does_not_take_the_context_away():
    "It is dropped, and garbage becomes due, just after another renderer's context was made current."
    in_python("""
import gc
import dpag.libraries as l
if not l.can_draw(): raise SystemExit(0)
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
class Dead: pass
dead = Dead(); dead.itself, dead.renderer = dead, l.make_renderer(model, 32)
dead.renderer.update_scene(mujoco.MjData(model)); l.draw(dead.renderer)
current = mujoco.gl_context.GLContext.make_current
def make_current(self):
    global dead
    current(self)
    dead = None
    gc.set_threshold(1, 1, 1); due = [[] for _ in range(100)]
mujoco.gl_context.GLContext.make_current = make_current
l.make_renderer(model, 32)
""", None)


@pytest.mark.parametrize("drawn", ["", "raise OSError"])
def test_a_forked_process_does_not_draw_after_its_parent(drawn):
    "It would wait for ever; where the parent could not draw, the child knows that it cannot either."
    in_python(f"""
import os
import dpag.libraries as l
l.DRAW_ONE = {drawn!r}
assert l.can_draw() == {not drawn}
child = os.fork()
if child: raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try: said = str(l.can_draw())
except RuntimeError as e: said = str(e)
os._exit(not ({'forked' if not drawn else 'False'!r} in said))
""", "egl")



def test_a_renderer_that_nobody_closed_leaves_without_a_complaint():
    code = "import dpag.libraries as l\nif l.can_draw():\n    m = l.load_mujoco().MjModel.from_xml_string('<mujoco/>')\n    kept = l.make_renderer(m, 8); kept.update_scene(l.load_mujoco().MjData(m)); l.draw(kept)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
