"""Do the sentences on results say what the rows say?

tools/claims.yaml has a template for each sentence, or part of one, whose numbers are measured: an expression
over the committed rows stands where the text has a number. Every other number in these texts is listed there
by its source. So a number that nothing accounts for is found, and one that its rows no longer give.

usage: python tools/claims.py [--write]    print every claim with its present numbers, and what is wrong;
                                           --write puts the present numbers into the notebooks' text
"""

import builtins
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from string import Formatter

import numpy as np
import pandas as pd
import yaml

from dpag import paper
from dpag.files import read_text, write_text
from dpag.paths import Cell, Results, published
from dpag.rows import read_rows
from dpag.stats import matrix, mean_interval, paired_difference

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "tools/claims.yaml"
# Of each text the headings of the first part that is read and of the first that is not.
TEXTS = {"nbs/index.ipynb": ("## Results", "## One experiment"), "nbs/13_results.ipynb": ("# ", None)}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
WORDS += ["twelve", *(f"{n}teen" for n in ("thir", "four", "fif", "six", "seven", "eigh", "nine")), "twenty"]
READ = [*WORDS[2:], "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand"]
DIGITS = r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d)"  # no part of a name or of a version
NUMBER = re.compile(rf"{DIGITS}|\b(?i:{'|'.join(READ)})\b")
SHOWN = re.compile(rf"{NUMBER.pattern}|\b(?i:zero|one)\b")  # what may stand in an expression's place
UNSEEN = re.compile(r"\]\([^)]*\)|`[^`]*`")  # targets of links, code


class Value(float):
    "A measured number. Its format may end in `i`: with the interval."

    def __new__(cls, mean: float, low: float = np.nan, high: float = np.nan):
        value = super().__new__(cls, mean)
        value.low, value.high = low, high
        return value

    def __format__(self, form: str) -> str:
        interval, form = form.endswith("i"), form.removesuffix("i") or ".3f"
        text = float.__format__(self, form)
        return f"{text} [{self.low:{form}}, {self.high:{form}}]" if interval else text

    @property
    def holds_zero(self) -> bool:
        "Whether the interval does, its ends included."
        return self.low <= 0 <= self.high


