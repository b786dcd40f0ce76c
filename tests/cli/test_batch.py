"""`generate --prompts`: what each line becomes, what is reported, and that what is there is never painted again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.batch_process import die_at
from helpers.cli_runs import PROMPT, ROUNDING, failure, pixels, run
from helpers.tiny_model import write_tiny_bundle
from helpers.tiny_stages import launch
from PIL import Image

from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.cli import batch, progress
from wuerstchen_core.cli.options import fingerprint
from wuerstchen_core.cli.prompt_file import seed_of
from wuerstchen_core.cli.save import METADATA_KEY
from wuerstchen_core.training.data.folder import Folder
from wuerstchen_core.training.data.shards import LocalShards

BLUE = "a small blue apple"
LINES: list[Any] = [
    {"prompt": PROMPT},
    {"prompt": BLUE, "count": 3, "seed": 7},
    {"prompt": PROMPT, "width": 64, "prior_steps": 2, "negative": "blue"},
    {"prompt": BLUE, "decoder_guidance": 1.5},
    {"prompt": PROMPT, "height": 128, "width": 64},
    {"prompt": BLUE},
]
NAMES = ["000001", "000002", "000002-2", "000002-3", "000003", "000004", "000005", "000006"]


def write(path: Path, lines: list[Any]) -> Path:
    """A file of prompts; a text stands there as it is."""
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines), "utf-8")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", LINES)


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all pictures that are painted from now on."""
    seeds: list[int] = []
    generate = WuerstchenPipeline.generate

    def watched(self: WuerstchenPipeline, prompt: Any, **told: Any) -> list[Image.Image]:
        seeds.extend(told["seed"])
        return generate(self, prompt, **told)

    monkeypatch.setattr(WuerstchenPipeline, "generate", watched)
    return seeds


def command(bundle: Path, prompts: Path, output: Path, *more: str) -> list[str | Path]:
    return ["generate", "--prompts", prompts, "--output", output, "--model", bundle, "--device", "cpu", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def both(names: list[str]) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("png", "json")}


def by_name(folder: Path, cache: Path | None = None) -> dict[str, tuple[np.ndarray, str]]:
    """Pictures and captions as training reads them."""
    source = Folder([folder]) if cache is None else LocalShards(sorted(folder.glob("*.tar")), cache)
    assert not source.bad
    read = [(np.asarray(source.picture(i)).astype(int), source.caption(i)) for i in range(len(source))]
    return {source.name(i).rpartition(":")[2].removesuffix(".png"): read[i] for i in range(len(source))}


