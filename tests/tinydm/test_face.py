"""The Python face on a tiny model: its examples run, it makes what the command line makes, and bad
input gets one sentence."""

import doctest
import json
import logging
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import randomize
from pipeline import NETWORK
from safetensors.torch import save_file

import tinydm
from base.files import PROJECT
from models.data import read_image
from models.zoo import build_network
from tinydm import cli, face

SAMPLING = {"sampler": "ddim", "steps": 4, "skip": "uniform", "batch_size": 4, "num": 6}
FEW = [
    "calibration.images=4",
    "calibration.steps=3",
    "effort.weight_iters=2",
    "effort.input_iters=2",
    "effort.batch_size=4",
    "effort.dtype=fp32",
]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Path of the YAML of a 3 x 16 x 16 model; the current folder is empty but for it."""
    monkeypatch.chdir(tmp_path)
    # as in Python alone: a command that ran before in this process prints what is logged
    monkeypatch.setattr(logging.getLogger("tinydm"), "handlers", [])
    net = randomize(build_network(**NETWORK))
    save_file(net.state_dict(), tmp_path / "tiny-weights.safetensors")
    content = {
        "name": "tiny",
        "network": NETWORK,
        "checkpoint": str(tmp_path / "tiny-weights.safetensors"),
        "schedule": {},
        "sampling": SAMPLING,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def parts(tiny):
    """A model, a recipe without learning, data."""
    model = tinydm.load_model(tiny, device="cpu")
    recipe = tinydm.Recipe("minmax", *FEW, bits="w4a8", preset="demo")
    return model, recipe, tinydm.calibrate(model, recipe)


def run_examples(text, names):
    test = doctest.DocTestParser().get_doctest(text, names, "examples", None, 0)
    assert test.examples
    runner, report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    runner.run(test, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)
    return test.globs


def test_the_examples_of_all_functions_run_in_turn(tiny):
    names = {"tinydm": tinydm, "tiny": tiny}
    for part in (
        face.load_model,
        face.Recipe,
        face.calibrate,
        face.quantize,
        face.compare_images,
        face.Model.save,
        face.load,
    ):
        names = run_examples(part.__doc__, names)


def test_the_example_of_the_package_runs(tiny):
    names = run_examples(tinydm.__doc__, {"tiny": tiny})
    assert names["scores"]["count"] == 4 and names["again"].is_quantized


def test_every_public_name_is_there():
    assert set(tinydm.__all__) <= set(dir(tinydm))
    assert all(callable(getattr(tinydm, name)) for name in tinydm.__all__)
    with pytest.raises(AttributeError, match="module 'tinydm' has no attribute 'quantise'"):
        _ = tinydm.quantise


@pytest.mark.parametrize("method", ["minmax", "qdiffusion"])
def test_it_makes_what_the_command_line_makes(tiny, method, tmp_path):
    words = [*FEW, "device=cpu"]
    run = tmp_path / "run"
    cli.main(["calibrate", tiny, "w4a8", method, "demo", f"out={run}", *words])
    cli.main(["quantize", str(run)])
    cli.main(["sample", str(run)])
    cli.main(["sample", str(run), "precision=float"])

    model = tinydm.load_model(tiny, device="cpu")
    recipe = tinydm.Recipe(method, *FEW, bits="w4a8", preset="demo")
    data = tinydm.calibrate(model, recipe)
    small = tinydm.quantize(model, recipe, data)
    data.save("data.safetensors")
    small.save("small.safetensors")
    for ours, theirs in (("data", "calibration"), ("small", "quantized")):
        assert (tmp_path / f"{ours}.safetensors").read_bytes() == (
            run / f"{theirs}.safetensors"
        ).read_bytes()
    (floats,) = tmp_path.glob("float-*/")
    for made, folder in ((small, run / "samples"), (model, floats)):
        drawn = torch.stack([read_image(folder / f"{i:06d}.png") for i in range(6)])
        assert torch.equal(made.sample(range(6)), drawn)
    assert not model.is_quantized


def test_a_run_folder_is_resumed_and_goes_on_from_the_command_line(parts, tmp_path):
    model, recipe, data = parts
    lines = []
    small = tinydm.quantize(model, recipe, data, resume="run", log=lines.append)
    again = tinydm.quantize(model, recipe, data, resume="run", log=lines.append)
    assert lines[-1].startswith("quantize: done already")
    images = small.sample([0, 5])
    assert torch.equal(again.sample([0, 5]), images)
    assert torch.equal(tinydm.quantize(model, recipe, data).sample([0, 5]), images)
    cli.main(["sample", "run"])
    assert torch.equal(read_image(tmp_path / "run/samples/000005.png"), images[1])
    with pytest.raises(ValueError, match="run belongs to another recipe: bits.weight"):
        other = tinydm.Recipe("minmax", *FEW, bits="w8a8", preset="demo")
        tinydm.quantize(model, other, data, resume="run")
    data.x[0] += 1
    with pytest.raises(ValueError, match="holds other calibration data"):
        tinydm.quantize(model, recipe, data, resume="run")


def test_trajectories_stay_in_a_folder(tiny, tmp_path):
    model = tinydm.load_model(tiny, device="cpu")
    recipe = tinydm.Recipe("minmax", *FEW)
    tinydm.calibrate(model, recipe, "kept")
    assert len([*tmp_path.glob("kept/trajectory-*/*.safetensors")]) == 1


def test_a_folder_of_diffusers_is_loaded_like_a_model(tiny, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "tiny-weights.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    facts = {
        "_class_name": "UNet2DModel",
        "block_out_channels": [8, 16],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "norm_num_groups": 32,
        "attention_head_dim": None,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    model = tinydm.load_model(folder, like=tiny, device="cpu")
    assert model.shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"load_model\(folder, like='cifar10'\)"):
        tinydm.load_model(folder)


def test_compare_images_has_known_answers():
    a = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    b = a.clone()
    b[0] += 255  # black and white: PSNR 0 dB
    b[1] += 51  # a fifth of the range: 20 log10(5) dB
    scores = tinydm.compare_images(a, b)
    assert scores["psnr_db"] == pytest.approx((0 + 13.9794) / 2, abs=1e-4)
    assert scores["count"] == 3 and scores["identical"] == 1
    same = tinydm.compare_images(a, a)
    assert same["psnr_db"] is None and same["ssim"] == pytest.approx(1)


SENTENCES = [
    (lambda m, r, d: tinydm.load_model("cifar10-compat"), "no model is called 'cifar10-compat'"),
    (lambda m, r, d: tinydm.load_model("cifar10", device="gpu"), "device 'gpu' is unknown"),
    (lambda m, r, d: tinydm.load_model("x.yaml"), "configuration file x.yaml does not exist"),
    (lambda m, r, d: tinydm.load_model(m.files[0], "sampling.stps=3"), "unknown key"),
    (lambda m, r, d: tinydm.Recipe("qdifusion"), "no method is called 'qdifusion'; did you mean"),
    (lambda m, r, d: tinydm.Recipe("minmax", bits="w5a5"), "no bits is called 'w5a5'"),
    (lambda m, r, d: tinydm.Recipe("minmax", preset="dmo"), "no preset is called 'dmo'"),
    (lambda m, r, d: tinydm.Recipe("minmax", "effort"), "'effort' is not key=value"),
    (lambda m, r, d: tinydm.Recipe("minmax", "efort.lr=1"), "unknown key 'efort"),
    (lambda m, r, d: tinydm.Recipe("minmax", "sampling.steps=3"), "belongs to the model"),
    (lambda m, r, d: tinydm.Recipe("minmax", "device=cpu"), "'device' belongs to the model"),
    (lambda m, r, d: tinydm.Recipe("minmax", "out=x"), "give tinydm.quantize resume=FOLDER"),
    (
        lambda m, r, d: tinydm.calibrate(m, tinydm.Recipe("minmax", "calibration.steps=9")),
        "calibration.steps is 9, but the sampler has 4 steps",
    ),
    (lambda m, r, d: m.save("x"), "tiny is not quantized; save what tinydm.quantize returns"),
    (lambda m, r, d: m.sample([0], stepz=3), "sampling has no 'stepz'; did you mean 'steps'"),
    (lambda m, r, d: m.sample([0], sampler="dim"), "sampler 'dim' is unknown"),
    (lambda m, r, d: tinydm.quantize(tinydm.quantize(m, r, d), r, d), "tiny is quantized already"),
    (
        lambda m, r, d: tinydm.quantize(m, r, type(d)(d.x, d.t, made={"weights_hash": "0"})),
        "made with other weights",
    ),
    (lambda m, r, d: tinydm.quantize(m, r, type(d)(d.x[:, :1], d.t)), "calibration samples are"),
    (lambda m, r, d: tinydm.load("nowhere.safetensors"), "nowhere.safetensors does not exist"),
    (lambda m, r, d: tinydm.load("tiny-weights.safetensors"), "not a quantized model"),
    (lambda m, r, d: tinydm.compare_images(d.x, d.x), "give at least one image, uint8"),
    (
        lambda m, r, d: tinydm.compare_images(m.sample([0])[:0], m.sample([0])[:0]),
        "give at least one image",
    ),
]


@pytest.mark.parametrize("act, sentence", SENTENCES, ids=[row[1][:20] for row in SENTENCES])
def test_bad_input_gets_one_sentence(parts, act, sentence):
    with pytest.raises(ValueError) as error:
        act(*parts)
    assert sentence in str(error.value) and "\n" not in str(error.value)


IMPORTS = """
import sys, time
started = time.monotonic()
import torch
middle = time.monotonic()
import tinydm
tinydm.load_model
print(f"torch {middle - started:.1f} s, tinydm on top {time.monotonic() - middle:.1f} s")
heavy = {"pytorch_lightning", "torchmetrics", "torch_fidelity", "torchvision", "matplotlib",
         "scipy", "jinja2"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
model = tinydm.load_model(sys.argv[1], device="cpu")
recipe = tinydm.Recipe("qdiffusion", *sys.argv[2:], bits="w4a8", preset="demo")
tinydm.quantize(model, recipe, tinydm.calibrate(model, recipe)).sample([0])
heavy -= {"scipy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_nothing_heavy_is_imported_to_quantize_and_sample(tiny):
    """The time is printed, what takes it is refused: seconds depend on who else is at work."""
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTS, tiny, *FEW],
        env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
