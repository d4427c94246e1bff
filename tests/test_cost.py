"""What a step takes is counted right, and hours follow from it."""

import pytest
import torch

from dpag import cost
from dpag import settings as s
from dpag.config import layered
from dpag.data import Shapes
from dpag.policy import PolicyConfig


def test_a_stand_in_has_the_tasks_shapes():
    shapes = Shapes(obs={"image": (8, 8, 3), "agent_pos": (2,)}, action_dim=2, action_ref="agent_pos")
    demos = cost.stand_in(shapes)
    assert demos.shapes == shapes and len(demos) == 2
    assert demos.arrays["image"].dtype == "uint8" and demos.arrays["image"].shape == (80, 8, 8, 3)


def test_products_are_counted_and_views_are_not():
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5)
    forward = cost.counted(lambda: (a @ b).t().view(5, 3)[0])
    assert forward == cost.Work(flops=2 * 3 * 4 * 5, calls=1)
    both = cost.counted(lambda: (a @ b).sum().backward())
    assert both.flops == 2 * forward.flops  # only one of the two has a gradient


def small_cell(method: str) -> s.CellSettings:
    cell = s.load("laptop-scripted").cell("pusht_kp", method)
    net = {"kind": "mlp", "width": 32, "depth": 3, "step_dim": 8}
    own = {"net": net, "encoder": {"hidden": [32], "latent_dim": 16}}
    return cell.model_copy(update={"policy": layered(PolicyConfig, cell.policy.model_dump(), own)})


def test_a_step_passes_the_net_forwards_and_backwards():
    cell = small_cell("dp")
    policy, dataset = cost.stand_in_policy(cell)
    weights = sum(p.numel() for p in policy.parameters() if p.ndim == 2)
    flops = cost.training_work(policy, dataset).flops
    assert 0.75 * 6 * weights < flops < 6 * weights  # the first layers have no gradient of their input


def test_acting_takes_as_many_passes_as_denoising_steps():
    cell = small_cell("dp")
    works = []
    for n in (4, 8):
        diffusion = cell.policy.diffusion.model_copy(update={"n_sample_steps": n})
        c = cell.model_copy(update={"policy": cell.policy.model_copy(update={"diffusion": diffusion})})
        works.append(cost.works_of(c).acting)
    assert works[1].flops == 2 * works[0].flops
    assert cost.works_of(small_cell("dp_ag")).acting.flops > works[0].flops


def test_how_often_an_evaluation_acts():
    cell = small_cell("dp")
    few = {"n_episodes": 25, "at_once": 10, "curve": [0.5, 0.75], "curve_episodes": 5}
    e = cell.evaluate.model_copy(update=few)
    acts = (3 + 2) * 38  # waves, and chunks of eight in 300 steps
    assert cost.n_acts(cell.model_copy(update={"evaluate": e})) == (acts, 10)


def test_hours_are_steps_times_the_slower_of_work_and_calls():
    machine = cost.Machine("a", flops_per_second=1e9, seconds_per_call=1e-3)
    assert machine.seconds(cost.Work(2e9, 100), rows=3) == 6
    assert machine.seconds(cost.Work(1e7, 100), rows=3) == 0.1
    cell, work = small_cell("dp"), cost.Work(1e6, 1)
    row = cost.cell_cost(cell, cost.Works(10, work, work), machine, n_seeds=3)
    assert row["ms a step"] == pytest.approx(cell.train.batch_size)
    assert row["training, h"] == pytest.approx(3 * row["steps"] * row["ms a step"] / 3.6e6)


def test_nets_that_are_alike_are_counted_once(monkeypatch):
    asked = []
    works = cost.Works(1, cost.Work(1.0, 1), cost.Work(1.0, 1))
    monkeypatch.setattr(cost, "works_of", lambda cell: asked.append(cell.task_name) or works)
    rows = cost.run_cost(s.load("paper-human"), cost.H100, ("dp", "dp_ag"), {})
    assert len(rows) == 26 and rows.seeds.eq(3).all()
    # Push-T's two kinds of images are of one size; robomimic's arms are one or two, and
    # ToolHang's settings have another crop.
    kinds = ("pusht_kp", "pusht_img", "lift_ph", "transport_ph", "tool_hang_ph", "kitchen")
    assert asked == [task for task in kinds for _ in "ab"]
