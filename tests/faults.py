"""The faults that a run must survive, and the page docs/reliability.md: `python -m tests.faults` prints it.

A test says which faults it injects by `@pytest.mark.fault(3)`; a file of them by `pytestmark = pytest.mark.fault(3)`.
The page links to whatever is so marked, and names the faults that no test injects. What was measured it reads from
soak.json and saving.json in benchmarks/results.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
RESULTS = TESTS.parent / "benchmarks/results"


class Fault(NamedTuple):
    """What happens to a run, and what is promised then."""

    happens: str
    promise: str


FAULTS = {
    1: Fault(
        "`kill -9` at any byte of a save, before it is complete, before `latest` points to it, while old ones go",
        "The same command resumes from the newest complete checkpoint, and every later loss is bit-equal to that of "
        "the run that nobody disturbed.",
    ),
    2: Fault(
        "the same while a thread saves (`checkpoint.asynchronous`) and only one checkpoint is kept",
        "At every instant there is a checkpoint of which every byte verifies.",
    ),
    3: Fault(
        "one bit flips in any file of a checkpoint",
        "The file is named and the checkpoint before it is used; `lmtrain checkpoint verify` exits with 4.",
    ),
    4: Fault(
        "files of a checkpoint are cut, empty or missing; folders of interrupted saves lie about; `latest` is nonsense",
        "As 3: named and passed over. `latest` is never read. A run whose checkpoints are all damaged stops, and "
        "begins again only with `--fresh`.",
    ),
    5: Fault(
        "a run stops and resumes: within an epoch, across one, while gradients accumulate, with dropout, after an "
        "evaluation, with a save in a thread",
        "Losses, batches, parameters and moments are bit-equal to those of the run that went through.",
    ),
    6: Fault(
        "a run resumes on another number of ranks, or with the other engine",
        "The same batches; losses that differ by rounding alone.",
    ),
    7: Fault(
        "SIGTERM or Ctrl-C: to the launcher, to one rank, in an evaluation, before the first step, in a save, twice",
        "All ranks save one checkpoint at the current step and exit with 75; the same command goes on. A second signal "
        "ends the run at once, with its newest checkpoint intact.",
    ),
    8: Fault(
        "the time limit of a job", "The last checkpoint is complete before `train.max_time`, and the run exits with 75."
    ),
    9: Fault(
        "a loss or gradient is not finite: once, on one rank only, several times in a row",
        "The whole update is skipped on all ranks, and weights and moments keep every bit; it is counted. After "
        "`train.max_skips` in a row the run goes back to the last good checkpoint and leaves those samples out; after "
        "`train.max_rollbacks` of that it ends with exit code 4 and the reason. The offending batches are kept.",
    ),
    10: Fault(
        "batches of garbage: the loss jumps",
        "A jump is told from noise, and `train.spikes` says what then: tell, skip or roll back.",
    ),
    11: Fault(
        "a rank raises, is killed, stands still, or never starts",
        "The job ends on all ranks within `parallel.timeout`, not with 0; `status.json` names rank, step and reason.",
    ),
    12: Fault(
        "the disk is full, a quota is used up, files may not grow, the disk gives back something else",
        "A message with the path and the bytes it needs; nothing half-written stays, the checkpoints before are "
        "intact, training goes on. If the last save failed, the run does not exit with 0.",
    ),
    13: Fault(
        "odd places: a read-only folder, blanks in a path, links; a second process on a run, the lock of a dead one",
        "It works, or one message says why not before the first step.",
    ),
    14: Fault(
        "token files that are cut, empty, missing, changed, of the wrong type or with unknown tokens; a text too short",
        "An error at the start that names the file, and the place in it.",
    ),
    15: Fault(
        "a configuration or command line with mistakes, or of any bytes at all",
        "All mistakes at once, with line and remedy; exit code 2; nothing is created.",
    ),
    16: Fault(
        "a pickle, a tag or other code in a file that is read",
        "Nothing in it runs.",
    ),
    17: Fault(
        "TensorBoard's writer fails; a run with curves resumes",
        "Training goes on, with one warning. No curve is doubled or runs backwards.",
    ),
    18: Fault(
        "the clock jumps back, `PYTHONHASHSEED` changes, the locale is C",
        "Not a bit of the run differs.",
    ),
    19: Fault(
        "there is not enough memory",
        "A message names the largest item and the setting that makes it smaller.",
    ),
    20: Fault(
        "a sweep is interrupted or killed",
        "Its runs end with it; started again, it repeats at most those that were in flight.",
    ),
}

_HEAD = """\
# Reliability

<!-- Written by `python -m tests.faults`; a test compares. Mark tests, or edit tests/faults.py, not this page. -->