class Rows:
    """What claims may ask of a tree of results. A run is `laptop`, `workstation` (scripted demonstrations) or
    `human` (the profile workstation's), any other its name in quotes. Raises KeyError for what was not
    measured."""

    RUNS = {"laptop": "laptop-scripted", "workstation": "workstation-scripted", "human": "workstation-human"}

    def __init__(self, results: Results):
        self.results = results

    @cached_property
    def long(self) -> pd.DataFrame:
        "All long tables, by run, task, method and metric."
        rows = pd.concat([pd.read_csv(path) for path in sorted(self.results.tables.glob("*.csv"))])
        run = rows.profile + "-" + rows.demos
        return rows.assign(run=run).set_index(["run", "task", "method", "metric"]).sort_index()

    @cached_property
    def names(self) -> dict:
        "What an expression knows: the functions below, and every task, method and metric by its name."
        names = {n: n for level in ("task", "method", "metric") for n in self.long.index.unique(level)}
        methods = (n for n in dir(type(self)) if not n.startswith("_") and n != "names")
        return {**vars(builtins), "np": np, **names, **self.RUNS, **{n: getattr(self, n) for n in methods}}

    def row(self, run, task, method, metric="score"):
        "One row of a long table."
        return self.long.loc[(run, task, method, metric)]

    def of(self, run, task, method, metric="score") -> Value:
        "A measured number and its interval."
        row = self.row(run, task, method, metric)
        return Value(row.measured, row.ci_low, row.ci_high)

    def diff(self, run, task, method="dp_ag") -> Value:
        "The paired difference of a method's score to DP's."
        return self.of(run, task, method, "score_minus_dp")

    def seen(self, run, task, method="dp_ag") -> Value:
        "The smallest difference to see."
        return self.of(run, task, method, "smallest_difference")

    def jerk_ratio(self, run, task, method="dp_ag") -> Value:
        "The agent's jerk divided by DP's, paired."
        return self.of(run, task, method, "jerk_agent_to_dp")

    def everywhere(self, metric, method="dp_ag", runs=(), tasks=()) -> dict[tuple, Value]:
        "A metric of a method by (run, task), of these runs and tasks or of all."
        found = self.long.xs((method, metric), level=("method", "metric"))
        keys = [k for k in found.index if (not runs or k[0] in runs) and (not tasks or k[1] in tasks)]
        return {k: self.of(*k, method, metric) for k in keys}

    def n(self, run, task, method, what="n_seeds", metric="score") -> int:
        "How many training seeds a method has, or `n_episodes` of each."
        return int(self.row(run, task, method, metric)[what])

    def tries(self, run, task, method) -> int:
        "The episodes of all training seeds together."
        return self.n(run, task, method) * self.n(run, task, method, "n_episodes")

    def wins(self, run, task, method) -> int:
        "How many of them succeeded."
        return round(self.of(run, task, method, "success") * self.tries(run, task, method))

    def printed(self, task, method, metric="score") -> float:
        "The paper's number."
        return paper.number(task, metric, method)[0]

    def gain(self, task, metric="score") -> float:
        "The paper's difference between DP-AG and DP."
        return round(self.printed(task, "dp_ag", metric) - self.printed(task, "dp", metric), 4)

    def last(self, task, method, metric="score") -> float:
        "What others published: the mean of the last ten checkpoints."
        return paper.reference(task, metric, method).last

    @cache  # noqa: B019  one object for a run of the tool
    def episodes(self, run, task, method) -> pd.DataFrame:
        "The rows of all training seeds, by train_seed and state_seed."
        folder = self.results.evaluation(Cell(run, task, method, 0)).parent
        files = {int(path.parent.name[1:]): path for path in sorted(folder.glob("s*/episodes.csv"))}
        frames = {seed: read_rows(path).set_index("state_seed") for seed, path in files.items()}
        return pd.concat(frames, names=["train_seed"])

    def by_seed(self, run, task, method, metric="score", minus=None) -> list[float]:
        "The mean of each training seed, or its difference to another method's."
        both = [self.episodes(run, task, m)[metric] for m in ((method, minus) if minus else (method,))]
        means = [values.groupby("train_seed").mean() for values in both]
        return (means[0] - means[1] if minus else means[0]).dropna().tolist()

    def alone(self, run, task, method, base="dp") -> Value:
        "The paired difference of two methods, with an interval from their own seeds alone."
        difference = self.episodes(run, task, method).score - self.episodes(run, task, base).score
        return Value(*mean_interval(difference.unstack("state_seed").to_numpy()))

    def gain_beside(self, run, task, other) -> Value:
        "How much more DP-AG gains over DP than on another task, with an interval from these seeds alone."
        gains = [
            self.episodes(run, t, "ab_full").score - self.episodes(run, t, "ab_dp").score
            for t in (task, other)
        ]
        return Value(*mean_interval((gains[0] - gains[1]).unstack("state_seed").to_numpy()))

    def ddpm_means(self, method) -> dict[int, float]:
        "The mean score of each training seed of a variant of the interplay, acting by 100 steps of DDPM."
        folder = self.results.evaluation(Cell("interplay-human", "pusht_kp", method, 0)).parent
        rows = {path.parent.name: pd.read_csv(path) for path in folder.glob("s*/acting.csv")}
        return {int(name[1:]): r[r.acting == "ddpm"].score.mean() for name, r in rows.items()}

    def jerk_by_seed(self, run, task, method="dp_ag", base="dp") -> list[float]:
        "The paired ratio of the agent's jerk for each training seed."
        a, b = (self.episodes(run, task, m).jerk_agent for m in (method, base))
        ratio = (a / b).dropna()
        return np.exp(np.log(ratio[(ratio > 0) & np.isfinite(ratio)]).groupby("train_seed").mean()).tolist()

    def curve(self, run, task, method) -> list[float]:
        "The mean scores of the policies that were saved during training seed 0, and of the last one."
        folder = self.results.evaluation(Cell(run, task, method, 0))
        return read_rows(folder / "curve.csv").groupby("step").score.mean().tolist()

    def info(self, run, task, method, seed=0) -> dict:
        "run.json of a cell."
        return json.loads(read_text(self.results.evaluation(Cell(run, task, method, seed)) / "run.json"))

    def trained(self, run, task, method) -> int:
        "The number of training steps."
        return self.info(run, task, method)["step"]

    def seconds(self, run, task, method, seed=0) -> float:
        "How long training took."
        return self.info(run, task, method, seed)["train_seconds"]

    @cache  # noqa: B019
    def study(self, run, name, filename) -> pd.DataFrame:
        "The rows of a file of a study."
        return pd.read_csv(self.results.study(run, name) / filename)

    def control(self, task, trainer, settings, column):
        "A number of robomimic_control.csv, of the policies that act as they were trained."
        rows = pd.read_csv(self.results.folder / "robomimic_control.csv", keep_default_na=False)
        same = (
            (rows.task == task)
            & (rows.trainer == trainer)
            & (rows.settings == settings)
            & (rows.acting == "")
        )
        return float(rows[same][column].item())

    def sampled(self, method, way=None, filename="sampling.csv", column="score", **where) -> Value:
        "A number of the study of samplers; without a way of sampling the one that has `where`."
        rows = self.study("laptop-scripted", "sampling_pusht_kp", filename)
        if "method" in rows:
            rows = rows[rows.method == method]
        for name, value in {"way": way, **where}.items():
            rows = rows[rows[name] == value]
        (row,) = rows.itertuples()
        return Value(getattr(row, column), getattr(row, "ci_low", np.nan), getattr(row, "ci_high", np.nan))

    def unseen(self, task, method, column="denoise", windows="left out") -> float:
        "An error of the study of what was left out, the mean over the training seeds."
        rows = self.study("interplay-human", "left_out", "errors.csv")
        of_method = (rows.task == task) & (rows.method == method)
        return rows[of_method & (rows.windows == windows)][column].mean()

    def replanned(self, method, every, base=None, way="none", column="score") -> Value:
        "Of the study of how often to plan: a method's score (or `column`), or its difference to `base`."
        rows = self.study(
            "interplay-human", "replanning_pusht_kp", "methods.csv" if base else "replanning.csv"
        )
        for name, value in {"method": method, "every": every, "residual": way}.items():
            rows = rows[rows[name] == value]
        (row,) = (rows[rows.base == base] if base else rows).itertuples()
        column = "difference" if base else column
        low, high = (f"{column}_low", f"{column}_high") if column == "gain" else ("ci_low", "ci_high")
        return Value(getattr(row, column), getattr(row, low), getattr(row, high))

    def latent(self, method, column) -> float:
        "A number of the study of the latent's scale, the mean over the training seeds."
        rows = self.study("interplay-human", "latent_scale_pusht_kp", "latent_scale.csv")
        return rows[rows.method == method][column].mean()

    def sooner(self, method, every, than=8) -> Value:
        "What planning again after `every` steps changes of a method's score, without residual guidance."
        rows = self.study("interplay-human", "replanning_pusht_kp", "episodes.csv")
        rows = rows[(rows.method == method) & (rows.residual == "none")]
        return Value(*paired_difference(*(matrix(rows[rows.every == e], "score") for e in (every, than))))

    def errors(self) -> pd.DataFrame:
        "The errors of the spirals, by training seed and model."
        rows = pd.read_csv(self.results.spirals("laptop") / "runs.csv")
        return rows.pivot(index="train_seed", columns="method", values="mse")

    def saved(self, notebook: str, pattern: str) -> list[float]:
        "The numbers that a pattern's group finds in the saved outputs of a notebook."
        cells = json.loads(read_text(ROOT / f"nbs/{notebook}.ipynb"))["cells"]
        outputs = [out for cell in cells for out in cell.get("outputs", [])]
        texts = ["".join(out.get("text", out.get("data", {}).get("text/plain", ""))) for out in outputs]
        return [float(number) for text in texts for number in re.findall(pattern, text)]

    def word(self, n: int) -> str:
        "A small number in words."
        return WORDS[n]

    def listed(self, values, form: str = ".2f") -> str:
        "`a, b and c`."
        *first, last = (format(v, form) for v in values)
        return f"{', '.join(first)} and {last}" if first else last


