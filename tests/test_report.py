"""Statistics, the paper's numbers, rows that belong together, tables, and what is published."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpag import paper
from dpag.ablation import ABLATION, ROWS, pooled_spread, variant
from dpag.config import SettingsError
from dpag.figures import about_figure
from dpag.files import SUMS, read_text, root, seal, write_text
from dpag.paths import Cell, Results, published
from dpag.policy import METHODS
from dpag.report import (
    OTHER,
    PUSHT,
    ROBOMIMIC,
    SPIRALS,
    TABLES,
    UR5,
    check_tables,
    compare,
    headlines,
    long_tables,
    metric_files,
    numbers_hash,
    overview,
    overview_numbers,
    publish,
    spirals_rows,
    training_curves,
    write_figures,
    write_metrics,
    write_published,
    write_tables,
)
from dpag.rows import LATENCY, Measured, agreeing, is_variant, read_rows
from dpag.stats import (
    SeedSpread,
    bootstrap_mean,
    clopper_pearson,
    matrix,
    mean_interval,
    mean_metrics,
    rate_interval,
    smallest_difference,
)
from dpag.tables import Layout, caption, method_color, method_title, task_rows
from dpag.tasks.base import TASKS

INFO = {"profile": "laptop", "demos": "scripted", "data_hash": "aaaaaaaaaaaa", "step": 60, "n_parameters": 9}


def evaluation(results, task, method, seed, score=0.5, run="laptop-scripted", n=4, info=INFO, **columns):
    "Write what an evaluation leaves; the folder."
    folder = results.evaluation(Cell(run, task, method, seed))
    rows = {"state_seed": range(n), "score": score, "success": 0, "steps": 300}
    folder.mkdir(parents=True)
    pd.DataFrame({**rows, "jerk_agent": 1.0, "jerk_action": 1.0, **columns}).to_csv(
        folder / "episodes.csv", index=False
    )
    write_text(folder / "run.json", json.dumps(info))
    return folder


def first(table, results):
    "The first layout of a table, by method."
    return Layout(table, table.views[0], table.long(Measured(results))).frame().set_index("method")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


# Statistics


def test_interval_of_a_certain_score_is_a_point():
    assert bootstrap_mean(np.ones((3, 5)), n_boot=50) == (1, 1, 1)
    low, high = clopper_pearson(7, 10)
    assert low == pytest.approx(0.3475, abs=1e-3) and high == pytest.approx(0.9333, abs=1e-3)


def test_the_bootstrap_draws_what_it_always_drew():
    "The intervals in the committed tables hang on these draws."
    scores = np.arange(12).reshape(3, 4) / 12
    assert bootstrap_mean(scores) == pytest.approx(
        (11 / 24, 0.14583333333333334, 0.7847222222222223), abs=1e-12
    )
    assert bootstrap_mean(scores) == bootstrap_mean(scores.copy())


def test_one_seed_is_of_the_episodes_only():
    scores = np.random.default_rng(0).random((1, 40))
    assert mean_interval(scores) == bootstrap_mean(scores)
    outcomes = (scores > 0.5).astype(float)
    assert rate_interval(outcomes)[1:] == clopper_pearson(int(outcomes.sum()), 40)


def test_the_mean_of_several_seeds_has_students_interval():
    "Without any difference between states it is the t interval of the seeds' means."
    scores = np.array([0.2, 0.4, 0.9])[:, None] + np.zeros((3, 10))
    low, high = stats.t.interval(0.95, 2, 0.5, stats.sem([0.2, 0.4, 0.9]))
    assert mean_interval(scores) == pytest.approx((0.5, low, high))
    assert mean_interval(scores, bounds=(0, 1)) == pytest.approx((0.5, 0, 1))
    spread = SeedSpread(0.01, 30)
    reach = stats.t.ppf(0.975, 30) * np.sqrt(0.01 / 3)
    assert mean_interval(scores, spread=spread)[2] == pytest.approx(0.5 + reach)


def test_seeds_that_agree_make_no_interval_narrower_than_the_episodes():
    states = np.random.default_rng(0).random(30)
    low, high = stats.t.interval(0.95, 29, states.mean(), stats.sem(states))
    assert mean_interval(np.stack([states, states])) == pytest.approx((states.mean(), low, high))


@pytest.mark.parametrize("n_seeds", [2, 3])
def test_intervals_cover_where_seeds_differ(n_seeds):
    "The bootstrap of both axes holds the true mean three times of four here."
    rng, n, found = np.random.default_rng(1), 400, []
    for _ in range(n):
        seeds, states = 0.05 * rng.normal(size=(n_seeds, 1)), 0.1 * rng.normal(size=(1, 200))
        scores = 0.5 + seeds + states + 0.2 * rng.normal(size=(n_seeds, 200))
        outcomes = (seeds + states + 0.2 * rng.normal(size=(n_seeds, 200)) > 0).astype(float)
        found.append(
            [f(x)[1] <= 0.5 <= f(x)[2] for f, x in ((mean_interval, scores), (rate_interval, outcomes))]
        )
    assert (np.mean(found, axis=0) > 0.92).all()


def test_success_of_all_episodes_counts_as_one_seed():
    assert rate_interval(np.ones((3, 20)))[1:] == clopper_pearson(20, 20)
    assert rate_interval(np.zeros((3, 20)))[1:] == clopper_pearson(0, 20)


def test_states_without_a_number_are_left_out():
    scores = np.random.default_rng(0).random((2, 5))
    beside = np.concatenate([scores, np.full((2, 1), np.nan)], axis=1)
    assert mean_interval(beside) == pytest.approx(mean_interval(scores))
    scores[1] = np.nan
    assert mean_interval(scores) == bootstrap_mean(scores[:1])


def test_the_smallest_difference_needs_states_that_differ():
    "With 50 outcomes that are all alike, a difference of 0.14 would be needed."
    smallest = smallest_difference(np.zeros((1, 50)))
    factor = stats.t.ppf([0.975, 0.8], 49).sum()
    assert smallest == pytest.approx(factor * np.sqrt((smallest - smallest**2) / 50))
    graded = 0.3 * np.random.default_rng(0).normal(size=(1, 50))
    assert smallest_difference(graded) == pytest.approx(factor * graded.std(ddof=1) / np.sqrt(50))
    two = smallest_difference(np.concatenate([graded, graded + 0.1]))
    assert two > stats.t.ppf(0.975, 1) * 0.05


def test_metrics_of_one_evaluation_are_numbers_that_json_can_hold():
    found = mean_metrics(pd.DataFrame({"score": [0.5, 1.0], "success": [0, 1]}))
    assert json.loads(json.dumps(found)) == found
    assert found["score"]["low"] <= found["score"]["mean"] <= found["score"]["high"]
    assert set(found) == {"score", "success"} and found["success"]["mean"] == 0.5


# The paper's numbers


def test_the_paper_is_of_registered_tasks_and_methods():
    for table in paper.tables().values():
        if table.name != "spirals":
            assert set(table.tasks) <= set(TASKS.names()) and set(table.methods) <= set(METHODS.names())
    assert sum(len(table.numbers) for table in paper.tables().values()) == 137


@pytest.mark.parametrize(
    "cell,expected",
    [
        (("pusht_kp", "score", "dp_ag"), (0.99, 0.01)),
        (("dynamic_pusht_img", "score", "bet"), (0.58, 1.35)),
        (("transport_mh", "success", "lstm_gmm"), (0.44, None)),
        (("kitchen", "t4", "dp"), (0.99, None)),
        (("ur5_paint_heart", "iou", "dp_ag"), (0.921, 0.034)),
        (("ur5_peg", "seconds", "dp"), None),
        (("pusht_kp", "success", "dp"), None),
        (("pusht_kp", "score", "consistency"), None),
        (("point", "score", "dp"), None),
        (("spirals", "mse", "vjp_flow"), (0.0052, None)),
    ],
)
def test_a_number_of_the_paper_or_none(cell, expected):
    assert paper.number(*cell) == expected


def test_a_spread_that_no_score_can_have_is_marked():
    marked = {key for key, p in paper.tables()["pusht"].numbers.items() if p.mark}
    assert {task for task, _, _ in marked} == {"dynamic_pusht_img"} and len(marked) == 7


@pytest.mark.parametrize(
    "tasks,methods,observations,which",
    [
        (paper.tables()["robomimic"].tasks, ("lstm_gmm", "ibc", "dp"), "images", "best"),
        (paper.tables()["robomimic"].tasks, ("bet",), "state", "best"),
        (("pusht_kp",), ("lstm_gmm", "ibc", "bet", "dp"), "state", "best"),
        (("pusht_img",), ("lstm_gmm", "ibc"), "images", "best"),
        (("kitchen",), ("lstm_gmm", "ibc", "bet", "dp"), "state", "last"),
    ],
)
def test_the_footnotes_say_where_the_papers_numbers_are_from(tasks, methods, observations, which):
    checked = 0
    for (seen, task, metric, method), entry in paper.references().items():
        if seen == observations and task in tasks and method in methods:
            assert paper.number(task, metric, method)[0] == getattr(entry, which), (task, method)
            checked += 1
    assert checked == len(methods) * (4 if "kitchen" in tasks else len(tasks))


def test_the_last_ten_checkpoints_are_not_better_than_the_best():
    both = [entry for entry in paper.references().values() if entry.best is not None]
    assert len(both) == 70 and all(0 <= entry.last <= entry.best <= 1 for entry in both)
    assert {key[1] for key in paper.references()} <= set(TASKS.names())


def test_published_numbers_stand_beside_the_measured_ones(results):
    for method in ("ibc", "dp_ag"):
        evaluation(results, "square_ph", method, 0)
    long = ROBOMIMIC.long(Measured(results))
    details = Layout(ROBOMIMIC, ROBOMIMIC.views[1], long).frame().set_index("method")
    assert details.loc["IBC", "success, published, last ten"] == "0.00"
    assert details.loc["DP-AG", "success, published, best"] == "–"


# The published results


def test_tables_follow_from_the_committed_rows():
    assert check_tables(published()) == []


def test_a_changed_row_is_noticed(tmp_path):
    leave = shutil.ignore_patterns("runs", "notebooks", "figures")
    shutil.copytree(root() / "results", tmp_path / "results", ignore=leave)
    results = Results(tmp_path / "results")
    cells = results.evaluations("episodes.csv")
    path = next(path for cell, path in cells if (cell.run, cell.task) == ("laptop-scripted", "pusht_kp"))
    rows = pd.read_csv(path)
    rows.loc[0, "score"] = 1 - rows.loc[0, "score"]
    rows.to_csv(path, index=False)
    if (path.parent / SUMS).exists():
        seal(path.parent)
    write_text(results.tables / "stale.md", "of a table that is gone")
    write_text(results.folder / "metrics/laptop-scripted/gone-dp.json", "of a task that is gone")
    wrong = "\n".join(check_tables(results))
    assert "pusht.csv differs" in wrong and "pusht_kp-" in wrong and "scores.csv differs" in wrong
    assert "stale.md is made from no rows" in wrong and "gone-dp.json is made from no rows" in wrong
    assert "kitchen" not in wrong


def test_committed_rows_have_the_promised_columns():
    n = 0
    for cell, path in published().evaluations("episodes.csv"):
        rows, run = read_rows(path), json.loads(read_text(path.parent / "run.json"))
        own = [metric.name for metric in TASKS[cell.task].metrics if metric.of is None]
        wanted = ["state_seed", "score", "success", "steps", *own, "jerk_agent", "jerk_action"]
        assert set(rows) - {*LATENCY, "flow_steps"} == set(wanted), path
        steps = {run["step"], *(max(1, round(share * run["step"])) for share in (0.25, 0.5))}
        assert set(pd.read_csv(path.parent / "curve.csv").step) <= steps, path  # none of an earlier run
        wanted = {
            "profile",
            "demos",
            "data_hash",
            "commit",
            "device",
            "n_parameters",
            "step",
            "train_seconds",
        }
        assert wanted <= run.keys() and ("run_hash" in run) != ("settings_hash" in run)
        n += 1
    assert n >= 152


@pytest.mark.parametrize("name", ["index", "13_results"])
def test_the_tables_that_are_shown_follow_from_the_published_ones(name):
    "README and the results notebook keep their tables as outputs; each code cell ends in one."
    namespace, shown = {}, 0
    for c in json.loads(read_text(root() / f"nbs/{name}.ipynb"))["cells"]:
        if c["cell_type"] != "code":
            continue
        *before, last = "".join(c["source"]).splitlines()
        exec("\n".join(before), namespace)
        (out,) = c["outputs"]
        made = eval(last, namespace).data
        assert made == "".join(out["data"]["text/markdown"]), f"a table has changed: run nbs/{name}.ipynb"
        shown += 1
    assert shown


def test_the_overview_shows_every_cell_once_and_the_larger_run(results):
    for run in ("laptop-scripted", "workstation-scripted", "workstation-human"):
        evaluation(results, "pusht_kp", "dp", 0, 0.9, run=run)
    evaluation(results, "pusht_kp", "dp_ag", 0, 0.7)
    evaluation(results, "kitchen", "dp", 0, [0.25, 0.5, 1.0, 1.0])
    write_published(results)
    numbers = overview_numbers(results)
    shown = numbers.groupby(["title", "method"]).profile.apply(list).to_dict()
    assert shown["Push-T kp", "dp"] == ["workstation"] * 2 and shown["Push-T kp", "dp_ag"] == ["laptop"]
    assert numbers.set_index("title").measured["Kitchen: t2"] == 0.75
    assert about_figure(results.overview) == numbers_hash(numbers)


def test_an_overview_of_other_rows_is_noticed(results):
    folder = evaluation(results, "pusht_kp", "dp", 0, 0.9)
    write_published(results)
    assert check_tables(results) == []
    figure = results.overview.read_bytes()
    pd.read_csv(folder / "episodes.csv").assign(score=0.8).to_csv(folder / "episodes.csv", index=False)
    write_published(results)
    drawn = results.overview.read_bytes()
    for damaged in (figure, b"no image"):
        results.overview.write_bytes(damaged)
        assert [Path(w.split()[0]).name for w in check_tables(results)] == ["overview.png"]
    results.overview.unlink()
    assert "or is missing" in check_tables(results)[0]
    write_published(results)
    assert results.overview.read_bytes() == drawn


def test_own_results_are_not_read_as_published_ones(results):
    evaluation(Results(results.folder / "runs"), "pusht_kp", "dp", 0)
    assert Measured(results).evaluations == []


def test_the_published_cells_are_all_averaged():
    "No training seed of the committed results is kept apart."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not [m for m in Measured(published()).names.values() if "other settings" in m]


# Rows that belong together


@pytest.mark.parametrize(
    "other",
    [
        {"step": 2},
        {"data_hash": "bbbbbbbbbbbb"},
        {"n_parameters": 10},
        {"profile": "workstation"},
        {"settings_hash": "2"},
    ],
)
def test_training_seeds_of_other_settings_are_not_averaged(results, other):
    info = {**INFO, "settings_hash": "1"}
    evaluation(results, "pusht_kp", "dp", 0, 0.9, info=info)
    evaluation(results, "pusht_kp", "dp", 7, 0.1, info={**info, **other})
    with pytest.warns(UserWarning) as caught:
        long = PUSHT.long(Measured(results))
    (name,) = other
    assert "s0/run.json" in str(caught[0].message) and "s7/run.json" in str(caught[0].message)
    assert f"{name}: {info[name]} and {other[name]}" in str(caught[0].message)
    score = long[long.metric == "score"].set_index("method")
    assert score.measured.to_dict() == {"dp": 0.9, "dp, other settings (s7)": 0.1}
    assert (score.n_seeds == 1).all()
    shown = Layout(PUSHT, PUSHT.views[0], long).frame().set_index("method")
    assert shown.loc["DP, other settings (s7)", "Push-T kp"].startswith("0.100")
    assert shown.loc["DP", "Push-T kp"].startswith("0.900")


def test_the_majority_keeps_the_cell_and_pairs_with_it(results):
    for seed, steps in ((0, 2), (1, 60), (2, 60)):
        evaluation(results, "pusht_kp", "dp", seed, 0.5, info={**INFO, "step": steps})
        evaluation(results, "pusht_kp", "dp_ag", seed, 0.6)
    with pytest.warns(UserWarning, match="'dp, other settings \\(s0\\)'"):
        long = PUSHT.long(Measured(results)).set_index(["method", "metric"])
    assert long.loc[("dp", "score"), "n_seeds"] == 2
    assert long.loc[("dp_ag", "score_minus_dp"), "measured"] == pytest.approx(0.1)
    assert ("dp, other settings (s0)", "score_minus_dp") not in long.index


def test_the_jerk_of_a_method_is_compared_with_dps_from_the_same_states(results):
    for method, jerk in (("dp", [1.0, 10.0, 100.0, 0.0]), ("dp_ag", [0.5, 5.0, 50.0, 3.0])):
        evaluation(results, "pusht_kp", method, 0, jerk_agent=jerk)
    long = PUSHT.long(Measured(results)).set_index(["method", "metric"])
    found = long.loc[("dp_ag", "jerk_agent_to_dp"), ["measured", "ci_low", "ci_high"]]
    assert found.tolist() == pytest.approx([0.5] * 3), "the episode in which DP did not move is left out"
    assert ("dp", "jerk_agent_to_dp") not in long.index


def test_old_provenance_without_a_settings_hash_is_compared_in_what_it_has():
    old, new = {"step": 60, "run_hash": "1"}, {"step": 60, "settings_hash": "2"}
    assert agreeing({0: old, 1: new}) == [[0, 1]]
    assert agreeing({0: old, 1: {**new, "step": 2}}) == [[0], [1]]
    assert agreeing({0: old, 1: new, 2: {**new, "settings_hash": "3"}}) == [[0, 1], [2]]


def test_seeds_with_other_initial_states_are_kept_apart(results):
    evaluation(results, "pusht_kp", "dp", 0, n=4)
    evaluation(results, "pusht_kp", "dp", 1, n=6)
    with pytest.warns(UserWarning, match="initial_states: 4 from 0 to 3 and 6 from 0 to 5"):
        long = PUSHT.long(Measured(results))
    assert (long.n_seeds == 1).all() and set(long.n_episodes) == {4, 6}


def test_the_ablation_keeps_other_settings_apart_too(results):
    for seed, steps in ((0, 60), (1, 2)):
        evaluation(results, "pusht_kp", "ab_dp", seed, info={**INFO, "step": steps})
        evaluation(results, "pusht_kp", "ab_full", seed)
    folder = results.study("laptop-scripted", "ablation")
    folder.mkdir()
    diagnostics = [{"row": r, "train_seed": s, "drift": s} for r in ("ab_dp", "ab_full") for s in (0, 1)]
    pd.DataFrame(diagnostics).to_csv(folder / "diagnostics.csv", index=False)
    with pytest.warns(UserWarning):
        measured = Measured(results)
        long = ABLATION.long(measured).set_index(["method", "metric"])
    assert long.loc[("ab_full", "score"), "n_seeds"] == 2
    assert long.loc[("ab_full", "score_minus_dp"), "n_seeds"] == 1  # that both have
    assert long.loc[("ab_dp", "drift"), "measured"] == 0 and long.loc[("ab_full", "drift"), "measured"] == 0.5
    assert long.loc[("ab_dp, other settings (s1)", "drift"), "measured"] == 1
    assert not len(PUSHT.long(measured)), "variants have a table of their own"


def test_folders_of_other_names_are_left_out(results):
    folder = evaluation(results, "pusht_kp", "dp", 0, 0.9)
    for name in ("s0.bak", "old", "sTrue", "s01"):
        shutil.copytree(folder, folder.with_name(name))
    with pytest.warns(UserWarning, match="left out"):
        long = PUSHT.long(Measured(results))
    assert long[long.metric == "score"].n_seeds.tolist() == [1]


def test_runs_of_one_profile_are_not_mixed(results):
    evaluation(results, "pusht_kp", "dp", 0, 0.9)
    evaluation(results, "pusht_kp", "dp", 0, 0.1, run="laptop+mine-scripted")
    long = PUSHT.long(Measured(results))
    score = long[long.metric == "score"].set_index("profile").measured
    assert score.to_dict() == {"laptop": 0.9, "laptop+mine": 0.1}


# Tables


def test_cells_that_were_not_run_stay_empty(results):
    for seed in (0, 1):
        evaluation(results, "pusht_kp", "dp", seed)
    table = first(PUSHT, results)
    assert table.loc["DP", "Push-T kp"].startswith("0.500")
    assert table.loc["IBC", "Push-T kp"] == "–" and table.loc["DP", "Push-T img"] == "–"
    assert table.loc["DP", "Dynamic Push-T img, paper"] == "0.65 ± 0.85†"
    with pytest.raises(ValueError, match="same initial states"):
        matrix(Measured(results).episodes.iloc[1:], "score")


def test_other_ways_of_acting_are_rows_of_their_own(results):
    evaluation(results, "pusht_kp", "dp", 0, 0.5)
    evaluation(results, "pusht_kp", "ab_dp", 0, 0.1)
    folder = evaluation(results, "pusht_kp", "ada_flow", 0, 0.7, flow_steps=9.5)
    rows = pd.read_csv(folder / "episodes.csv").assign(acting="coarse", score=0.6, flow_steps=3.0)
    rows.to_csv(folder / "acting.csv", index=False)
    assert first(PUSHT, results).loc["AdaFlow", "Push-T kp"].startswith("0.700")
    long = PUSHT.long(Measured(results))
    details = Layout(PUSHT, PUSHT.views[1], long).frame().set_index("method")
    assert "ab_dp" not in set(long.method) and "AdaFlow, coarse" not in first(PUSHT, results).index
    assert details.loc["AdaFlow, coarse", "score"].startswith("0.600")
    assert details.loc["AdaFlow, coarse", "denoising or flow steps"] == "3.0"
    assert details.loc["AdaFlow", "score − DP, paired"].startswith("0.200")


def test_a_method_and_a_task_that_the_paper_does_not_have_show_up(results):
    for task in ("pusht_kp", "point"):
        evaluation(results, task, "dp", 0, 0.5)
        evaluation(results, task, "consistency", 0, 0.75)
    table = first(PUSHT, results)
    assert table.index[-1] == "consistency" and table.loc["consistency", "Push-T kp, paper"] == "–"
    other = first(OTHER, results)
    assert other.loc["consistency", "task"] == "point" and other.loc["consistency", "score"].startswith(
        "0.750"
    )
    paths = write_tables(long_tables(Measured(results)), results.tables)
    assert results.tables / "other.md" in paths and "consistency" in read_text(results.tables / "pusht.md")
    assert write_figures(results, "laptop-scripted")
    assert "consistency" in overview(results)


def test_an_interval_of_one_seed_is_marked_wherever_it_stands(results):
    for seed in (0, 1):
        evaluation(results, "pusht_kp", "dp", seed, [0.4, 0.5, 0.6, 0.5])
    evaluation(results, "pusht_kp", "dp_ag", 0, [0.5, 0.5, 0.7, 0.5])
    long = PUSHT.long(Measured(results))
    details = Layout(PUSHT, PUSHT.views[1], long).frame().set_index("method")
    assert details.loc["DP-AG", "score"].endswith("]‡") and not details.loc["DP", "score"].endswith("‡")
    assert details.loc["DP-AG", "score − DP, paired"].endswith("]‡")
    assert details.loc["DP-AG", "score − DP, paired, paper"] == "+0.04"
    assert details.loc["DP-AG", "smallest difference to see"] > "0.0"
    assert "‡ One training seed" in caption(PUSHT, long)


def test_the_ablation_pools_the_spread_of_its_seeds():
    "Two seeds of each of three variants that are 0.1, 0.2 and 0 apart."
    cells = [
        pd.DataFrame(
            {"train_seed": [0, 0, 1, 1], "state_seed": [0, 1, 0, 1], "score": [0.5, 0.5, 0.5 + d, 0.5 + d]}
        )
        for d in (0.1, 0.2, 0.0)
    ]
    found = pooled_spread([*cells, cells[0][:2]])
    assert found.df == 3 and found.variance == pytest.approx((0.005 + 0.02) / 3)
    assert pooled_spread([cells[0][:2]]) is None


def test_what_is_not_registered_keeps_its_name():
    assert method_title("gone/slow") == "gone, slow" and method_color("gone")
    assert method_title("dp_ag") == "DP-AG" and method_color("dp_ag") == METHODS["dp_ag"].color


def test_a_table_of_tasks_without_such_is_not_written(results):
    evaluation(results, "pusht_kp", "dp", 0)
    names = {path.stem for path in write_tables(long_tables(Measured(results)), results.tables)}
    assert names == {name for name, table in TABLES.items() if not table.optional}
    assert read_text(results.tables / "kitchen.md").startswith("Nothing was run.")


def test_each_metric_of_a_task_is_shown_as_the_task_says(results):
    evaluation(results, "kitchen", "dp", 0, [0.25, 0.5, 1.0, 1.0])
    long = TABLES["kitchen"].long(Measured(results)).set_index("metric")
    assert long.measured[["t1", "t2", "t3", "t4"]].tolist() == [1, 0.75, 0.5, 0.5]
    arm = {"jerk": 0.03, "jerk_measured": 0.02, "jerk_si": 3.0, "seconds": [np.nan, np.nan, 9.0, 11.0]}
    evaluation(results, "ur5_paint_heart", "dp", 0, iou=[0.2, 0.7, 0.8, 0.9], **arm)
    evaluation(results, "ur5_peg", "dp", 0, **arm)
    frame = Layout(UR5, UR5.views[0], UR5.long(Measured(results))).frame()
    heart, peg = (
        frame[(frame.method == "DP") & frame.task.str.contains(n)].iloc[0] for n in ("heart", "peg")
    )
    assert (heart["IoU"], heart["IoU, paper"], heart["time, s"]) == ("0.650", "0.689 ± 0.052", "10.0")
    assert (peg["IoU"], peg["IoU, paper"], peg["time, s, paper"]) == ("", "", "–")


def test_success_is_the_difference_that_robomimic_prints(results):
    for method, score in (("dp", 0.0), ("dp_ag", 1.0)):
        evaluation(results, "square_mh", method, 0, score)
    long = ROBOMIMIC.long(Measured(results))
    assert long[long.metric == "score_minus_dp"].paper.tolist() == [0.02]


def test_no_code_of_the_report_names_a_task_where_it_computes():
    "Tasks are named where tables are described, and nowhere else."
    for module in ("rows", "stats", "tables", "plots", "figures"):
        code = read_text(root() / f"dpag/{module}.py")
        assert not [name for name in TASKS.names() if f'"{name}"' in code], module


def test_every_row_of_the_ablation_has_a_title():
    assert all(is_variant(name) for name in ROWS)
    assert variant("ab_new/static") == ("other", "ab_new/static")


def test_a_smoke_table_says_that_it_means_nothing(results):
    evaluation(results, "pusht_kp", "dp", 0, run="smoke-scripted", info={**INFO, "profile": "smoke"})
    text = caption(PUSHT, PUSHT.long(Measured(results)))
    assert "Smoke" in text and "1 training seed, 4 fresh episodes each" in text


def test_an_empty_tree_gives_empty_tables(results):
    write_published(results)
    assert check_tables(results) == []
    assert spirals_rows(Measured(results).spirals).empty and read_text(results.tables / "spirals.md")
    assert Layout(SPIRALS, SPIRALS.views[0], spirals_rows(Measured(results).spirals)).frame().empty


# Latency


def test_latency_has_a_file_of_its_own_and_old_rows_keep_theirs(results):
    folder = evaluation(results, "pusht_kp", "dp", 0)
    beside = {"acting": "", "state_seed": range(4), "act_ms_p50": 3.0, "act_ms_p99": 5.0}
    pd.DataFrame(beside).to_csv(folder / "latency.csv", index=False)
    old = evaluation(results, "pusht_kp", "dp_ag", 0, act_ms_p50=7.0, act_ms_p99=9.0)
    renamed = pd.read_csv(old / "episodes.csv").rename(columns={"state_seed": "seed"})
    renamed.to_csv(old / "episodes.csv", index=False)
    long = PUSHT.long(Measured(results)).set_index(["method", "metric"]).measured
    assert (
        long["dp", "act_ms_p50"] == 3 and long["dp", "act_ms_p99"] == 5 and long["dp_ag", "act_ms_p50"] == 7
    )
    (folder / "latency.csv").unlink()
    assert ("dp", "act_ms_p50") not in PUSHT.long(Measured(results)).set_index(["method", "metric"]).index


# Metrics and plots


def test_metrics_and_plots_are_small_files(results):
    for method, score in (("dp", 0.5), ("dp_ag", [0.25, 0.5, 0.75, 1.0])):
        evaluation(results, "pusht_kp", method, 0, score)
    log = results.training(Cell("laptop-scripted", "pusht_kp", "dp", 0)) / "log.csv"
    log.parent.mkdir(parents=True)
    rows = pd.DataFrame({"step": range(1000), "lr": 1.0, "loss": 0.5})
    rows.assign(val_loss=rows.loss.where(rows.step % 100 == 99)).to_csv(log, index=False)
    measured = Measured(results)
    longs = long_tables(measured)
    paths = write_metrics(longs, results.folder, training_curves(measured))
    names = {str(path.relative_to(results.folder)) for path in paths}
    assert {"metrics/laptop-scripted/pusht_kp-dp.json", "plots/scores.csv", "plots/training.csv"} <= names
    assert sum(path.stat().st_size for path in paths) < 10_000
    score = json.loads(read_text(results.folder / "metrics/laptop-scripted/pusht_kp-dp_ag.json"))["score"]
    assert score["mean"] == 0.625 and score["low"] < 0.625 < score["high"]
    training = pd.read_csv(results.folder / "plots/training.csv")
    assert list(training) == ["run", "cell", "windows", "step", "loss"]
    curves = training.groupby("windows").step.agg(["count", "max"])
    assert curves.loc["learned from"].tolist() == [60, 999] and curves.loc["set aside"].tolist() == [10, 999]
    assert metric_files(headlines(longs["kitchen"])) == {}


def test_a_training_that_set_episodes_aside_has_a_file_of_metrics(results):
    "Of its own, from run.json; published rows have it without a log, and it is checked like the others."
    kept = {"set_aside": [3], "val_loss": 0.0301234567, "least_val_loss": 0.02, "least_step": 800}
    evaluation(results, "pusht_kp", "dp", 0, info={**INFO, "validation": kept})
    evaluation(results, "pusht_kp", "dp", 1)
    write_published(results)
    assert check_tables(results) == []
    (path,) = (results.folder / "metrics/laptop-scripted").glob("*-s*.json")
    assert path.name == "pusht_kp-dp-s0.json"
    assert json.loads(read_text(path)) == {"val_loss": {"last": 0.0301235, "least": 0.02, "step": 800}}
    path.unlink()
    assert check_tables(results) == [f"{path} is missing"]


# Own and published


def test_publishing_copies_one_run_and_makes_the_rest_anew(results, tmp_path):
    target = Results(tmp_path / "published")
    evaluation(target, "pusht_kp", "dp", 3, 0.2)  # published before
    for seed in (0, 3):
        (evaluation(results, "pusht_kp", "dp", seed, 0.9) / ".hidden.tmp").touch()
    evaluation(results, "pusht_kp", "dp", 0, 0.1, run="smoke-scripted")
    study = results.study("laptop-scripted", "continuity")
    study.mkdir()
    write_text(study / "bounds.csv", "method\ndp\n")
    paths = publish("laptop-scripted", results, target)
    assert target.tables / "pusht.csv" in paths and check_tables(target) == []
    assert read_text(target.study("laptop-scripted", "continuity") / "bounds.csv") == "method\ndp\n"
    assert (target.figures("laptop-scripted") / "score_distribution_pusht_kp.png").exists()
    assert not (target.folder / "eval/smoke-scripted").exists()
    assert not list(target.folder.rglob(".hidden*"))
    table = pd.read_csv(target.tables / "pusht.csv").set_index("metric")
    assert table.measured["score"] == 0.9 and table.n_seeds["score"] == 2


def test_only_a_finished_run_is_published(results, tmp_path):
    target = Results(tmp_path / "published")
    (evaluation(results, "pusht_kp", "dp", 0) / "run.json").unlink()
    with pytest.raises(SettingsError, match="laptop-scripted is not finished: pusht_kp-dp-s0"):
        publish("laptop-scripted", results, target)
    with pytest.raises(SettingsError, match="run = 'paper-human': .* has laptop-scripted"):
        publish("paper-human", results, target)
    assert not target.folder.exists()


def test_own_results_are_compared_with_the_published_ones(results, tmp_path):
    reference = Results(tmp_path / "published")
    for tree, milliseconds in ((results, 3.0), (reference, 8.0)):
        evaluation(tree, "pusht_kp", "dp", 0, 0.5, act_ms_p50=milliseconds)
        evaluation(tree, "pusht_kp", "dp", 1, 0.5 if tree is results else 0.25)
    old = reference.evaluation(Cell("laptop-scripted", "pusht_kp", "dp", 0)) / "episodes.csv"
    pd.read_csv(old).rename(columns={"state_seed": "seed"}).assign(flow_steps=np.nan).to_csv(old, index=False)
    evaluation(results, "pusht_kp", "dp_ag", 0)
    found = compare(results, reference)
    assert found.found.tolist() == ["equal", "differs", "new"]
    assert found.difference.round(9).tolist()[:2] == [0, 0.25] and np.isnan(found.difference[2])


def test_a_report_of_own_results_leaves_the_published_ones_alone():
    "The notebook that the pipeline runs writes into the own tree only."
    book = json.loads(read_text(root() / "nbs/experiments/e09_report.ipynb"))
    code = "\n".join("".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code")
    assert (
        "results, run = own()," in code
        and code.count("published()") == 1
        and "compare(results, published())" in code
    )


def test_publishing_an_unknown_run_by_command_is_a_sentence(capsys):
    from dpag.report import main

    with pytest.raises(SettingsError, match="run = 'typo'"):
        main(["--publish", "typo"])


def test_task_rows_of_nothing_are_empty():
    assert task_rows(pd.DataFrame(columns=["task", "method", "profile", "demos"]), ["pusht_kp"]).empty
    assert isinstance(published().folder, Path)