What can happen to a run, what is promised then, and the tests that make it happen. Most kill, cut or starve real
processes: see [`lmtrain/fault.py`](../lmtrain/fault.py) for the faults that `LMTRAIN_FAULT` injects into any run, yours
included. `make test` runs all of them but those marked slow. What nobody may execute or read is in
[SECURITY.md](../SECURITY.md).
"""


class Test(NamedTuple):
    """A test that injects faults: its file below tests/, its name, whether it is marked slow."""

    file: str
    name: str
    slow: bool

    @property
    def words(self) -> str:
        """The name as a sentence, linked to the file."""
        text = self.name.removeprefix("test_").replace("_", " ")
        return f"[{text}](../tests/{self.file})" + (" (slow)" if self.slow else "")


def page() -> str:
    """docs/reliability.md."""
    tests = marked()
    tested = sum(bool(tests[number]) for number in FAULTS)
    table = [
        f"{tested} of {len(FAULTS)} are tested.\n",
        "| | what happens | what is promised | tests |",
        "|---|---|---|---|",
    ]
    chapters = []
    for number, fault in FAULTS.items():
        link = f"[{len(tests[number])}](#fault-{number})" if tests[number] else "not tested yet"
        table.append(f"| {number} | {fault.happens} | {fault.promise} | {link} |")
        listed = "\n".join(f"* {test.words}" for test in tests[number]) or "Not tested yet."
        chapters.append(f"### Fault {number}\n\n{fault.happens[0].upper()}{fault.happens[1:]}.\n\n{listed}\n")
    return "\n".join([_HEAD, *table, *_measured(), "\n## Tests\n", *chapters])


def _measured() -> Iterator[str]:
    """What the soak survived, what a save costs, how long a stop takes."""
    soak, saving = (json.loads((RESULTS / name).read_text()) for name in ("soak.json", "saving.json"))
    (total,) = soak["total"]
    outcome = "were" if total["same bits"] else "were not"
    yield "\n## Measured\n"
    yield (
        f"[`benchmarks/soak.py`](../benchmarks/soak.py) trained one run for {total['minutes']:g} minutes and disturbed "
        f"it all the time: {total['faults']} faults, {total['starts']} starts of the same command, {total['steps']:,} "
        f"steps. Every row but for its speed, and every bit of weights and moments at the end, {outcome} those of a "
        f"run that nobody disturbed. ({_environment(soak)})\n"
    )
    yield from _table(soak["faults"])
    yield (
        "\nWhat a safe checkpoint costs beside a plain file of the same tensors, in seconds per GB (median; "
        "[`benchmarks/saving.py`](../benchmarks/saving.py), "
        f"{_environment(saving)}):\n"
    )
    yield from _table(saving["saves"])
    yield "\nFrom SIGTERM to the end of the process, saved where it stood (one run of `demo`, one thread):\n"
    yield from _table(saving["stops"])


def _environment(result: dict[str, Any]) -> str:
    here = result["environment"]
    return f"{here['cores']} cores, {here['processor']}, torch {here['torch']}, {here['date']}"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of equal keys; numbers with three digits."""
    yield f"| {' | '.join(rows[0])} |"
    yield "|" + "---|" * len(rows[0])
    for row in rows:
        yield f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row.values())} |"


def marked() -> dict[int, list[Test]]:
    """The tests of each fault, in the order of their files; ValueError for a mark that is of none."""
    found: dict[int, list[Test]] = {number: [] for number in FAULTS}
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_file = [mark for node in tree.body if _assigns_marks(node) for mark in _marks(node)]
        for function in _tests(tree):
            marks = [*of_file, *(mark for decorator in function.decorator_list for mark in _marks(decorator))]
            test = Test(path.relative_to(TESTS).as_posix(), function.name, any(kind == "slow" for kind, _ in marks))
            for number in dict.fromkeys(number for kind, numbers in marks if kind == "fault" for number in numbers):
                if number not in FAULTS:
                    raise ValueError(f"{path}: {function.name} is marked with fault {number!r}; there is no such fault")
                found[number].append(test)
    return found


def _tests(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions that pytest would run."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else [node]
        yield from (one for one in members if isinstance(one, ast.FunctionDef) and one.name.startswith("test_"))


def _assigns_marks(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(to, ast.Name) and to.id == "pytestmark" for to in node.targets
    )


def _marks(node: ast.AST) -> Iterator[tuple[str, list[object]]]:
    """(name, arguments) of each `pytest.mark.NAME` in a piece of source; the marks of single parameters are none."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("pytest.mark."):
        name = ast.unparse(node.func).removeprefix("pytest.mark.")
        yield name, [ast.literal_eval(word) for word in node.args] if name == "fault" else []
    elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.mark."):
        yield node.attr, []
    else:
        for child in ast.iter_child_nodes(node):
            yield from _marks(child)


if __name__ == "__main__":
    print(page(), end="")