@dataclass(frozen=True)
class Finding:
    "What is wrong, and with which text."

    kind: str
    where: str
    what: str

    def __str__(self):
        return f"{self.kind}: {self.where}: {self.what}"


@dataclass(frozen=True)
class Claim:
    "A part of a text: a template with expressions, and a condition that its words rest on."

    text: str
    holds: str = ""

    def now(self, names: dict) -> tuple[str, re.Pattern]:
        "The text with the present numbers, and a pattern of it with any numbers in the expressions' places."
        text = pattern = ""
        for literal, field, form, _ in Formatter().parse(self.text):
            text, pattern = text + literal, pattern + re.escape(literal)
            if field is not None:
                value = format(eval(field, dict(names)), form)
                between = (re.escape(part) for part in SHOWN.split(value))
                text, pattern = text + value, pattern + f"({f'(?:{SHOWN.pattern})'.join(between)})"
        return text, re.compile(pattern)

    def true(self, names: dict) -> bool:
        "Whether the condition holds."
        return not self.holds or bool(eval(self.holds, dict(names)))


def read_texts(root: Path = ROOT) -> dict[str, str]:
    "The Markdown that is read, by `notebook, cell`."
    texts = {}
    for name, (first, after) in TEXTS.items():
        reading = False
        for cell in json.loads(read_text(root / name))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                reading = (reading or source.startswith(first)) and not (after and source.startswith(after))
                if reading:
                    texts[f"{name}, {cell['id']}"] = source
    return texts


