"""Tests folders of bundles, which our trainers and `convert` write, read as one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layouts import write_folder
from helpers.networks import NETWORKS
from helpers.tiny_model import METADATA, tiny_parts, write_tiny_bundle
from safetensors.torch import save_file

from wuerstchen_core.checkpoints import PARTS_OF, describe, read_part, save_bundle
from wuerstchen_core.checkpoints.components import BUNDLE_LOADER
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.open import open_source

V2 = PARTS_OF["v2"]
# The part that each of our trainers writes.
STAGES = {
    "vqgan": "vqgan", "encoder": "image_encoder", "text": "text_encoder", "decoder": "decoder", "prior": "prior",
    "token-decoder": "token_decoder",
}  # fmt: skip


def trained(root: Path, stages: dict[str, str], path: str, release: str = "v2") -> Path:
    """Writes the files of these training stages, each to `path`."""
    parts = tiny_parts(release)
    parts["text_encoder"] = parts["prior_text_encoder"]
    for stage, part in stages.items():
        save_bundle(root / path.format(stage=stage), {part: parts[part]}, {"training": {"step": 3}})
    return root


def assert_same(one: Path, other: Path, names: tuple[str, ...]) -> None:
    for name in names:
        mine, theirs = read_part(one, name), read_part(other, name)
        assert mine.params == theirs.params and mine.state_dict.keys() == theirs.state_dict.keys()
        assert all(x.equal(theirs.state_dict[key]) for key, x in mine.state_dict.items())


def test_parts_under_their_own_names(tmp_path: Path) -> None:
    names = ("vqgan", "image_encoder")
    folder = trained(tmp_path / "a", {name: name for name in names}, "{stage}.safetensors")
    description = describe(folder)
    assert description.kind == "folder of single files"
    assert tuple(part.name for part in description.parts) == names
    [output] = convert([folder], tmp_path / "output.safetensors")
    for name in names:
        assert_same(folder / f"{name}.safetensors", output, (name,))
        assert_same(folder, output, (name,))
    with pytest.raises(ValueError, match="has no prior; it holds vqgan, image_encoder$"):
        read_part(folder, "prior")


@pytest.mark.parametrize("path", ["{stage}/{stage}.safetensors", "{stage}.safetensors"])
@pytest.mark.parametrize("release", ["v1", "v2"])
def test_stages_of_a_run(tmp_path: Path, path: str, release: str) -> None:
    other = {"v1": "decoder", "v2": "token-decoder"}[release]
    stages = {stage: part for stage, part in STAGES.items() if stage != other}
    folder = trained(tmp_path / "run", stages, path, release)
    (folder / "prior").mkdir(exist_ok=True)
    torch.save({"net": {}}, folder / "prior" / "checkpoint.pt")
    description = describe(folder)
    assert (description.kind, description.version) == ("folder of single files", release)
    assert [part.name for part in description.parts][-1] == "text_encoder"  # one for both stages
    assert description.missing == ()
    [output] = convert([folder], tmp_path / "output.safetensors")
    assert (
        output.read_bytes()
        == write_tiny_bundle(tmp_path / "whole", {"training": {"step": 3}}, (), release).read_bytes()
    )


@pytest.mark.parametrize("name", ["model", "prior", "any name at all"])
def test_one_bundle(bundle: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{name}.safetensors").symlink_to(bundle)
    description = describe(folder)
    assert (description.kind, description.version, description.missing) == ("bundle", "v2", ())
    assert {(part.folder, part.node) for part in description.parts} == {BUNDLE_LOADER}
    assert open_source(folder).metadata == open_source(bundle).metadata
    assert_same(folder, bundle, V2)
    [output] = convert([folder], tmp_path / "output.safetensors")
    assert output.read_bytes() == bundle.read_bytes()


def test_a_bundle_without_metadata_as_a_component(tmp_path: Path) -> None:
    state = {f"vqgan.{key}": x for key, x in NETWORKS["vqgan"].perturbed().state_dict().items()}
    (tmp_path / "vqgan").mkdir()
    save_file(state, tmp_path / "vqgan" / "model.safetensors")
    assert_same(tmp_path, tmp_path / "vqgan" / "model.safetensors", ("vqgan",))


def test_a_whole_bundle_among_single_files_is_ignored(bundle: Path, tmp_path: Path) -> None:
    """As after `convert` into the folder of its source."""
    whole = write_tiny_bundle(tmp_path / "whole.safetensors")
    convert([whole], tmp_path, dtype="bf16")
    (tmp_path / "decoder.safetensors").unlink()
    assert describe(tmp_path).missing == ("decoder",)
    assert {x.dtype for x in read_part(tmp_path, "vqgan").state_dict.values() if x.is_floating_point()} == {
        torch.bfloat16
    }


def test_bundles_add_missing_parts(tmp_path: Path) -> None:
    parts = tiny_parts()
    save_bundle(tmp_path / "prior.safetensors", {"prior": parts["prior"]}, METADATA)
    save_bundle(tmp_path / "towers.safetensors", {name: parts[name] for name in V2 if "text" in name}, {})
    save_file({"lora.down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    source = open_source(tmp_path)
    assert list(source.networks) == ["prior", "prior_text_encoder", "decoder_text_encoder"]
    assert source.metadata["vocabulary"] == METADATA["vocabulary"]


def test_two_bundles_of_one_part_are_rejected(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_bundle(tmp_path / f"{name}.safetensors", {"vqgan": NETWORKS["vqgan"].build()}, {})
    with pytest.raises(ValueError, match=r"one\.safetensors.*other\.safetensors.*vqgan"):
        open_source(tmp_path)


def test_bundles_do_not_mix_with_a_pipeline_of_diffusers(bundle: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "vqgan", NETWORKS["vqgan"].perturbed().state_dict(), {})
    (tmp_path / "model_index.json").write_text('{"_class_name": "WuerstchenDecoderPipeline"}')
    save_bundle(tmp_path / "mine.safetensors", {"prior": NETWORKS["prior"].build()}, {})
    assert list(open_source(tmp_path).networks) == ["vqgan"]
