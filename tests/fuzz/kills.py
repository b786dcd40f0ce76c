"""Kills what writes files at random moments, and runs two at once: `python -m fuzz.kills`.

A case is wrong if the files of the next run are not those of an undisturbed one, if drafts or locks are left or files
of others change, if two at once lose or mix files, or if a full disk leaves a draft. Half of the kills are at a moment,
half before an operation on a file; SIGTERM must leave no draft itself.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.weights import main
from fuzz.writers import WRITERS, Writer, contents, hub, inputs, work

CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fuzz.writers", "peft", "torch._dynamo"])
KILLED = {signal.SIGKILL: (-signal.SIGKILL, 0), signal.SIGTERM: (-signal.SIGTERM, 128 + signal.SIGTERM, 0)}
OTHERS = {"notes.txt": "mine", "mine.part": "a browser's"}  # files of the user
OUTCOMES = ("killed", "at once", "full")
# Names of two writers, or of more, that run at once in one folder. Some keep each other out, with exit code 2.
TOGETHER = [
    *((name,) * 2 for name, writer in WRITERS.items() if not writer.numbered),
    ("generate several",) * 4,
    ("convert", "convert to fp16"),
    ("train longer", "train export"),
    ("train export", "train compare"),
]


class Folder:
    """A folder for the files of writers."""

    def __init__(self, name: str):
        self.parent = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.path, self.events = Path(self.parent.name) / "in", Path(self.parent.name) / "events"
        start = WRITERS[name].start
        shutil.copytree(_start_folder(start), self.path) if start else self.path.mkdir()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.cleanup()

    def start(self, name: str, stop: tuple[int, int] | None = None, largest: int = 0) -> Any:
        return self.start_command(WRITERS[name].command, stop, largest)

    def start_command(self, command: str, stop: tuple[int, int] | None = None, largest: int = 0) -> Any:
        command = command.format(**{path.name: path for path in inputs().iterdir()})
        process = CONTEXT.Process(target=work, args=(command, self.path, hub(), self.events, stop, largest))
        process.start()
        return process

    def files(self) -> dict[str, str]:
        """Returns the hashes of the files."""
        found = [path for path in self.path.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.path)): contents(path) for path in found}

    def drafts(self) -> set[str]:
        return {path.name for path in self.path.rglob(".*.part")}


@cache
def _start_folder(name: str) -> Path:
    """Returns a folder in which a writer has run."""
    if name == "trained":
        with Folder("train a LoRA") as folder:
            folder.start("train a LoRA").join()
            return Path(shutil.copytree(folder.path, inputs() / name))
    raise ValueError(name)


@cache
def _undisturbed(name: str) -> tuple[dict[str, str], float, int]:
    """Returns the files of a run that is not killed, its seconds and its operations on files."""
    with Folder(name) as folder:
        start = time.monotonic()
        process = folder.start(name)
        process.join()
        assert process.exitcode == 0, name
        return folder.files(), time.monotonic() - start, int(folder.events.read_text())


def _add_others(folder: Folder, name: str) -> None:
    """Puts files of the user into the folders that a writer writes to."""
    for parent in {Path(file).parent for file in _undisturbed(name)[0]}:
        if not (WRITERS[name].replaces and parent.is_relative_to(WRITERS[name].replaces)):
            (folder.path / parent).mkdir(parents=True, exist_ok=True)
            for file, text in OTHERS.items():
                (folder.path / parent / file).write_text(text)


def _check(process: Any, writer: Writer, folder: Folder, expected: dict[str, str], others: bool) -> str:
    """Returns what is wrong after the last process, "" if nothing is: it may refuse what is complete already."""
    wrong = _compare(writer, folder, expected, others)
    return f"exit code {process.exitcode}, {wrong}" if wrong or process.exitcode not in (0, 2) else ""


def _compare(writer: Writer, folder: Folder, expected: dict[str, str], others: bool) -> str:
    """Returns what is wrong with the files in a folder, "" if nothing is."""
    found = folder.files()
    if others:
        own = {path for path in found if Path(path).name in OTHERS}
        changed = [path for path in own if (folder.path / path).read_text() != OTHERS[Path(path).name]]
        parents = {path.parent for path in map(Path, expected)}
        parents = {x for x in parents if not (writer.replaces and x.is_relative_to(writer.replaces))}
        if changed or len(own) != len(parents) * len(OTHERS):
            return f"files of the user: {changed}, {sorted(own)}"
        found = {path: text for path, text in found.items() if path not in own}
    if writer.numbered:
        lost = Counter(expected.values()) - Counter(found.values())
        return f"{lost}, {sorted(found)}" if lost or set(found.values()) - set(expected.values()) else ""
    return _different(expected, found)


def _different(expected: dict[str, str], found: dict[str, str]) -> str:
    """Returns the names of the files that differ, "" if none does."""
    return ", ".join(sorted(file for file in {**expected, **found} if expected.get(file) != found.get(file)))


def _killed(rng: random.Random, name: str) -> str:
    """Kills a writer once or twice and runs it again; returns what is wrong, "" if nothing is."""
    expected, seconds, operations = _undisturbed(name)
    with Folder(name) as folder:
        if others := rng.random() < 0.5:
            _add_others(folder, name)
        for _ in range(rng.choice((1, 1, 2))):
            sent, at_operation, before = rng.choice(tuple(KILLED)), rng.random() < 0.5, folder.drafts()
            process = folder.start(name, (sent, rng.randint(1, operations)) if at_operation else None)
            if not at_operation:
                time.sleep(rng.random() * seconds)
                (process.kill if sent == signal.SIGKILL else process.terminate)()
            process.join()
            if process.exitcode not in KILLED[sent]:
                return f"{sent.name}: exit code {process.exitcode}"
            if sent == signal.SIGTERM and process.exitcode != -sent and (left := folder.drafts() - before):
                return f"{sent.name}: left {left}"
        process = folder.start(name)
        process.join()
        return _check(process, WRITERS[name], folder, expected, others)


def _full(rng: random.Random, name: str) -> str:
    """Runs a writer whose files cannot get larger than a limit, then without it; returns what is wrong."""
    expected = _undisturbed(name)[0]
    with Folder(name) as folder:
        process = folder.start(name, largest=int(10 ** rng.uniform(1, 6)))
        process.join()
        left = folder.drafts()
        if process.exitcode not in (0, 2) or left:
            return f"exit code {process.exitcode}, left {left}"
        process = folder.start(name)
        process.join()
        return _check(process, WRITERS[name], folder, expected, False)


def _together(rng: random.Random, names: tuple[str, ...]) -> str:
    """Runs writers at once in one folder; returns what is wrong, "" if nothing is."""
    for name in names:
        _undisturbed(name)
    with Folder(names[0]) as folder:
        processes = []
        for name in names:
            processes.append(folder.start(name))
            time.sleep(rng.choice((0.0, 0.1, 0.5)) * rng.random())
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        done = {name for name, code in zip(names, codes, strict=True) if code == 0}
        different = len(set(names)) > 1 and WRITERS[names[0]].start
        if set(codes) - {0, 2} or not done or (2 in codes and (different or WRITERS[names[0]].numbered)):
            return f"exit codes {codes}"
        if different:
            return _compare_run(folder, names)
        expected = [_undisturbed(name)[0] for name in done]
        if WRITERS[names[0]].numbered:
            found = Counter(folder.files().values())
            return "" if found == Counter(list(expected[0].values()) * len(names)) else f"{sorted(folder.files())}"
        wrong = [_compare(WRITERS[names[0]], folder, files, False) for files in expected]
        return "" if "" in wrong else f"{wrong}, {codes}"


def _compare_run(folder: Folder, names: tuple[str, ...]) -> str:
    """Returns what is wrong after different writers in a run's folder; the export must be that of one step."""
    found, export = folder.files(), WRITERS["train export"].replaces
    expected = {path: text for name in names for path, text in _undisturbed(name)[0].items()}
    if "train longer" in names:
        card = (folder.path / export / "README.md").read_text("utf-8")
        step = next(line.split("|")[2].strip() for line in card.splitlines() if line.startswith("| Steps |"))
        folder.start_command(f"train export out/lora --step {step} --output reference").join()
        reference = {path: text for path, text in folder.files().items() if path.startswith("reference/")}
        expected = _undisturbed("train longer")[0] | {
            path.replace("reference", export, 1): text for path, text in reference.items()
        }
    return _different(expected, found)


def run_case(seed: int) -> str:
    """Runs one case; returns "killed", "at once" or "full", or what is wrong with it."""
    rng = random.Random(seed)
    if seed % 4 == 0:
        names = rng.choice(TOGETHER)
        wrong = _together(rng, names)
        return f"{' and '.join(names)} at once: {wrong}" if wrong else "at once"
    name, (case, what) = rng.choice([*WRITERS]), (_full, "full") if seed % 4 == 1 else (_killed, "killed")
    wrong = case(rng, name)
    return f"{name}, {what}: {wrong}" if wrong else what


if __name__ == "__main__":
    main(__doc__, run_case, OUTCOMES)
