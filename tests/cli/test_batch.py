"""`generate --prompts`: images, metadata, reports, and that existing images are not generated again."""

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
from wuerstchen_core.checkpoints.fingerprint import fingerprint
from wuerstchen_core.cli import batch
from wuerstchen_core.cli.prompt_file import line_seed, parse_line, read_lines
from wuerstchen_core.inference.metadata import RECORD as METADATA_KEY
from wuerstchen_core.inference.settings import SamplingSettings
from wuerstchen_core.training.data.folder import FolderSource
from wuerstchen_core.training.data.shards import ShardSource

BLUE = "a small blue apple"
LINES: list[Any] = [
    {"prompt": PROMPT},
    {"prompt": BLUE, "count": 3, "seed": 7},
    {"prompt": PROMPT, "width": 64, "prior_steps": 2, "negative": "blue", "decoder_steps": 4, "decoder_reuse": 2},
    {"prompt": BLUE, "decoder_guidance": 1.5},
    {"prompt": PROMPT, "height": 128, "width": 64},
    {"prompt": BLUE},
]
NAMES = ["000001", "000002", "000002-2", "000002-3", "000003", "000004", "000005", "000006"]


def write(path: Path, lines: list[Any]) -> Path:
    """Writes a file of prompts; strings are written as they are, other values as JSON."""
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines), "utf-8")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", LINES)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all images that are generated during the test."""
    seeds: list[int] = []
    generate = WuerstchenPipeline.generate

    def watched(self: WuerstchenPipeline, prompt: Any, **kwargs: Any) -> list[Image.Image]:
        seeds.extend(kwargs["seed"])
        return generate(self, prompt, **kwargs)

    monkeypatch.setattr(WuerstchenPipeline, "generate", watched)
    return seeds