def sentence(text: str, at: int) -> str:
    "The sentence around a place in a text."
    ends = [0, *(m.end() for m in re.finditer(r"[.:;] |\n", text)), len(text)]
    return text[max(e for e in ends if e <= at) : min(e for e in ends if e > at)].strip()


class Check:
    """Every claim against every text. `present` are the claims with their numbers, `counts` the numbers by
    source, `findings` is what is wrong, `texts` have the present numbers afterwards."""

    def __init__(self, texts: dict[str, str], names: dict, file: dict):
        self.read, self.texts, self.names = texts, dict(texts), dict(names)
        self.accounted: dict[str, list[tuple[int, int, str]]] = {where: [] for where in texts}
        self.counts: Counter[str] = Counter()
        self.findings: list[Finding] = []
        self.present: list[str] = []
        for name, expression in file["let"].items():
            self.let(name, expression)
        for entry in file["claims"]:
            self.claim(Claim(**entry) if isinstance(entry, dict) else Claim(entry))
        for source, parts in file["given"].items():
            for part in parts:
                self.given(source, part)
        for where in texts:
            self.numbers(where)

    def found(self, kind: str, where: str, what: str):
        "Note what is wrong."
        self.findings.append(Finding(kind, where, what))

    def matches(self, pattern: re.Pattern | str, name: str) -> list[tuple[str, re.Match]]:
        "Where a pattern stands in the texts; it is wrong when that is nowhere."
        found = [(where, match) for where, text in self.read.items() for match in re.finditer(pattern, text)]
        if not found:
            self.found("in no text", name, f"the nearest sentence is {self.nearest(name)!r}")
        return found

    def nearest(self, name: str) -> str:
        "The sentence of the texts that is most like a claim that is in none."
        sentences = [s for text in self.read.values() for s in re.split(r"(?<=[.:;]) |\n", text)]
        return next(iter(get_close_matches(name, sentences, n=1, cutoff=0)), "")

    def let(self, name: str, expression: str):
        "Give a value a name that claims may use."
        try:
            self.names[name] = eval(expression, self.names)
        except Exception as e:
            self.found("cannot be computed", name, f"{type(e).__name__}: {e}")

    def claim(self, claim: Claim):
        "Whether a claim stands in a text, with the present numbers, and its condition holds."
        try:
            now, pattern = claim.now(self.names)
            true = claim.true(self.names)
        except Exception as e:  # whatever an expression raises is told beside its claim
            return self.found("cannot be computed", claim.text, f"{type(e).__name__}: {e}")
        self.present.append(now)
        if not true:
            self.found("no longer true", now, claim.holds)
        for where, match in self.matches(pattern, now):
            self.accounted[where] += [(*match.span(i + 1), "the rows") for i in range(pattern.groups)]
            if match[0] != now:
                self.found("stale", where, f"{match[0]!r} is now {now!r}")
                self.texts[where] = self.texts[where].replace(match[0], now)

    def given(self, source: str, part: str):
        "Whether a part of a text whose source is listed stands in a text."
        for where, match in self.matches(re.escape(part), f"{source}: {part}"):
            self.accounted[where].append((*match.span(), source))

    def numbers(self, where: str):
        "Whether every number of a text is accounted for."
        text = self.read[where]
        spans = [*((*m.span(), "") for m in UNSEEN.finditer(text)), *self.accounted[where]]
        for number in NUMBER.finditer(text):
            sources = [s for a, b, s in spans if a <= number.start() and number.end() <= b]
            self.counts.update(filter(None, sources[:1]))
            if not sources:
                what = f"{number[0]!r} in {sentence(text, number.start())!r}"
                self.found("neither claimed nor given", where, what)


def write_texts(texts: dict[str, str], root: Path = ROOT):
    "Put texts by `notebook, cell` into the notebooks."
    for name in TEXTS:
        book = json.loads(read_text(root / name))
        for cell in book["cells"]:
            text = texts.get(f"{name}, {cell['id']}")
            if text is not None:
                cell["source"] = text.splitlines(keepends=True)
        write_text(root / name, json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def main(write: bool):
    "Print every claim, then what is wrong; exit with 1 if anything is."
    check = Check(read_texts(), Rows(published()).names, yaml.safe_load(read_text(CLAIMS)))
    print(*check.present, "\nnumbers by their source:", sep="\n")
    print(*(f"{n:5} {source}" for source, n in check.counts.most_common()), sep="\n")
    print(f"\n{len(check.findings)} findings", *check.findings, sep="\n")
    if write:
        write_texts(check.texts)
        print("\nWhat was stale is mended in the notebooks: now python tools/make_readme.py")
    sys.exit(1 if check.findings else 0)


if __name__ == "__main__":
    main("--write" in sys.argv)
