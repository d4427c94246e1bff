"""What the README and 13_results say in numbers follows from the committed rows."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from dpag.files import read_text, root, write_text
from dpag.paths import Cell, Results, published
from dpag.rows import Measured
from dpag.verdicts import NOT_HERE, REFUTED, REPRODUCED, UNTESTED, claims, gains_table, rows_of_spirals

sys.path.append(str(root() / "tools"))

from claims import CLAIMS, TEXTS, Check, Rows, Value, read_texts, write_texts

TEXT = (
    "DP has 0.90 and 1,000 steps. DP-AG − DP is 0.050 [0.010, 0.090], with two seeds; [13_results](a2.md), "
    "`x 7`."
)
FILE = {
    "let": {"dp_score": "of(laptop, pusht_kp, dp)"},
    "claims": [
        "DP has {dp_score:.2f} and",
        {
            "text": "DP-AG − DP is {diff(laptop, pusht_kp):i}",
            "holds": "not diff(laptop, pusht_kp).holds_zero",
        },
        "with {word(n(laptop, pusht_kp, dp))} seeds",
    ],
    "given": {"params.yaml": ["1,000 steps"]},
}


@pytest.fixture
def results(tmp_path):
    "A tree with the long table of two methods."
    columns = ["task", "method", "metric", "measured", "ci_low", "ci_high", "n_episodes", "n_seeds"]
    rows = [
        ("pusht_kp", "dp", "score", 0.9, 0.8, 1.0, 50, 2),
        ("pusht_kp", "dp_ag", "score_minus_dp", 0.05, 0.01, 0.09, 50, 2),
    ]
    path = Results(tmp_path).tables / "pusht.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows, columns=columns).assign(profile="laptop", demos="scripted").to_csv(path, index=False)
    return Results(tmp_path)


def findings(results, text=TEXT, file=FILE):
    "What is wrong with a text, by kind."
    check = Check({"a.ipynb, 1": text}, Rows(results).names, file)
    return {f.kind: f for f in check.findings}, check.texts["a.ipynb, 1"]


def test_every_number_in_the_sentences_follows_from_the_rows():
    check = Check(read_texts(), Rows(published()).names, yaml.safe_load(read_text(CLAIMS)))
    assert not check.findings, "python tools/claims.py --write\n" + "\n".join(map(str, check.findings))
    assert len(check.present) > 100


def test_the_texts_are_the_results_part_of_the_readme_and_all_of_13_results():
    texts = read_texts()
    assert {where.split(",")[0] for where in texts} == set(TEXTS)
    assert any("**Summary.**" in text for text in texts.values())
    assert not any("## What you need" in t or "## One experiment" in t for t in texts.values())


def test_a_text_that_follows_is_left_as_it_is(results):
    assert findings(results) == ({}, TEXT)


@pytest.mark.parametrize("number,other", [("0.90", "0.9"), ("0.010", "0.011"), ("two seeds", "three seeds")])
def test_a_number_that_rows_do_not_give_is_stale_and_mended(results, number, other):
    wrong, mended = findings(results, TEXT.replace(number, other))
    assert set(wrong) == {"stale"} and other in wrong["stale"].what and mended == TEXT


def test_a_changed_row_makes_the_sentence_stale_and_no_longer_true(results):
    path = results.tables / "pusht.csv"
    rows = pd.read_csv(path)
    rows.loc[1, "ci_low"] = -0.02
    rows.to_csv(path, index=False)
    wrong, mended = findings(results)
    assert set(wrong) == {"stale", "no longer true"} and "0.050 [-0.020, 0.090]" in mended


@pytest.mark.parametrize("more", ["It is 0.3 higher.", "All seven do.", "From 2,000 on.", "At 90 % of it."])
def test_a_number_without_claim_or_source_is_named_with_its_sentence(results, more):
    wrong, _ = findings(results, f"{TEXT} {more} And so on.")
    (only,) = wrong
    assert only == "neither claimed nor given" and f"in {more!r}" in wrong[only].what


@pytest.mark.parametrize("word", ["13_results", "version 0.3.0", "UR5", "t1 … t4", "`seed 7`", "[a](b3.md)"])
def test_numbers_in_names_links_and_code_say_nothing(results, word):
    assert findings(results, f"{TEXT} {word}")[0] == {}


def test_a_sentence_that_was_rewritten_has_to_be_claimed_anew(results):
    wrong, _ = findings(results, TEXT.replace("DP has", "The score of DP is"))
    assert set(wrong) == {"in no text", "neither claimed nor given"}
    assert "'The score of DP is 0.90 and 1,000 steps.'" in wrong["in no text"].what


@pytest.mark.parametrize("expression", ["of(laptop, pusht_kp, dpp)", "of(human, pusht_kp, dp)", "1 / 0"])
def test_what_cannot_be_computed_is_told(results, expression):
    wrong, _ = findings(results, file={**FILE, "claims": [*FILE["claims"], f"DP has {{{expression}}} and"]})
    assert set(wrong) == {"cannot be computed"}


def test_present_numbers_are_written_into_the_notebooks(tmp_path):
    for name in TEXTS:
        write_text(tmp_path / name, read_text(root() / name))
    texts = read_texts(tmp_path)
    where = next(w for w, text in texts.items() if "**Summary.**" in text)
    write_texts({**texts, where: "changed"}, tmp_path)
    assert read_texts(tmp_path) == {**texts, where: "changed"}
    write_texts(texts, tmp_path)
    for name in TEXTS:
        assert json.loads(read_text(tmp_path / name)) == json.loads(read_text(root() / name))


def test_a_value_shows_its_interval_where_it_is_asked_for():
    value = Value(0.0649, 0.0227, 0.1058)
    assert (f"{value}", f"{value:.2f}", f"{value:.2fi}") == ("0.065", "0.06", "0.06 [0.02, 0.11]")
    assert f"{value:i}" == "0.065 [0.023, 0.106]" and not value.holds_zero


# Verdicts


@pytest.fixture
def pair(tmp_path):
    "Writes DP's and DP-AG's rows of Push-T kp: the gain of each training seed, and noise of the states."

    def write(*gains, run="laptop-scripted", spread=0.01, task="pusht_kp"):
        noise = np.random.default_rng(0).normal(size=(len(gains), 2, 40))
        for seed, gain in enumerate(gains):
            for i, method in enumerate(("dp", "dp_ag")):
                score = np.clip(0.5 + i * gain + spread * noise[seed, i], 0, 1)
                folder = Results(tmp_path).evaluation(Cell(run, task, method, seed))
                folder.mkdir(parents=True, exist_ok=True)
                rows = pd.DataFrame(
                    {"state_seed": range(40), "score": score, "jerk": 1 - score, "success": 1}
                )
                rows.to_csv(folder / "episodes.csv", index=False)
        table = gains_table(Measured(Results(tmp_path))).set_index("claim: DP-AG is better in")
        return table.loc[{"pusht_kp": "Push-T kp: score", "ur5_candy": "UR5 candy push: jerk"}[task]]

    return write


@pytest.mark.parametrize(
    "gains,more,expected",
    [
        ((0.1, 0.1, 0.1), {}, REPRODUCED),
        ((0.02, 0.02, 0.02), {}, f"{REPRODUCED}: a smaller gain than the paper's"),
        ((0.1,), {}, f"{UNTESTED}: a gain, of one training seed"),
        ((0.0, 0.0, 0.0), {}, NOT_HERE),
        ((0.0,), {}, f"{NOT_HERE}: no gain, of one training seed"),
        ((0.0, 0.0, 0.0), {"run": "paper-human"}, REFUTED),
        ((0.0, 0.0, 0.0), {"spread": 0.3}, f"{UNTESTED}: so small a gain would not be seen"),
        ((0.4, 0.4), {"spread": 0.0, "task": "ur5_candy"}, REPRODUCED),
    ],
)
def test_a_verdict_follows_its_rows(pair, gains, more, expected):
    assert pair(*gains, **more).verdict == expected


def test_a_verdict_changes_with_its_rows(pair):
    before, after = pair(0.1, 0.1, 0.1).copy(), pair(0.0, 0.0, 0.0)
    assert (before.verdict, after.verdict) == (REPRODUCED, NOT_HERE) and before.measured != after.measured


def test_a_verdict_rests_on_the_run_with_most_seeds_and_shows_the_others(pair):
    pair(0.1, run="workstation-human")
    row = pair(0.0, 0.0)
    assert (
        row["rests on"] == "laptop, scripted, 2 × 40" and "(workstation, human, 1 × 40)" in row["other runs"]
    )
    assert pair(0.0, 0.0, run="workstation-human")["rests on"] == "workstation, human, 2 × 40"


def test_every_number_that_the_paper_prints_as_better_has_a_verdict():
    measured = Measured(published())
    table, long = gains_table(measured), Rows(published())
    assert len(table) == len(list(claims())) == 19
    assert table.verdict.str.match(f"{REPRODUCED}|{NOT_HERE}|{REFUTED}|{UNTESTED}").all()
    (kp,) = table[table.iloc[:, 0] == "Push-T kp: score"].itertuples()
    diff = long.diff("workstation-human", "pusht_kp")
    assert kp.measured == f"{diff:+.3f} [{diff.low:.3f}, {diff.high:.3f}]"
    assert len(list(rows_of_spirals(measured))) == 4