def command(bundle: Path, prompts: Path, output: Path, *more: str) -> list[str | Path]:
    return ["generate", "--prompts", prompts, "--output", output, "--model", bundle, "--device", "cpu", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def file_names(names: list[str]) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("png", "json")} | {"metadata.jsonl"}


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of metadata.jsonl by file name."""
    lines = (folder / "metadata.jsonl").read_text("utf-8").split("\n")
    found = [json.loads(line) for line in lines if line]
    assert len({row["file_name"] for row in found}) == len(found)
    return {row["file_name"]: row for row in found}


def read_images(folder: Path, cache: Path | None = None) -> dict[str, tuple[np.ndarray, str]]:
    """Returns images and captions by name, as training reads them."""
    source = FolderSource([folder]) if cache is None else ShardSource(sorted(folder.glob("*.tar")), cache)
    assert not source.bad
    read = [(np.asarray(source.image(i)).astype(int), source.caption(i)) for i in range(len(source))]
    return {source.names[i].rpartition(":")[2].removesuffix(".png"): read[i] for i in range(len(source))}


def assert_equal_pictures(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, (image, caption) in one.items():
        assert caption == other[name][1]
        assert np.abs(image - other[name][0]).max() <= ROUNDING


def test_each_line_gives_the_images_of_generate(bundle: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run(*command(bundle, prompts, out, "--seed", "3", "--sampler", "ddim")) == 0
    assert capsys.readouterr() == ("generated: 8, existing: 0, skipped lines: 0\n", "")
    assert set(files(out)) == file_names(NAMES)
    metadata = {name: json.loads((out / f"{name}.json").read_text("utf-8")) for name in NAMES}
    assert metadata["000001"] == {
        "prompt": PROMPT, "negative": "", "seed": line_seed(3, 1), "model": "tiny.safetensors", "width": 128,
        "height": 64, "schedule": "linear", "prior_steps": 3, "prior_guidance": 2.0, "decoder_steps": 2,
        "decoder_guidance": 1.0, "sampler": "ddim", "weights": fingerprint(bundle), "dtype": "fp32",
    }  # fmt: skip
    assert [metadata[name]["seed"] for name in NAMES[1:4]] == [7, 8, 9]
    assert len({one["seed"] for one in metadata.values()}) == len(NAMES)
    single = ("--negative", "blue", "--width", "64", "--prior-steps", "2", "--seed", str(metadata["000003"]["seed"]))
    single += ("--decoder-steps", "4", "--reuse", "2")
    options = ("--model", bundle, "--sampler", "ddim", "--device", "cpu", "--output", tmp_path / "single.png")
    assert run("generate", PROMPT, *single, *options) == 0
    with Image.open(tmp_path / "single.png") as alone, Image.open(out / "000003.png") as image:
        assert json.loads(image.text[METADATA_KEY]) == json.loads(alone.text[METADATA_KEY]) == metadata["000003"]
        assert np.abs(pixels([alone]) - pixels([image])).max() <= ROUNDING
    for name, row in rows(out).items():
        assert row["text"] == row["prompt"] and name == row["file_name"]
        assert {key: x for key, x in row.items() if key not in ("text", "file_name")} == metadata[name[:-4]]
    read = read_images(out)
    assert [read[name][1] for name in NAMES] == [PROMPT, BLUE, BLUE, BLUE, PROMPT, BLUE, PROMPT, BLUE]
    assert read["000005"][0].shape == (128, 64, 3)


TEXTS = [
    "a red apple",
    "# not this",
    "",
    "  a small {blue|red} apple \t",
    '{"prompt": "a red apple", "seed": 4}',
    "ä, 苹果",
]
PLAIN_PROMPTS = {1: "a red apple", 4: "a small {blue|red} apple", 5: "a red apple", 6: "ä, 苹果"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_a_text_file_are_prompts(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    for name in ("p.txt", "p.TXT", "p"):
        path = tmp_path / name
        path.write_bytes((mark + end.join(TEXTS)).encode(encoding))
        lines = read_lines(path)
        images = [parse_line(number, raw, {}, SamplingSettings(), 3)[0] for number, raw in lines.items()]
        assert {number: one.prompt for number, one in zip(lines, images, strict=True)} == PLAIN_PROMPTS
        assert [one.seed for one in images] == [line_seed(3, 1), line_seed(3, 4), 4, line_seed(3, 6)]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_file_without_a_byte_order_mark_is_refused_whole(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.txt").write_bytes("a cat\na dog\n".encode(encoding))
    with pytest.raises(ValueError, match=r"p\.txt.*UTF-8"):
        read_lines(tmp_path / "p.txt")


def test_other_files_have_json_lines(tmp_path: Path, capsys: Any) -> None:
    for name, content, reason in (
        ("p.jsonl", b"a red apple", "JSON"), ("p.csv", b"a red apple", "JSON"), ("p.txt", b'{"prompt": ', "JSON"),
        ("p.txt", "ä".encode("cp1252"), "UTF-8"), ("p.txt", b'{ "promt": "x"}', "promt"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        [raw] = read_lines(tmp_path / name).values()
        with pytest.raises(ValueError, match=reason):
            parse_line(1, raw, {}, SamplingSettings(), 0)
    (tmp_path / "comments.txt").write_text("# one\n\n  # two\n")
    with pytest.raises(ValueError, match="comments.txt"):
        read_lines(tmp_path / "comments.txt")


def test_a_table_of_another_program_is_kept_or_refused(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    prompts, out = write(tmp_path / "p.txt", ["a red apple"]), tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "mine.jpg")
    (out / "metadata.jsonl").write_text('{"file_name": "mine.jpg", "text": "ä"}\n', encoding="utf-16")
    assert run(*command(bundle, prompts, out)) == 0
    assert {name: row["text"] for name, row in rows(out).items()} == {"000001.png": "a red apple", "mine.jpg": "ä"}
    capsys.readouterr()
    for line in ('{"file_name": 5}', "[1]", "no JSON"):
        (out / "metadata.jsonl").write_text(f"{line}\n")
        assert "metadata.jsonl" in failure(capsys, *command(bundle, prompts, out))
    assert str(tmp_path) in failure(capsys, *command(bundle, tmp_path, out))


def test_rows_are_right_after_each_run(bundle: Path, tmp_path: Path) -> None:
    """Also for images that other programs put in the folder."""
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a red apple\na blue apple\n")
    assert run(*command(bundle, prompts, out)) == 0
    assert {name: row["text"] for name, row in rows(out).items()} == {
        "000001.png": "a red apple", "000002.png": "a blue apple",
    }  # fmt: skip
    Image.new("RGB", (8, 8)).save(out / "mine.png")
    (out / "mine.json").write_text('{"caption": "other"}')
    with (out / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file_name": "mine.png", "text": "mine\u2028"}\n\n{"file_name": "gone.png", "text": "x"}\n')
    (out / "000001.png").unlink()
    prompts.write_text("# later\na blue apple\na small apple\n")
    assert run(*command(bundle, prompts, out)) == 0
    found = rows(out)
    assert {name: row["text"] for name, row in found.items()} == {
        "000002.png": "a blue apple", "000003.png": "a small apple", "mine.png": "mine\u2028",
    }  # fmt: skip
    assert FolderSource([out]).bad == {}


def test_shards_and_batches(bundle: Path, prompts: Path, tmp_path: Path, generated: list[int]) -> None:
    """Shards of two lines, generated in batches of three, equal single files; a new line adds only its images."""
    assert run(*command(bundle, prompts, tmp_path / "files")) == 0
    alone = list(generated)
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2", "--batch", "3")) == 0
    assert sorted(generated[len(alone) :]) == sorted(alone)
    assert set(files(tmp_path / "shards")) == {f"{i:06d}-by-2.tar" for i in range(3)}
    assert_equal_pictures(read_images(tmp_path / "shards", tmp_path / "index"), read_images(tmp_path / "files"))
    before = files(tmp_path / "shards")
    write(prompts, [*LINES, {"prompt": PROMPT, "seed": 1}])
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2")) == 0
    assert generated[2 * len(alone) :] == [1]
    write(prompts, [*LINES, {"prompt": PROMPT, "seed": 1}, {"prompt": BLUE, "seed": 2}])
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2")) == 0
    assert generated[2 * len(alone) :] == [1, 2]
    assert before.items() < files(tmp_path / "shards").items()
    before = files(tmp_path / "shards")
    leftover = tmp_path / "shards/.000000-by-2"  # as if the process was killed after packing
    leftover.mkdir()
    for name in ("000001.json", "000001.png", "000002.png"):
        (leftover / name).write_bytes((tmp_path / "files" / name).read_bytes())
    assert run(*command(bundle, prompts, tmp_path / "shards", "--shards", "2")) == 0
    assert not leftover.exists() and files(tmp_path / "shards").keys() == before.keys()
    read = read_images(tmp_path / "shards", tmp_path / "index")
    assert list(read) == [*NAMES, "000007", "000008"] and read["000008"][1] == BLUE


BAD = [
    ("nonsense", "JSON"),
    ('"a red apple"', "str"),
    ({"count": 2}, "prompt"),
    ({"prompt": PROMPT, "wdth": 64}, "wdth"),
    ({"prompt": PROMPT, "width": 100}, "100x64"),
    ({"prompt": PROMPT, "seed": "7"}, "got '7'"),
    ({"prompt": PROMPT, "seed": -1}, "seed -1"),
    ({"prompt": PROMPT, "count": 0}, "count"),
    ({"prompt": PROMPT, "count": 10**9}, "100000"),
    ({"prompt": PROMPT, "decoder_steps": 10**12}, "10000"),
    ({"prompt": PROMPT, "prior_guidance": 10**400}, "prior_guidance"),
    ({"prompt": PROMPT, "schedule": "fast", "prior_steps": 9}, "6 steps, not 9"),
    ({"prompt": PROMPT, "token_mode": "argmax"}, "token"),
    ({"prompt": PROMPT, "decoder_reuse": 0}, "decoder_reuse 0"),
    ('{"prompt": "\\ud800"}', "surrogate pair"),
    (f'{{"prompt": "a", "seed": {"[" * 20_000}{"]" * 20_000}}}', "JSON"),
]


def test_invalid_lines_are_reported_and_skipped(
    bundle: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["\ufeff" + json.dumps(LINES[0]), "", *(line for line, _ in BAD), LINES[5]]
    prompts, out = write(tmp_path / "p.jsonl", lines), tmp_path / "out"
    assert run(*command(bundle, prompts, out, "--json")) == 2
    out_text, last = capsys.readouterr()
    report, named = json.loads(out_text), caplog.messages
    assert (report["generated"], report["existing"]) == (2, 0) and set(files(out)) == file_names(["000001", "000019"])
    assert len(named) == len(BAD) == len(report["skipped"])
    for number, (line, (_, reason)) in enumerate(zip(named, BAD, strict=True), 3):
        assert line.startswith(f"{prompts}: line {number} ") and reason in line and len(line) < 500
        assert reason in report["skipped"][str(number)]
    assert str(prompts) in last and "lines 3, 4, 5 and 13 more" in last and last.count("\n") == 1


def test_unknown_words_are_reported_once_for_all_lines(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a zebra"}, {"prompt": "a zebra on a castle"}])
    assert run(*command(bundle, prompts, tmp_path / "out")) == 0
    [message] = caplog.messages
    assert '"zebra", "castle"' in message and message.count("\n") == 1


def test_only_missing_images_are_generated(bundle: Path, prompts: Path, tmp_path: Path, generated: list[int]) -> None:
    out = tmp_path / "out"
    assert run(*command(bundle, prompts, out)) == 0
    before = files(out)
    generated.clear()
    assert run(*command(bundle, prompts, out)) == 0 and not generated
    (out / "000002-2.png").unlink()
    assert run(*command(bundle, prompts, out)) == 0 and generated == [8]
    assert set(files(out)) == set(before)


@pytest.mark.parametrize("more", [(), ("--shards", "2")])
def test_a_process_removes_only_drafts_of_its_own_images(
    bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Process 0 of 2 has the lines 1, 3, 5, or shard 0 with the lines 1 and 2."""
    out = tmp_path / "out"
    out.mkdir()
    own = ["000000-by-2.tar"] if more else ["000001.png", "000003.json"]
    others = ["000001-by-2.tar"] if more else ["000002.png", "000004.json"]
    drafts = {name: out / f".{name}.0123456789ab.part" for name in (*own, *others, "mine.png")}
    for draft in drafts.values():
        draft.write_bytes(b"half")
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*command(bundle, prompts, out, *more)) == 0
    assert [name for name, draft in drafts.items() if draft.exists()] == [*others, "mine.png"]