def assert_equal_pictures(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, (image, caption) in one.items():
        assert caption == other[name][1]
        assert np.abs(image - other[name][0]).max() <= ROUNDING


def test_each_line_is_what_generate_paints(bundle: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run(*command(bundle, prompts, out, "--seed", "3", "--sampler", "ddim")) == 0
    assert capsys.readouterr() == ("8 painted, 0 there already, lines left out: 0\n", "")
    assert set(files(out)) == both(NAMES)
    made = {name: json.loads((out / f"{name}.json").read_text("utf-8")) for name in NAMES}
    assert made["000001"] == {
        "prompt": PROMPT, "negative": "", "seed": seed_of(3, 1), "model": "tiny.safetensors", "width": 128,
        "height": 64, "schedule": "linear", "prior_steps": 3, "prior_guidance": 2.0, "decoder_steps": 2,
        "decoder_guidance": 1.0, "sampler": "ddim", "weights": fingerprint(bundle),
    }  # fmt: skip
    assert [made[name]["seed"] for name in NAMES[1:4]] == [7, 8, 9]
    assert len({one["seed"] for one in made.values()}) == len(NAMES)
    single = ("--negative", "blue", "--width", "64", "--prior-steps", "2", "--seed", str(made["000003"]["seed"]))
    told = ("--model", bundle, "--sampler", "ddim", "--device", "cpu", "--output", tmp_path / "single.png")
    assert run("generate", PROMPT, *single, *told) == 0
    with Image.open(tmp_path / "single.png") as alone, Image.open(out / "000003.png") as image:
        assert json.loads(image.text[METADATA_KEY]) == json.loads(alone.text[METADATA_KEY]) == made["000003"]
        assert np.abs(pixels([alone]) - pixels([image])).max() <= ROUNDING
    read = by_name(out)
    assert [read[name][1] for name in NAMES] == [PROMPT, BLUE, BLUE, BLUE, PROMPT, BLUE, PROMPT, BLUE]
    assert read["000005"][0].shape == (128, 64, 3)


def test_shards_and_batches(bundle: Path, prompts: Path, tmp_path: Path, painted: list[int]) -> None:
    """Shards of two lines, in batches of three, hold what single files one by one are; only the missing is added."""
    assert run(*command(bundle, prompts, tmp_path / "files")) == 0
    alone = list(painted)
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2", "--batch", "3")) == 0
    assert sorted(painted[len(alone) :]) == sorted(alone)
    assert set(files(tmp_path / "shards")) == {f"{i:06d}-by-2.tar" for i in range(3)}
    assert_equal_pictures(by_name(tmp_path / "shards", tmp_path / "index"), by_name(tmp_path / "files"))
    before = files(tmp_path / "shards")
    write(prompts, [*LINES, {"prompt": PROMPT, "seed": 1}])
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2")) == 0
    assert painted[2 * len(alone) :] == [1]
    write(prompts, [*LINES, {"prompt": PROMPT, "seed": 1}, {"prompt": BLUE, "seed": 2}])
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2")) == 0
    assert painted[2 * len(alone) :] == [1, 2]
    assert before.items() < files(tmp_path / "shards").items()
    before = files(tmp_path / "shards")
    left = tmp_path / "shards/.000000-by-2"  # as a process leaves it that is killed when all is packed
    left.mkdir()
    for name in ("000001.json", "000001.png", "000002.png"):
        (left / name).write_bytes((tmp_path / "files" / name).read_bytes())
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2")) == 0
    assert not left.exists() and files(tmp_path / "shards").keys() == before.keys()
    read = by_name(tmp_path / "shards", tmp_path / "index")
    assert list(read) == [*NAMES, "000007", "000008"] and read["000008"][1] == BLUE


BAD = [
    ("nonsense", "it is no JSON"),
    ('"a red apple"', "it holds no JSON table but str"),
    ({"count": 2}, "[line] lacks prompt"),
    ({"prompt": PROMPT, "wdth": 64}, "[line] has no key wdth: it takes prompt, "),
    ({"prompt": PROMPT, "width": 100}, "100x64 pixels cannot be painted"),
    ({"prompt": PROMPT, "seed": "7"}, "[line] seed must be a whole number, got '7'"),
    ({"prompt": PROMPT, "seed": -1}, "seed -1 cannot be used"),
    ({"prompt": PROMPT, "count": 0}, "0 pictures were asked for"),
    ({"prompt": PROMPT, "count": 10**9}, "give at most 100000"),
    ({"prompt": PROMPT, "decoder_steps": 10**12}, "at most 10000 can be taken"),
    ({"prompt": PROMPT, "prior_guidance": 10**400}, "too large"),
    ({"prompt": PROMPT, "schedule": "fast", "prior_steps": 9}, "the fast schedule has 6 steps, not 9"),
    ({"prompt": PROMPT, "token_mode": "argmax"}, "this model's Stage B paints no tokens"),
    ('{"prompt": "\\ud800"}', "surrogates not allowed"),
    ({"prompt": PROMPT, "seed": json.loads("[" * 900 + "]" * 900)}, "recursion"),
]


def test_bad_lines_are_named_and_the_rest_is_painted(
    bundle: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["\ufeff" + json.dumps(LINES[0]), "", *(line for line, _ in BAD), LINES[5]]
    prompts, out = write(tmp_path / "p.jsonl", lines), tmp_path / "out"
    assert run(*command(bundle, prompts, out, "--json")) == 2
    out_text, last = capsys.readouterr()
    report, named = json.loads(out_text), caplog.messages
    assert (report["painted"], report["there"]) == (2, 0) and set(files(out)) == both(["000001", "000018"])
    assert len(named) == len(BAD) == len(report["left_out"])
    for number, (line, (_, reason)) in enumerate(zip(named, BAD, strict=True), 3):
        assert line.startswith(f"line {number} of {prompts} is left out: ") and reason in line and len(line) < 500
        assert reason in report["left_out"][str(number)]
    assert (
        last == f"left out of {prompts}, for the reasons above, were lines 3, 4, 5 and 12 more; all else is painted\n"
    )


def test_only_what_is_missing_is_painted(bundle: Path, prompts: Path, tmp_path: Path, painted: list[int]) -> None:
    out = tmp_path / "out"
    assert run(*command(bundle, prompts, out)) == 0
    before = files(out)
    painted.clear()
    assert run(*command(bundle, prompts, out)) == 0 and not painted
    (out / "000002-2.png").unlink()
    (out / "000002-2.png.part").write_bytes(before["000002-2.png"][:99])
    assert run(*command(bundle, prompts, out)) == 0 and painted == [8]
    assert set(files(out)) == set(before)


def test_what_cannot_be_meant(bundle: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    write(prompts, LINES[:1])
    assert run(*command(bundle, prompts, out)) == 0
    capsys.readouterr()
    before = files(out)
    assert "000001 of another prompt, seed" in failure(capsys, *command(bundle, prompts, out, "--seed", "1"))
    trained = tmp_path / "trained" / bundle.name  # of the same name and size
    trained.parent.mkdir()
    content = bytearray(bundle.read_bytes())
    content[-len(content) // 2 :] = bytes(x ^ 1 for x in content[-len(content) // 2 :])
    trained.write_bytes(content)
    assert "000001 of another prompt, seed, model" in failure(capsys, *command(trained, prompts, out))
    assert "from a run with other --shards" in failure(capsys, *command(bundle, prompts, out, "--shards", "2"))
    (out / "000001.json").write_text("[]")
    assert "no JSON table" in failure(capsys, *command(bundle, prompts, out))
    assert files(out) == {**before, "000001.json": b"[]"}
    shards = tmp_path / "shards"
    assert run(*command(bundle, prompts, shards, "--shards", "1")) == 0
    capsys.readouterr()
    for more in ((), ("--shards", "2")):
        assert "from a run with other --shards" in failure(capsys, *command(bundle, prompts, shards, *more))
    (shards / "000000-by-1.tar").rename(shards / ".000000-by-1")  # as a killed run has one that it began
    (shards / ".000000-by-1").unlink(), (shards / ".000000-by-1").mkdir()
    for more in ((), ("--shards", "2")):
        assert "from a run with other --shards" in failure(capsys, *command(bundle, prompts, shards, *more))
    (shards / "000000-by-1.tar").write_bytes(b"no tar")
    assert "no shard that can be read" in failure(capsys, *command(bundle, prompts, shards, "--shards", "1"))
    new = tmp_path / "new"
    assert "--shards 0 cannot be used" in failure(capsys, *command(bundle, prompts, new, "--shards", "0"))
    assert "--batch 0 cannot be used" in failure(capsys, *command(bundle, prompts, new, "--batch", "0"))
    assert "100x64 pixels" in failure(capsys, *command(bundle, prompts, new, "--width", "100"))
    assert "none.jsonl does not exist: name a file" in failure(
        capsys, *command(bundle, tmp_path / "none.jsonl", tmp_path / "x")
    )
    assert not (tmp_path / "x").exists()
    (tmp_path / "p.jsonl").write_text(json.dumps(LINES[0]), encoding="utf-16")
    assert run(*command(bundle, tmp_path / "p.jsonl", new)) == 2 and "lines 1;" in capsys.readouterr().err
    assert "holds no prompt" in failure(capsys, *command(bundle, write(tmp_path / "empty", [""]), new))
    assert "is no folder" in failure(capsys, *command(bundle, prompts, prompts))
    assert "give one as --output" in failure(capsys, "generate", "--prompts", prompts)
    assert "either a PROMPT or" in failure(capsys, *command(bundle, prompts, new), PROMPT)
    assert "either a PROMPT or" in failure(capsys, "generate")
    assert "are for a file of --prompts" in failure(capsys, "generate", PROMPT, "--batch", "2")


@pytest.mark.parametrize("more", [(), ("--shards", "1")])
def test_nothing_is_painted_beside_pictures_that_were_made_otherwise(
    bundle: Path, prompts: Path, tmp_path: Path, painted: list[int], more: tuple[str, ...], capsys: Any
) -> None:
    """Whatever is missing before them."""
    out = tmp_path / "out"
    assert run(*command(bundle, prompts, out, *more)) == 0
    [first] = [path for path in out.iterdir() if path.name in ("000001.png", "000000-by-1.tar")]
    first.unlink()
    painted.clear(), capsys.readouterr()
    assert "of another prompt, seed" in failure(capsys, *command(bundle, prompts, out, *more, "--seed", "1"))
    assert not painted and not first.exists()
    assert run(*command(bundle, prompts, out, *more)) == 0 and len(painted) == 1


@pytest.mark.parametrize(("name", "content"), [("000002.png", b"mine"), ("000002.json", b'{"caption": "mine"}')])
def test_what_somebody_else_put_there_is_left_alone(
    bundle: Path, prompts: Path, tmp_path: Path, painted: list[int], name: str, content: bytes, capsys: Any
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(content)
    assert f"holds {name}, which no run with --prompts left" in failure(capsys, *command(bundle, prompts, out))
    assert files(out) == {name: content} and not painted


def test_a_run_without_a_terminal_says_now_and_then_how_far_it_is(
    bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    assert run(*command(bundle, prompts, tmp_path / "out")) == 0
    assert capsys.readouterr().err.splitlines() == [f"{n} of 8 pictures are there" for n in range(1, 9)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that was not there before is forked")
@pytest.mark.parametrize("more", [(), ("--shards", "3")])
def test_killed_and_started_again(
    bundle: Path, prompts: Path, tmp_path: Path, painted: list[int], more: tuple[str, ...]
) -> None:
    """Killed twice amid the writing of a picture: no picture is painted that was there."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(*command(bundle, prompts, whole, *more)) == 0
    everything, there = list(painted), 0
    for last in (3, 4):
        if (child := os.fork()) == 0:
            try:
                torch.set_num_threads(1)  # threads do not come along
                die_at(last)
                run(*command(bundle, prompts, out, *more))
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        there += last - 1
        assert any(name.endswith(".part") for name in files(out))
    painted.clear()
    assert run(*command(bundle, prompts, out, *more)) == 0
    assert painted == everything[there:]
    assert files(out) == files(whole)


@pytest.mark.skipif(os.name == "nt", reason="a process is killed by a signal")
def test_two_processes_one_of_which_is_killed(bundle: Path, tmp_path: Path) -> None:
    """Two processes paint what one paints; after a kill two others paint what is missing, and nothing twice."""
    prompts = write(tmp_path / "prompts.jsonl", [*LINES, "bad", *LINES])
    out, alone = tmp_path / "out", tmp_path / "alone"
    told = [str(argument) for argument in command(bundle, prompts, out)]
    with pytest.raises(AssertionError, match="SIGKILL|exitcode: -9|Signal 9"):
        launch(str(Path(__file__).parents[1] / "helpers" / "batch_process.py"), *told)
    there = {path.name: path.stat().st_ino for path in out.glob("*.png")}
    assert {"000002.png"} <= set(there) and not {"000002-2.png", "000012.png"} & set(there)
    launch("-m", "wuerstchen_core", *told, by="accelerate")
    assert run(*command(bundle, prompts, alone)) == 2
    assert there.items() <= {path.name: path.stat().st_ino for path in out.glob("*.png")}.items()
    assert set(files(out)) == set(files(alone)) and len(files(out)) == 4 * len(NAMES)
    assert_equal_pictures(by_name(out), by_name(alone))
    jsons = [name for name in files(out) if name.endswith(".json")]
    assert [files(out)[name] for name in jsons] == [files(alone)[name] for name in jsons]


@pytest.mark.parametrize(("rank", "world"), list(zip(batch.RANK, batch.WORLD, strict=True)))
def test_a_share_of_shards_by_what_launchers_tell(
    bundle: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    world: str,
    capsys: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last of three processes; a bad line is the business of one of them, and stops no other."""
    write(prompts, [*LINES, "bad"])
    monkeypatch.setenv(rank, "0"), monkeypatch.setenv(world, "3")
    assert run(*command(bundle, prompts, tmp_path / "out", "--shards", "2", "--schedule", "fast")) == 0
    assert capsys.readouterr() == ("4 painted, 0 there already, lines left out: 1 (process 1 of 3)\n", "")
    assert caplog.messages == [f"line 7 of {prompts} is left out: it is no JSON"]
    assert set(files(tmp_path / "out")) == {"000000-by-2.tar"}
    monkeypatch.setenv(rank, "2")
    assert run(*command(bundle, prompts, tmp_path / "out", "--shards", "2", "--schedule", "fast")) == 0
    assert capsys.readouterr() == ("2 painted, 0 there already, lines left out: 0 (process 3 of 3)\n", "")
    monkeypatch.setenv(rank, "3")
    assert "process 3 of 3" in failure(capsys, *command(bundle, prompts, tmp_path / "out"))


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch.device_of("cpu", 3) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [batch.device_of("auto", local) for local in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert batch.device_of("cuda:1", 0) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert batch.device_of("auto", 1) == "auto"


@pytest.mark.parametrize("release", ["v1", "v2"])
def test_each_picture_of_a_batch_has_its_own_seed(tmp_path: Path, release: str) -> None:
    pipe = WuerstchenPipeline.load(write_tiny_bundle(tmp_path / "m.safetensors", release=release), device="cpu")
    long, seeds = "red apple " * 50, [9, 2, 2**48]  # of another length: painted apart
    images = pipe.generate([PROMPT, BLUE, long], seed=seeds)
    for image, prompt, seed in zip(images, [PROMPT, BLUE, long], seeds, strict=True):
        assert np.abs(pixels([image]) - pixels(pipe.generate(prompt, seed=seed))).max() <= ROUNDING
    with pytest.raises(ValueError, match="2 seeds were given for 3 pictures"):
        pipe.generate([PROMPT, BLUE, long], seed=[1, 2])
    with pytest.raises(ValueError, match="seed -1 cannot be used"):
        pipe.generate([PROMPT, BLUE], seed=[1, -1])