def test_unusable_options_and_folders(bundle: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    write(prompts, LINES[:1])
    assert run(*command(bundle, prompts, out)) == 0
    capsys.readouterr()
    before = files(out)
    assert "000001" in failure(capsys, *command(bundle, prompts, out, "--seed", "1"))
    trained = tmp_path / "trained" / bundle.name  # of the same name and size
    trained.parent.mkdir()
    content = bytearray(bundle.read_bytes())
    content[-len(content) // 2 :] = bytes(x ^ 1 for x in content[-len(content) // 2 :])
    trained.write_bytes(content)
    assert "000001" in failure(capsys, *command(trained, prompts, out))
    assert "000001.png" in failure(capsys, *command(bundle, prompts, out, "--shards", "2"))
    (out / "000001.json").write_text("[]")
    assert "000001.json" in failure(capsys, *command(bundle, prompts, out))
    assert files(out) == {**before, "000001.json": b"[]"}
    shards = tmp_path / "shards"
    assert run(*command(bundle, prompts, shards, "--shards", "1")) == 0
    capsys.readouterr()
    for more in ((), ("--shards", "2")):
        assert "000000-by-1.tar" in failure(capsys, *command(bundle, prompts, shards, *more))
    (shards / "000000-by-1.tar").unlink(), (shards / ".000000-by-1").mkdir()  # an unfinished shard
    for more in ((), ("--shards", "2")):
        assert "000000-by-1.tar" in failure(capsys, *command(bundle, prompts, shards, *more))
    (shards / "000000-by-1.tar").write_bytes(b"no tar")
    assert "000000-by-1.tar" in failure(capsys, *command(bundle, prompts, shards, "--shards", "1"))
    new = tmp_path / "new"
    assert "--shards" in failure(capsys, *command(bundle, prompts, new, "--shards", "0"))
    assert "--batch" in failure(capsys, *command(bundle, prompts, new, "--batch", "0"))
    assert "100x64" in failure(capsys, *command(bundle, prompts, new, "--width", "100"))
    assert "none.jsonl" in failure(capsys, *command(bundle, tmp_path / "none.jsonl", tmp_path / "x"))
    assert "nope" in failure(capsys, *command(tmp_path / "nope", prompts, tmp_path / "x"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "MOST_IMAGES", 3)
        many = write(tmp_path / "many", [{"prompt": PROMPT, "count": 2}] * 2)
        assert str(many) in failure(capsys, *command(bundle, many, tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    (tmp_path / "p.jsonl").write_text('{"prompt": "ä"}', encoding="cp1252")
    assert run(*command(bundle, tmp_path / "p.jsonl", new)) == 2 and "lines 1 " in capsys.readouterr().err
    assert str(tmp_path / "empty") in failure(capsys, *command(bundle, write(tmp_path / "empty", [""]), new))
    assert str(prompts) in failure(capsys, *command(bundle, prompts, prompts))
    assert "--output" in failure(capsys, "generate", "--prompts", prompts)
    assert "PROMPT" in failure(capsys, *command(bundle, prompts, new), PROMPT)
    assert "PROMPT" in failure(capsys, "generate")
    assert "--prompts" in failure(capsys, "generate", PROMPT, "--batch", "2")


@pytest.mark.parametrize("more", [(), ("--shards", "1")])
def test_nothing_is_generated_if_images_with_other_settings_exist(
    bundle: Path, prompts: Path, tmp_path: Path, generated: list[int], more: tuple[str, ...], capsys: Any
) -> None:
    """Not even images of earlier lines."""
    out = tmp_path / "out"
    assert run(*command(bundle, prompts, out, *more)) == 0
    [first] = [path for path in out.iterdir() if path.name in ("000001.png", "000000-by-1.tar")]
    first.unlink()
    generated.clear(), capsys.readouterr()
    assert "another prompt, seed" in failure(capsys, *command(bundle, prompts, out, *more, "--seed", "1"))
    assert not generated and not first.exists()
    assert run(*command(bundle, prompts, out, *more)) == 0 and len(generated) == 1


@pytest.mark.parametrize(("name", "content"), [("000002.png", b"mine"), ("000002.json", b'{"caption": "mine"}')])
def test_files_of_other_programs_are_not_replaced(
    bundle: Path, prompts: Path, tmp_path: Path, generated: list[int], name: str, content: bytes, capsys: Any
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(content)
    assert name in failure(capsys, *command(bundle, prompts, out))
    assert files(out) == {name: content} and not generated


def test_progress_lines_without_a_terminal(
    bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(batch, "LINE_INTERVAL", 0.0)
    assert run(*command(bundle, prompts, tmp_path / "out")) == 0
    assert capsys.readouterr().err.splitlines() == [f"{n} of 8 images exist" for n in range(1, 9)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("more", [(), ("--shards", "3")])
def test_killed_and_started_again(
    bundle: Path, prompts: Path, tmp_path: Path, generated: list[int], more: tuple[str, ...]
) -> None:
    """A run that was killed twice while writing generates no existing image again, and no draft remains."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(*command(bundle, prompts, whole, *more)) == 0
    everything, existing = list(generated), 0
    for last in (3, 4):
        if (child := os.fork()) == 0:
            try:
                torch.set_num_threads(1)  # a forked process has no other threads
                die_at(last)
                run(*command(bundle, prompts, out, *more))
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        existing += last - 1
        assert any(name.endswith(".part") for name in files(out))
    generated.clear()
    assert run(*command(bundle, prompts, out, *more)) == 0
    assert generated == everything[existing:]
    assert files(out) == files(whole)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_two_processes_one_of_which_is_killed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Two processes generate the same images as one. After one is killed, two others add only the missing images."""
    prompts = write(tmp_path / "prompts.jsonl", [*LINES, "bad", *LINES])
    out, alone = tmp_path / "out", tmp_path / "alone"
    arguments = [str(argument) for argument in command(bundle, prompts, out)]
    with pytest.raises(AssertionError, match="SIGKILL|exitcode: -9|Signal 9"):
        launch(str(Path(__file__).parents[1] / "helpers" / "batch_process.py"), *arguments)
    existing = {path.name: path.stat().st_ino for path in out.glob("*.png")}
    assert {"000002.png"} <= set(existing) and not {"000002-2.png", "000012.png"} & set(existing)
    for rank in ("0", "1"):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", rank), patch.setenv("WORLD_SIZE", "2")
            assert run(*arguments) == 0
    assert run(*command(bundle, prompts, alone)) == 2
    assert existing.items() <= {path.name: path.stat().st_ino for path in out.glob("*.png")}.items()
    assert set(files(out)) == set(files(alone)) and len(files(out)) == 4 * len(NAMES) + 1
    assert_equal_pictures(read_images(out), read_images(alone))
    jsons = [name for name in files(out) if name.endswith(".json")]
    assert [files(out)[name] for name in jsons] == [files(alone)[name] for name in jsons]


@pytest.mark.parametrize(("rank", "world"), [names[:2] for names in batch.LAUNCHERS])
def test_launchers_divide_the_shards(
    bundle: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    world: str,
    capsys: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first and the last of three processes; only the first has the invalid line, and it does not fail."""
    write(prompts, [*LINES, "bad"])
    monkeypatch.setenv(rank, "0"), monkeypatch.setenv(world, "3")
    assert run(*command(bundle, prompts, tmp_path / "out", "--shards", "2", "--schedule", "fast")) == 0
    assert capsys.readouterr() == ("generated: 4, existing: 0, skipped lines: 1 (process 1 of 3)\n", "")
    [message] = caplog.messages
    assert f"{prompts}: line 7" in message
    assert set(files(tmp_path / "out")) == {"000000-by-2.tar"}
    monkeypatch.setenv(rank, "2")
    assert run(*command(bundle, prompts, tmp_path / "out", "--shards", "2", "--schedule", "fast")) == 0
    assert capsys.readouterr() == ("generated: 2, existing: 0, skipped lines: 0 (process 3 of 3)\n", "")
    monkeypatch.setenv(rank, "3")
    assert "process 3 of 3" in failure(capsys, *command(bundle, prompts, tmp_path / "out"))


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch.process_device("cpu", 3) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [batch.process_device("auto", local) for local in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert batch.process_device("cuda:1", 0) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert batch.process_device("auto", 1) == "auto"


@pytest.mark.parametrize("release", ["v1", "v2"])
def test_each_image_of_a_batch_has_its_own_seed(tmp_path: Path, release: str) -> None:
    pipe = WuerstchenPipeline.load(write_tiny_bundle(tmp_path / "m.safetensors", release=release), device="cpu")
    long, seeds = "red apple " * 50, [9, 2, 2**48]  # longer texts need a batch of their own
    images = pipe.generate([PROMPT, BLUE, long], seed=seeds)
    for image, prompt, seed in zip(images, [PROMPT, BLUE, long], seeds, strict=True):
        assert np.abs(pixels([image]) - pixels(pipe.generate(prompt, seed=seed))).max() <= ROUNDING
    with pytest.raises(ValueError, match="2 seeds"):
        pipe.generate([PROMPT, BLUE, long], seed=[1, 2])
    with pytest.raises(ValueError, match="seed -1"):
        pipe.generate([PROMPT, BLUE], seed=[1, -1])
